// A few rows times a matrix, at the memory's speed (easydel/native/few_rows.py).
//
// The product costs what it costs to read the matrix once. On matrices of a few megabytes, the size of a layer's, XLA's
// product leaves a part of the memory's bandwidth unused; here each thread streams one contiguous part of the matrix,
// and the parts' sums are added up at the end.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "few_rows.h"
#include "parallel.h"

namespace ffi = xla::ffi;

namespace easydel {
namespace {

constexpr int64_t kLeastPart = 128 << 10;  // bytes: handing out a smaller part costs more than it saves

// y = x times the matrix at `place` of a stack of matrices.
ffi::Error FewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> stack, ffi::Buffer<ffi::S32> place,
                   ffi::ResultBuffer<ffi::F32> y) {
  const auto of_x = x.dimensions(), of_stack = stack.dimensions();
  if (of_x.size() != 2 || of_stack.size() != 3 || of_x[1] != of_stack[1] || place.element_count() != 1) {
    return ffi::Error::InvalidArgument("few_rows takes [rows, in], [layers, in, out] and a layer");
  }
  const int64_t rows = of_x[0], depth = of_stack[1], width = of_stack[2];
  const int64_t layer = std::clamp<int64_t>(place.typed_data()[0], 0, of_stack[0] - 1);  // as XLA's slices do
  const int64_t bytes = depth * width * static_cast<int64_t>(sizeof(float));
  const int64_t parts = std::clamp<int64_t>(bytes / kLeastPart, 1, Threads(pool));
  const float *from = x.typed_data(), *matrix = stack.typed_data() + layer * depth * width;
  float* to = y->typed_data();
  std::vector<float> sums((parts - 1) * rows * width);  // of all parts but the first, which is summed into y

  ForEach(pool, parts, [&](int64_t part) {
    const int64_t groups = depth / kGroup;
    const int64_t first = groups * part / parts * kGroup;
    const int64_t last = part + 1 == parts ? depth : groups * (part + 1) / parts * kGroup;
    float* sum = part == 0 ? to : sums.data() + (part - 1) * rows * width;
    MultiplyFewRows({from + first, rows, depth}, {matrix + first * width, last - first, width}, sum, width, width);
  });
  for (int64_t part = 1; part < parts; ++part) {
    const float* sum = sums.data() + (part - 1) * rows * width;
    for (int64_t c = 0; c < rows * width; ++c) to[c] += sum[c];
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace easydel

XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_few_rows, easydel::FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
