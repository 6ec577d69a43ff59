// The loops of few_rows.cc, which grouped.cc takes for groups of few rows, too.

#ifndef EASYDEL_NATIVE_FEW_ROWS_H_
#define EASYDEL_NATIVE_FEW_ROWS_H_

#include <cstdint>

namespace easydel {

// Rows of a row-major matrix; `stride` floats from one to the next.
struct Matrix {
  const float* data;
  int64_t rows, stride;
};

constexpr int64_t kStreamedRows = 4;  // up to so many wait for memory, more for arithmetic

// y[r, c] = sum_i x[r, i] w[i, c] over the rows i of w, for c < width; rows of y are `stride` apart. `w` is read once, from
// where it lies.
void MultiplyFewRows(Matrix x, Matrix w, float* y, int64_t width, int64_t stride);

}  // namespace easydel

#endif  // EASYDEL_NATIVE_FEW_ROWS_H_
