// A few rows times the rows of a table, as a head tied to the embedding needs it (easydel/native/few_dots.py).
//
// y[r, v] = sum_k x[r, k] table[v, k] costs what it costs to read the table once.

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "processors.h"

namespace ffi = xla::ffi;

namespace easydel {
namespace {

constexpr int64_t kLeastPart = 128 << 10;  // bytes: handing out a smaller part costs more than it saves
constexpr int64_t kRuns = 8;

struct Table {
  const float *x, *table;
  float* y;
  int64_t rows, depth, length;  // x is [rows, depth], the table [length, depth], y [rows, length]
};

template <int kWidth>
struct Dots {
  typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(float)), may_alias));
  typedef float Half __attribute__((vector_size(kWidth / 2 * sizeof(float)), aligned(sizeof(float)), may_alias));

  EASYDEL_INLINE float Sum(const Vector& sum) {
    const Half* halves = reinterpret_cast<const Half*>(&sum);
    const Half half = halves[0] + halves[1];
    const float* lanes = reinterpret_cast<const float*>(&half);
    float total = 0.0f;
    for (int lane = 0; lane < kWidth / 2; lane += 2) total += lanes[lane] + lanes[lane + 1];
    return total;
  }

  // The products of x's `row` with kLines lines of the table from `line` on, `apart` lines apart.
  template <int kLines>
  EASYDEL_INLINE void Tile(const Table& of, int64_t row, int64_t line, int64_t apart) {
    const float *x = of.x + row * of.depth, *w = of.table + line * of.depth;
    const int64_t next = apart * of.depth;
    Vector sum[kLines] = {};
    int64_t k = 0;
    for (; k + kWidth <= of.depth; k += kWidth) {
      const Vector a = *reinterpret_cast<const Vector*>(x + k);
      for (int v = 0; v < kLines; ++v) sum[v] += a * *reinterpret_cast<const Vector*>(w + v * next + k);
    }
    for (int v = 0; v < kLines; ++v) {
      float total = Sum(sum[v]);
      for (int64_t rest = k; rest < of.depth; ++rest) total += x[rest] * w[v * next + rest];
      of.y[row * of.length + line + v * apart] = total;
    }
  }

  // The table is read in kRuns places at once, each a long run of which the processor fetches what comes next.
  EASYDEL_INLINE void Stream(const Table& of, int64_t first, int64_t last) {
    const int64_t run = (last - first) / kRuns;
    for (int64_t i = 0; i < run; ++i) {
      for (int64_t row = 0; row < of.rows; ++row) Tile<kRuns>(of, row, first + i, run);
    }
    for (int64_t line = first + run * kRuns; line < last; ++line) {
      for (int64_t row = 0; row < of.rows; ++row) Tile<1>(of, row, line, 1);
    }
  }
};

using Function = void (*)(const Table&, int64_t, int64_t);

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void Stream512(const Table& of, int64_t first, int64_t last) {
  Dots<16>::Stream(of, first, last);
}
__attribute__((target("avx2,fma"))) void Stream256(const Table& of, int64_t first, int64_t last) {
  Dots<8>::Stream(of, first, last);
}
#endif
void Stream128(const Table& of, int64_t first, int64_t last) { Dots<4>::Stream(of, first, last); }

ffi::Error FewDots(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> table,
                   ffi::ResultBuffer<ffi::F32> y) {
  const auto of_x = x.dimensions(), of_table = table.dimensions();
  if (of_x.size() != 2 || of_table.size() != 2 || of_x[1] != of_table[1]) {
    return ffi::Error::InvalidArgument("few_dots takes [rows, in] and a table [length, in]");
  }
  static const Function stream = EASYDEL_WIDEST(Stream512, Stream256, Stream128);
  const Table of{x.typed_data(), table.typed_data(), y->typed_data(), of_x[0], of_x[1], of_table[0]};
  const int64_t bytes = of.length * of.depth * static_cast<int64_t>(sizeof(float));
  const int64_t parts = std::clamp<int64_t>(bytes / kLeastPart, 1, Threads(pool));
  ForEach(pool, parts, [&](int64_t part) { stream(of, of.length * part / parts, of.length * (part + 1) / parts); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace easydel

XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_few_dots, easydel::FewDots,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
