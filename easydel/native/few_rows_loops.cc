// `MultiplyFewRows`: one loop that keeps the memory busy, and one that keeps the arithmetic busy.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "few_rows.h"
#include "processors.h"

namespace easydel {
namespace {

constexpr int64_t kRuns = 8;  // places of the matrix that are read at once

// A few rows wait for memory. Rows of w are read in kRuns places, in each of them row after row: long runs, of
// which the processor fetches what comes next. Of neighbouring rows, each left for the others at its end, it does not.
EASYDEL_FOR_EACH_PROCESSOR
void Stream(Matrix x, Matrix w, float* y, int64_t width, int64_t stride) {
  for (int64_t r = 0; r < x.rows; ++r) std::fill(y + r * stride, y + r * stride + width, 0.0f);
  const int64_t run = w.rows / kRuns, next = run * w.stride;
  for (int64_t i = 0; i < run; ++i) {
    const float* __restrict m = w.data + i * w.stride;
    for (int64_t r = 0; r < x.rows; ++r) {
      const float* a = x.data + r * x.stride + i;
      const float a0 = a[0], a1 = a[run], a2 = a[2 * run], a3 = a[3 * run];
      const float a4 = a[4 * run], a5 = a[5 * run], a6 = a[6 * run], a7 = a[7 * run];
      float* __restrict out = y + r * stride;
      for (int64_t c = 0; c < width; ++c) {
        out[c] += ((a0 * m[c] + a1 * m[c + next]) + (a2 * m[c + 2 * next] + a3 * m[c + 3 * next])) +
                  ((a4 * m[c + 4 * next] + a5 * m[c + 5 * next]) + (a6 * m[c + 6 * next] + a7 * m[c + 7 * next]));
      }
    }
  }
  for (int64_t i = run * kRuns; i < w.rows; ++i) {
    for (int64_t r = 0; r < x.rows; ++r) {
      for (int64_t c = 0; c < width; ++c) y[r * stride + c] += x.data[r * x.stride + i] * w.data[i * w.stride + c];
    }
  }
}

// More rows wait for arithmetic. What is read of w stays in registers for all rows of x, kDeep rows by kVectors vectors;
// what is added up stays in the nearest cache, kWide columns of all rows, while kHigh rows of w are gone through. Both x
// and y are copied to where they lie close: rows of a power of two would drive each other out of the cache.
template <int kWidth, int kDeep, int kVectors>
struct Loop {
  typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(float)), may_alias));
  static constexpr int64_t kAcross = kVectors * kWidth, kWide = 128, kHigh = 32, kAhead = 8;

  // y[r, c] += sum_k x[r, k] w[k, c] for k < kNow and c < columns.
  template <int kNow>
  EASYDEL_INLINE void Step(const float* x, int64_t rows, const float* w, int64_t next, float* y, int64_t columns) {
    int64_t c = 0;
    for (; c + kAcross <= columns; c += kAcross) {
      Vector line[kNow][kVectors];
      for (int k = 0; k < kNow; ++k) {
        for (int v = 0; v < kVectors; ++v) line[k][v] = *reinterpret_cast<const Vector*>(w + k * next + c + v * kWidth);
        __builtin_prefetch(w + (k + kAhead) * next + c);
      }
      for (int64_t r = 0; r < rows; ++r) {
        Vector* to = reinterpret_cast<Vector*>(y + r * kWide + c);
        Vector sum[kVectors];
        for (int v = 0; v < kVectors; ++v) sum[v] = to[v];
        for (int k = 0; k < kNow; ++k) {
          for (int v = 0; v < kVectors; ++v) sum[v] += x[r * kNow + k] * line[k][v];
        }
        for (int v = 0; v < kVectors; ++v) to[v] = sum[v];
      }
    }
    for (; c < columns; ++c) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int k = 0; k < kNow; ++k) y[r * kWide + c] += x[r * kNow + k] * w[k * next + c];
      }
    }
  }

  EASYDEL_INLINE void Multiply(Matrix x, Matrix w, float* y, int64_t width, int64_t stride) {
    static thread_local std::vector<float> of_x, of_y;  // [depth / kDeep, rows, kDeep] and [width / kWide, rows, kWide]
    of_x.resize(x.rows * w.rows);
    of_y.assign((width + kWide - 1) / kWide * kWide * x.rows, 0.0f);
    const int64_t even = w.rows / kDeep * kDeep;
    for (int64_t i = 0; i < w.rows; ++i) {
      const int64_t deep = i < even ? kDeep : 1, start = i < even ? i / kDeep * kDeep : i;
      for (int64_t r = 0; r < x.rows; ++r) of_x[start * x.rows + r * deep + i - start] = x.data[r * x.stride + i];
    }
    for (int64_t top = 0; top < w.rows; top += kHigh) {
      const int64_t last = std::min(top + kHigh, w.rows);
      for (int64_t left = 0; left < width; left += kWide) {
        const int64_t across = std::min(kWide, width - left);
        float* to = of_y.data() + left * x.rows;
        for (int64_t i = top; i < last; i += i < even ? kDeep : 1) {
          const float *a = of_x.data() + i * x.rows, *b = w.data + i * w.stride + left;
          if (i < even) {
            Step<kDeep>(a, x.rows, b, w.stride, to, across);
          } else {
            Step<1>(a, x.rows, b, w.stride, to, across);
          }
        }
      }
    }
    for (int64_t left = 0; left < width; left += kWide) {
      const float* from = of_y.data() + left * x.rows;
      for (int64_t r = 0; r < x.rows; ++r) {
        std::copy_n(from + r * kWide, std::min(kWide, width - left), y + r * stride + left);
      }
    }
  }
};

using Function = void (*)(Matrix, Matrix, float*, int64_t, int64_t);

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void Multiply512(Matrix x, Matrix w, float* y, int64_t width, int64_t stride) {
  Loop<16, 8, 2>::Multiply(x, w, y, width, stride);  // 18 of 32 registers
}
__attribute__((target("avx2,fma"))) void Multiply256(Matrix x, Matrix w, float* y, int64_t width, int64_t stride) {
  Loop<8, 4, 2>::Multiply(x, w, y, width, stride);  // 10 of 16
}
#endif
void Multiply128(Matrix x, Matrix w, float* y, int64_t width, int64_t stride) {
  Loop<4, 4, 2>::Multiply(x, w, y, width, stride);  // 10 of 16, or of 32 on ARM
}

}  // namespace

void MultiplyFewRows(Matrix x, Matrix w, float* y, int64_t width, int64_t stride) {
  static const Function multiply = EASYDEL_WIDEST(Multiply512, Multiply256, Multiply128);
  (x.rows <= kStreamedRows ? Stream : multiply)(x, w, y, width, stride);
}

}  // namespace easydel
