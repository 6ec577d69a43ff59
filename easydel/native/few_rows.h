// The loop of few_rows.cc, which grouped.cc takes for groups of few rows, too.

#ifndef EASYDEL_NATIVE_FEW_ROWS_H_
#define EASYDEL_NATIVE_FEW_ROWS_H_

#include <algorithm>
#include <cstdint>

namespace easydel {

constexpr int64_t kGroup = 8;  // rows of the matrix that are added to a result in one pass over it

// Rows of a row-major matrix; `stride` floats from one to the next.
struct Matrix {
  const float* data;
  int64_t rows, stride;
};

// The same code for each generation of vector instructions; the loader picks the one that the processor has.
#if defined(__x86_64__) && defined(__linux__)
#define EASYDEL_FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define EASYDEL_FOR_EACH_PROCESSOR
#endif

// y[r, c] = sum_i x[r, i] w[i, c] over the rows i of w, for c < width; rows of y are `stride` apart. A group of w's rows
// serves all rows of x while it is in the cache.
EASYDEL_FOR_EACH_PROCESSOR
static void MultiplyFewRows(Matrix x, Matrix w, float* y, int64_t width, int64_t stride) {
  for (int64_t r = 0; r < x.rows; ++r) std::fill(y + r * stride, y + r * stride + width, 0.0f);
  const int64_t next = w.stride;
  int64_t i = 0;
  for (; i + kGroup <= w.rows; i += kGroup) {
    const float* __restrict m = w.data + i * next;
    for (int64_t r = 0; r < x.rows; ++r) {
      const float* a = x.data + r * x.stride + i;
      const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3], a4 = a[4], a5 = a[5], a6 = a[6], a7 = a[7];
      float* __restrict out = y + r * stride;
      for (int64_t c = 0; c < width; ++c) {
        out[c] += ((a0 * m[c] + a1 * m[c + next]) + (a2 * m[c + 2 * next] + a3 * m[c + 3 * next])) +
                  ((a4 * m[c + 4 * next] + a5 * m[c + 5 * next]) + (a6 * m[c + 6 * next] + a7 * m[c + 7 * next]));
      }
    }
  }
  for (; i < w.rows; ++i) {
    for (int64_t r = 0; r < x.rows; ++r) {
      for (int64_t c = 0; c < width; ++c) y[r * stride + c] += x.data[r * x.stride + i] * w.data[i * next + c];
    }
  }
}

}  // namespace easydel

#endif  // EASYDEL_NATIVE_FEW_ROWS_H_
