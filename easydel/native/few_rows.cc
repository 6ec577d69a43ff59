// A few rows times a matrix, at the memory's speed (easydel/native/few_rows.py).
//
// The product costs what it costs to read the matrix once. On matrices of a few megabytes, the size of a layer's, XLA's
// product leaves a part of the memory's bandwidth unused; here each thread takes one part of the matrix: of few rows some
// of its rows, in one piece, of more rows some of its columns.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "few_rows.h"
#include "parallel.h"

namespace ffi = xla::ffi;

namespace easydel {
namespace {

constexpr int64_t kLeastPart = 128 << 10;  // bytes: handing out a smaller part costs more than it saves
constexpr int64_t kMultiple = 16;          // rows or columns of a part, so that the loops have few left over

// One of the products: its matrix [depth, width], its result, and the widths of those before it.
struct Product {
  const float* matrix;
  float* to;
  int64_t width, before;
};

// Where a part of so many rows or columns begins, and the one before it ends.
int64_t Border(int64_t size, int64_t part, int64_t parts) {
  return part == parts ? size : size / kMultiple * part / parts * kMultiple;
}

// Each part is some rows of the matrices, read from one end to the other; the parts' sums are added up at the end.
void ByRows(ffi::ThreadPool& pool, int64_t parts, Matrix x, const std::vector<Product>& products) {
  const int64_t depth = x.stride, widths = products.back().before + products.back().width;
  std::vector<float> sums((parts - 1) * x.rows * widths);  // of all parts but the first, which is summed into the results
  const auto sum_of = [&](int64_t part, const Product& one) {
    return part == 0 ? one.to : sums.data() + ((part - 1) * widths + one.before) * x.rows;
  };
  ForEach(pool, parts, [&](int64_t part) {
    const int64_t first = Border(depth, part, parts), last = Border(depth, part + 1, parts);
    for (const Product& one : products) {
      const Matrix matrix{one.matrix + first * one.width, last - first, one.width};
      MultiplyFewRows({x.data + first, x.rows, depth}, matrix, sum_of(part, one), one.width, one.width);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    for (const Product& one : products) {
      const float* sum = sum_of(part, one);
      for (int64_t c = 0; c < x.rows * one.width; ++c) one.to[c] += sum[c];
    }
  }
}

// Each part is some columns of the matrices: of many rows the sums would be as many numbers as a part of a matrix.
void ByColumns(ffi::ThreadPool& pool, int64_t parts, Matrix x, const std::vector<Product>& products) {
  ForEach(pool, parts, [&](int64_t part) {
    for (const Product& one : products) {
      const int64_t first = Border(one.width, part, parts), last = Border(one.width, part + 1, parts);
      MultiplyFewRows(x, {one.matrix + first, x.stride, one.width}, one.to + first, last - first, one.width);
    }
  });
}

// x times the matrices at `place` of stacks of matrices: several together, since each call costs the threads some
// microseconds to come together.
ffi::Error FewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> place, ffi::RemainingArgs stacks,
                   ffi::RemainingRets results) {
  if (x.dimensions().size() != 2 || place.element_count() != 1 || stacks.size() != results.size()) {
    return ffi::Error::InvalidArgument("few_rows takes [rows, in], a layer and [layers, in, out] for each result");
  }
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  std::vector<Product> products;
  int64_t bytes = 0, widths = 0;
  for (size_t number = 0; number < stacks.size(); ++number) {
    const auto stack = stacks.get<ffi::Buffer<ffi::F32>>(number);
    auto result = results.get<ffi::Buffer<ffi::F32>>(number);
    if (!stack || !result || stack->dimensions().size() != 3 || stack->dimensions()[1] != depth) {
      return ffi::Error::InvalidArgument("few_rows takes float32 matrices [layers, in, out] for x [rows, in]");
    }
    const int64_t width = stack->dimensions()[2];
    const int64_t layer = std::clamp<int64_t>(place.typed_data()[0], 0, stack->dimensions()[0] - 1);  // as XLA's slices
    products.push_back({stack->typed_data() + layer * depth * width, (*result)->typed_data(), width, widths});
    bytes += depth * width * static_cast<int64_t>(sizeof(float));
    widths += width;
  }
  const int64_t parts = std::clamp<int64_t>(bytes / kLeastPart, 1, Threads(pool));
  const Matrix all{x.typed_data(), rows, depth};
  if (rows > kStreamedRows) {
    ByColumns(pool, parts, all, products);
  } else {
    ByRows(pool, parts, all, products);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace easydel

XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_few_rows, easydel::FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());
