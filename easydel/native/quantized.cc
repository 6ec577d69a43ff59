// A few rows times quantized weights (easydel/native/quantized.py), decoded in registers.
//
// Codes are read once, where they lie, each thread taking blocks of outputs. The inputs are arranged for the kernel
// first, which is little work beside the product.

#include "quantized.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace ffi = xla::ffi;

namespace easydel {
namespace {

constexpr int64_t kLeastPart = 32 << 10;  // bytes of codes: handing out a smaller part costs more than it saves
constexpr int64_t kBlocks = 4;            // for each thread, so that one that starts late takes fewer
constexpr int64_t kGroupMultiple = 16;

bool Supports512() {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return supported;
#else
  return false;
#endif
}

bool Supports256() {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported;
#else
  return false;
#endif
}

template <class T>
struct Arranged {
  std::vector<T> data;
  int64_t padded;
};

// The layout of quantized.h.
template <class T, class From>
Arranged<T> Arrange(const From* from, int64_t rows, int64_t depth, Layout layout) {
  const int64_t unit = layout.unit(), padded = (depth + unit - 1) / unit * unit;
  std::vector<T> to(rows * padded);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t u = 0; u < padded; u += unit) {
      const int64_t count = std::min(unit, depth - u);
      for (int64_t i = 0; i < count; ++i) {
        to[r * padded + u + i % layout.vectors * layout.lanes + i / layout.vectors] = from[r * depth + u + i];
      }
    }
  }
  return {std::move(to), padded};
}

// IntegerKernel::start: minus `offset` times the inputs that a lane sums, `each` at a time.
template <class T>
std::vector<int32_t> Start(const Arranged<T>& x, int64_t rows, const Weights& w, int64_t sums, int64_t unit,
                           int64_t offset) {
  std::vector<int32_t> start(rows * w.groups * sums);
  if (offset == 0) return start;
  const int64_t each = unit / sums;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < x.padded; ++i) {
      const int64_t group = std::min(i / w.group, w.groups - 1);
      start[(r * w.groups + group) * sums + i % unit / each] -= offset * x.data[r * x.padded + i];
    }
  }
  return start;
}

// Hands out blocks of outputs.
template <class Work>
void ForOutputs(ffi::ThreadPool& pool, int64_t outputs, int64_t bytes, Work work) {
  const int64_t parts = std::clamp<int64_t>(outputs * bytes / kLeastPart, 1, Threads(pool) * kBlocks);
  const int64_t quads = (outputs + 3) / 4;
  ForEach(pool, parts, [&](int64_t part) {
    work(quads * part / parts * 4, std::min(outputs, quads * (part + 1) / parts * 4));
  });
}

// What is wrong with the shapes, or nullptr.
const char* Check(ffi::Span<const int64_t> x, ffi::AnyBuffer& codes, ffi::Span<const int64_t> scales, int64_t group) {
  const auto of_codes = codes.dimensions();
  if (x.size() != 2 || of_codes.size() != 2 || scales.size() != 2 || of_codes[0] != scales[0]) {
    return "quantized products take x [rows, in], codes [out, bytes] and scales [out, groups]";
  }
  const bool bytes = codes.element_type() == ffi::S8, nibbles = codes.element_type() == ffi::U8;
  if (!bytes && !nibbles) return "codes are int8, or two to a byte in uint8";
  if (of_codes[1] != (bytes ? x[1] : (x[1] + 1) / 2)) return "there are other codes than inputs";
  if (group < 1 || scales[1] != (x[1] + group - 1) / group) return "there are other scales than groups";
  if (scales[1] > 1 && group % kGroupMultiple != 0) return "a group has a multiple of 16 inputs";
  if (!Supports256()) return "this processor has no AVX2";
  return nullptr;
}

Weights WeightsOf(ffi::AnyBuffer& codes, ffi::Buffer<ffi::F32>& scales, int64_t group, int64_t depth) {
  const int64_t bytes = codes.dimensions()[1], groups = scales.dimensions()[1];
  if (groups == 1) group = (depth + 63) / 64 * 64;  // the only group: to the end, in whole units of any kernel
  return {static_cast<const uint8_t*>(codes.untyped_data()), scales.typed_data(), bytes, group, groups};
}

ffi::Error FloatRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::Buffer<ffi::F32> scales,
                     ffi::Buffer<ffi::F32> table, ffi::ResultBuffer<ffi::F32> y, int64_t group, bool widest) {
  if (const char* wrong = Check(x.dimensions(), codes, scales.dimensions(), group)) {
    return ffi::Error::InvalidArgument(wrong);
  }
  if (table.element_count() != 16) return ffi::Error::InvalidArgument("the table has 16 values");
#if defined(__x86_64__)
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1], outputs = codes.dimensions()[0];
  const Weights w = WeightsOf(codes, scales, group, depth);
  const bool bytes = codes.element_type() == ffi::S8;
  const bool wide = widest && Supports512() && w.group % (bytes ? kFloat512.int8 : kFloat512.table).unit() == 0;
  const FloatKernel& kernel = wide ? kFloat512 : kFloat256;
  const auto arranged = Arrange<float>(x.typed_data(), rows, depth, bytes ? kernel.int8 : kernel.table);
  const Rows<float> from{arranged.data.data(), rows, arranged.padded};
  ForOutputs(pool, outputs, w.bytes, [&, to = y->typed_data(), values = table.typed_data()](int64_t first, int64_t last) {
    const Target target{to, outputs, first, last};
    if (bytes) {
      kernel.times_int8(w, from, target);
    } else {
      kernel.times_table(w, from, target, values);
    }
  });
#endif
  return ffi::Error::Success();
}

#if defined(__x86_64__)
template <class T>
void MultiplyIntegers(ffi::ThreadPool& pool, const IntegerKernel<T>& kernel, const int8_t* x, int64_t rows,
                      int64_t depth, const Weights& w, bool bytes, float* y, int64_t outputs) {
  const Layout layout = bytes ? kernel.int8 : kernel.int4;
  const auto arranged = Arrange<T>(x, rows, depth, layout);
  const Rows<T> from{arranged.data.data(), rows, arranged.padded};
  const auto start = Start(arranged, rows, w, kernel.sums, layout.unit(), bytes ? kernel.offset8 : kernel.offset4);
  const auto times = bytes ? kernel.times_int8 : kernel.times_int4;
  ForOutputs(pool, outputs, w.bytes,
             [&](int64_t first, int64_t last) { times(w, from, start.data(), {y, outputs, first, last}); });
}
#endif

ffi::Error IntegerRows(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::AnyBuffer codes,
                       ffi::Buffer<ffi::F32> scales, ffi::ResultBuffer<ffi::F32> y, int64_t group, bool widest) {
  if (const char* wrong = Check(x.dimensions(), codes, scales.dimensions(), group)) {
    return ffi::Error::InvalidArgument(wrong);
  }
#if defined(__x86_64__)
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1], outputs = codes.dimensions()[0];
  const Weights w = WeightsOf(codes, scales, group, depth);
  const bool bytes = codes.element_type() == ffi::S8;
  if (widest && Supports512() && w.group % kInteger512.int8.unit() == 0) {
    MultiplyIntegers(pool, kInteger512, x.typed_data(), rows, depth, w, bytes, y->typed_data(), outputs);
  } else {
    MultiplyIntegers(pool, kInteger256, x.typed_data(), rows, depth, w, bytes, y->typed_data(), outputs);
  }
#endif
  return ffi::Error::Success();
}

}  // namespace
}  // namespace easydel

// Whether this processor has what the kernels need.
extern "C" int easydel_serves_quantized() { return easydel::Supports256(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_quantized_rows, easydel::FloatRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("widest"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_integer_rows, easydel::IntegerRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("widest"));
