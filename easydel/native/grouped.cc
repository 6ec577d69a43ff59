// Groups of rows, each times a matrix of its own (easydel/native/grouped.py): the experts of a mixture.
//
// A group's matrix is read where it lies in the stack of all, and only if the group has rows. Work is handed out in
// blocks of a group's rows by some columns, so that groups of different sizes keep all threads busy.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "few_rows.h"
#include "parallel.h"
#include "tile.h"

namespace ffi = xla::ffi;

namespace easydel {
namespace {

constexpr int64_t kRows = 384;    // of a block; a taller group is cut
constexpr int64_t kFewRows = 64;  // so few that packing the matrix would cost more than the product

struct Group {
  int64_t first, rows;
};

struct Work {
  int64_t group, row, column;
};

// Where each group's rows are; a group of a size that cannot be is cut to what is there.
std::vector<Group> Groups(const int32_t* sizes, int64_t count, int64_t rows) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t size = std::clamp<int64_t>(sizes[g], 0, rows - first);
    groups.push_back({first, size});
    first += size;
  }
  return groups;
}

std::vector<Work> Divide(const std::vector<Group>& groups, int64_t rows_each, int64_t columns) {
  std::vector<Work> work;
  for (int64_t g = 0; g < static_cast<int64_t>(groups.size()); ++g) {
    const int64_t rows = rows_each ? rows_each : groups[g].rows;
    for (int64_t row = 0; row < rows; row += kRows) {
      for (int64_t column = 0; column < columns; column += kColumns) work.push_back({g, row, column});
    }
  }
  return work;
}

// y[r] = x[r] w[g], or x[r] times w[g] transposed, for each row r of each group g; 0 for rows that are in none. The
// groups' matrices are those at a place in a stack.
ffi::Error Grouped(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> stack,
                   ffi::Buffer<ffi::S32> place, ffi::Buffer<ffi::S32> sizes, ffi::ResultBuffer<ffi::F32> y,
                   bool transposed) {
  const auto of_x = x.dimensions(), of_w = stack.dimensions();
  if (of_x.size() != 2 || of_w.size() != 4 || of_w[0] < 1 || of_x[1] != of_w[transposed ? 3 : 2] ||
      place.element_count() != 1 || static_cast<int64_t>(sizes.element_count()) != of_w[1]) {
    return ffi::Error::InvalidArgument("grouped takes [rows, in], [places, groups, in, out], a place and [groups]");
  }
  const int64_t depth = of_x[1], columns = of_w[transposed ? 2 : 3];
  const auto groups = Groups(sizes.typed_data(), of_w[1], of_x[0]);
  const auto work = Divide(groups, 0, columns);
  // Beyond the ends XLA takes the nearest, too.
  const int64_t taken = std::clamp<int64_t>(place.typed_data()[0], 0, of_w[0] - 1);
  const float *from = x.typed_data(), *matrices = stack.typed_data() + taken * of_w[1] * depth * columns;
  float* to = y->typed_data();

  ForEach(pool, work.size(), [&](int64_t number) {
    const auto [g, row, column] = work[number];
    const int64_t rows = std::min(kRows, groups[g].rows - row), across = std::min(kColumns, columns - column);
    const int64_t start = groups[g].first + row;
    const float* matrix = matrices + g * depth * columns;
    float* out = to + start * columns + column;
    if (rows <= kFewRows && !transposed) {
      MultiplyFewRows({from + start * depth, rows, depth}, {matrix + column, depth, columns}, out, across, columns);
      return;
    }
    const View b = transposed ? View{matrix + column * depth, 1, depth} : View{matrix + column, columns, 1};
    Product({from + start * depth, depth, 1}, b, depth, {out, columns, rows, across});
  });
  const int64_t used = groups.empty() ? 0 : groups.back().first + groups.back().rows;
  std::fill(to + used * columns, to + of_x[0] * columns, 0.0f);
  return ffi::Error::Success();
}

// w[g] = the sum of x[r] outer y[r] over the rows r of group g.
ffi::Error GroupedOuter(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> y,
                        ffi::Buffer<ffi::S32> sizes, ffi::ResultBuffer<ffi::F32> w) {
  const auto of_x = x.dimensions(), of_y = y.dimensions();
  if (of_x.size() != 2 || of_y.size() != 2 || of_x[0] != of_y[0]) {
    return ffi::Error::InvalidArgument("grouped_outer takes [rows, in], [rows, out] and [groups]");
  }
  const int64_t depth = of_x[1], columns = of_y[1];
  const auto groups = Groups(sizes.typed_data(), sizes.element_count(), of_x[0]);
  const auto work = Divide(groups, depth, columns);
  const float *left = x.typed_data(), *right = y.typed_data();
  float* to = w->typed_data();

  ForEach(pool, work.size(), [&](int64_t number) {
    const auto [g, row, column] = work[number];
    const int64_t rows = std::min(kRows, depth - row), across = std::min(kColumns, columns - column);
    float* out = to + (g * depth + row) * columns + column;
    if (groups[g].rows == 0) {
      for (int64_t r = 0; r < rows; ++r) std::fill(out + r * columns, out + r * columns + across, 0.0f);
      return;
    }
    const View a{left + groups[g].first * depth + row, 1, depth}, b{right + groups[g].first * columns + column, columns, 1};
    Product(a, b, groups[g].rows, {out, columns, rows, across});
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace easydel

XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_grouped, easydel::Grouped,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_grouped_outer, easydel::GroupedOuter,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
