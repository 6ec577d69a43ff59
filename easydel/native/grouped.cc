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

constexpr int64_t kLeastRows = 64, kMostRows = 384;  // of a block; a taller group is cut
constexpr int64_t kMultiple = 32;                    // of rows, where one is cut: the last block alone has some over
constexpr int64_t kFewRows = 48;                     // so few that packing the matrix would cost more than the product

struct Group {
  int64_t first, rows;
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

// The most rows and columns of a block: as many as leave one to each thread, since what is packed then serves more.
struct Most {
  int64_t rows, columns;

  Most(int64_t numbers, int64_t threads) {
    const int64_t each = numbers / threads;
    columns = each < MostColumns() * kLeastRows ? kColumns : MostColumns();
    rows = std::clamp(each / columns, kLeastRows, kMostRows);
  }
};

// Adds the blocks of a group's product to the jobs.
void Divide(const Job& whole, Most most, std::vector<Job>& jobs) {
  const auto& [a, b, depth, c] = whole;
  const int64_t parts = (c.rows + most.rows - 1) / most.rows;
  for (int64_t part = 0, row = 0; part < parts; ++part) {
    const int64_t last = part + 1 == parts ? c.rows : c.rows * (part + 1) / parts / kMultiple * kMultiple;
    for (int64_t column = 0; column < c.columns; column += most.columns) {
      const int64_t across = std::min(most.columns, c.columns - column);
      const View rows{a.data + row * a.row, a.row, a.column}, columns{b.data + column * b.column, b.row, b.column};
      jobs.push_back({rows, columns, depth, {c.data + row * c.stride + column, c.stride, last - row, across}});
    }
    row = last;
  }
}

// Does the jobs, and calls rest(0) ... rest(others - 1), on all threads.
template <class Rest>
void DoAll(ffi::ThreadPool& pool, const std::vector<Job>& jobs, int64_t others, Rest rest) {
  const std::vector<Run> runs = Runs(jobs.size(), Threads(pool));
  const int64_t count = runs.size();
  ForEach(pool, count + others, [&](int64_t number) {
    if (number < count) {
      Multiply(jobs.data() + runs[number].first, runs[number].count);
    } else {
      rest(number - count);
    }
  });
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
  // Beyond the ends XLA takes the nearest, too.
  const int64_t taken = std::clamp<int64_t>(place.typed_data()[0], 0, of_w[0] - 1);
  const float *from = x.typed_data(), *matrix = stack.typed_data() + taken * of_w[1] * depth * columns;
  float* to = y->typed_data();

  const Most most(of_x[0] * columns, Threads(pool));
  std::vector<Job> many, few;
  for (const Group& group : groups) {
    const View a{from + group.first * depth, depth, 1}, b{matrix, transposed ? 1 : columns, transposed ? depth : 1};
    const Block c{to + group.first * columns, columns, group.rows, columns};
    const bool is_small = group.rows <= kFewRows && !transposed;
    Divide({a, b, depth, c}, most, is_small ? few : many);
    matrix += depth * columns;
  }
  DoAll(pool, many, few.size(), [&](int64_t number) {
    const auto& [a, b, deep, c] = few[number];
    MultiplyFewRows({a.data, c.rows, deep}, {b.data, deep, b.row}, c.data, c.columns, c.stride);
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
  const int64_t rows = of_x[1], columns = of_y[1];
  const float *left = x.typed_data(), *right = y.typed_data();
  float* to = w->typed_data();

  const Most most(w->element_count(), Threads(pool));
  std::vector<Job> jobs;
  std::vector<float*> nothing;  // matrices of groups without rows
  for (const Group& group : Groups(sizes.typed_data(), sizes.element_count(), of_x[0])) {
    const View a{left + group.first * rows, 1, rows}, b{right + group.first * columns, columns, 1};
    if (group.rows > 0) {
      Divide({a, b, group.rows, {to, columns, rows, columns}}, most, jobs);
    } else {
      nothing.push_back(to);
    }
    to += rows * columns;
  }
  DoAll(pool, jobs, nothing.size(), [&](int64_t number) { std::fill_n(nothing[number], rows * columns, 0.0f); });
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
