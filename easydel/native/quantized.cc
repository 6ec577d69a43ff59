// A few rows times quantized weights (easydel/native/quantized.py), decoded in registers.
//
// Weights lie in a stack. Rows come in groups, one for each of so many matrices of it, from `first` on; a matrix whose
// group is empty is not read. A plain product is one group of all rows, a mixture's experts are many.
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

// The rows of a matrix of the stack.
struct Group {
  int64_t matrix, row, rows;
};

// A stack of weights, and which rows are whose; rows from `used` on are nobody's.
struct Stack {
  Weights first;
  int64_t outputs, used;
  bool bytes;
  std::vector<Group> groups;

  Weights At(int64_t matrix) const {
    Weights w = first;
    w.codes += matrix * outputs * w.bytes;
    w.scales += matrix * outputs * w.groups;
    return w;
  }
};

// What is wrong with the shapes, or nullptr.
const char* Check(ffi::Span<const int64_t> x, ffi::AnyBuffer& codes, ffi::Span<const int64_t> scales, int64_t group) {
  const auto of_codes = codes.dimensions();
  if (x.size() != 2 || of_codes.size() != 3 || scales.size() != 3 || of_codes[0] != scales[0] ||
      of_codes[1] != scales[1]) {
    return "quantized products take x [rows, in], codes [stack, out, bytes] and scales [stack, out, groups]";
  }
  const bool bytes = codes.element_type() == ffi::S8, nibbles = codes.element_type() == ffi::U8;
  if (!bytes && !nibbles) return "codes are int8, or two to a byte in uint8";
  if (of_codes[2] != (bytes ? x[1] : (x[1] + 1) / 2)) return "there are other codes than inputs";
  if (group < 1 || scales[2] != (x[1] + group - 1) / group) return "there are other scales than groups";
  if (scales[2] > 1 && group % kGroupMultiple != 0) return "a group has a multiple of 16 inputs";
  if (!Supports256()) return "this processor has no AVX2";
  return nullptr;
}

// A matrix or a size that cannot be is cut to what is there.
Stack StackOf(ffi::AnyBuffer& codes, ffi::Buffer<ffi::F32>& scales, int64_t group, ffi::Span<const int64_t> of_x,
              ffi::Buffer<ffi::S32>& first, ffi::Buffer<ffi::S32>& sizes) {
  const int64_t bytes = codes.dimensions()[2], groups = scales.dimensions()[2], matrices = codes.dimensions()[0];
  if (groups == 1) group = (of_x[1] + 63) / 64 * 64;  // the only group: to the end, in whole units of any kernel
  Stack stack{{static_cast<const uint8_t*>(codes.untyped_data()), scales.typed_data(), bytes, group, groups},
              codes.dimensions()[1], 0, codes.element_type() == ffi::S8, {}};
  const int64_t count = sizes.element_count();
  const int64_t start = std::clamp<int64_t>(first.typed_data()[0], 0, std::max<int64_t>(0, matrices - count));
  for (int64_t g = 0; g < std::min(count, matrices); ++g) {
    const int64_t rows = std::clamp<int64_t>(sizes.typed_data()[g], 0, of_x[0] - stack.used);
    if (rows > 0) stack.groups.push_back({start + g, stack.used, rows});
    stack.used += rows;
  }
  return stack;
}

// Hands out blocks of outputs of each group's matrix; rows that are nobody's are 0.
template <class Work>
void ForOutputs(ffi::ThreadPool& pool, const Stack& stack, int64_t rows, float* y, Work work) {
  const int64_t outputs = stack.outputs, groups = stack.groups.size();
  std::fill(y + stack.used * outputs, y + rows * outputs, 0.0f);
  if (groups == 0) return;
  const int64_t most = std::max<int64_t>(1, Threads(pool) * kBlocks / groups);
  const int64_t parts = std::clamp<int64_t>(outputs * stack.first.bytes / kLeastPart, 1, most);
  const int64_t quads = (outputs + 3) / 4;
  ForEach(pool, groups * parts, [&](int64_t number) {
    const Group& group = stack.groups[number / parts];
    const int64_t part = number % parts, first = quads * part / parts * 4;
    work(group, stack.At(group.matrix),
         Target{y + group.row * outputs, outputs, first, std::min(outputs, quads * (part + 1) / parts * 4)});
  });
}

ffi::Error FloatRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::Buffer<ffi::F32> scales,
                     ffi::Buffer<ffi::F32> table, ffi::Buffer<ffi::S32> first, ffi::Buffer<ffi::S32> sizes,
                     ffi::ResultBuffer<ffi::F32> y, int64_t group, bool widest) {
  if (const char* wrong = Check(x.dimensions(), codes, scales.dimensions(), group)) {
    return ffi::Error::InvalidArgument(wrong);
  }
  if (table.element_count() != 16) return ffi::Error::InvalidArgument("the table has 16 values");
#if defined(__x86_64__)
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  const Stack stack = StackOf(codes, scales, group, x.dimensions(), first, sizes);
  const Layout wide = stack.bytes ? kFloat512.int8 : kFloat512.table;
  const FloatKernel& kernel = widest && Supports512() && stack.first.group % wide.unit() == 0 ? kFloat512 : kFloat256;
  const auto arranged = Arrange<float>(x.typed_data(), rows, depth, stack.bytes ? kernel.int8 : kernel.table);
  ForOutputs(pool, stack, rows, y->typed_data(), [&](const Group& of, const Weights& w, const Target& target) {
    const Rows<float> from{arranged.data.data() + of.row * arranged.padded, of.rows, arranged.padded};
    if (stack.bytes) {
      kernel.times_int8(w, from, target);
    } else {
      kernel.times_table(w, from, target, table.typed_data());
    }
  });
#endif
  return ffi::Error::Success();
}

#if defined(__x86_64__)
template <class T>
void MultiplyIntegers(ffi::ThreadPool& pool, const IntegerKernel<T>& kernel, const int8_t* x, int64_t rows,
                      int64_t depth, const Stack& stack, float* y) {
  const Layout layout = stack.bytes ? kernel.int8 : kernel.int4;
  const auto arranged = Arrange<T>(x, rows, depth, layout);
  const int64_t offset = stack.bytes ? kernel.offset8 : kernel.offset4;
  const auto start = Start(arranged, rows, stack.first, kernel.sums, layout.unit(), offset);
  const auto times = stack.bytes ? kernel.times_int8 : kernel.times_int4;
  ForOutputs(pool, stack, rows, y, [&](const Group& of, const Weights& w, const Target& target) {
    const Rows<T> from{arranged.data.data() + of.row * arranged.padded, of.rows, arranged.padded};
    times(w, from, start.data() + of.row * w.groups * kernel.sums, target);
  });
}
#endif

ffi::Error IntegerRows(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::AnyBuffer codes,
                       ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::S32> first, ffi::Buffer<ffi::S32> sizes,
                       ffi::ResultBuffer<ffi::F32> y, int64_t group, bool widest) {
  if (const char* wrong = Check(x.dimensions(), codes, scales.dimensions(), group)) {
    return ffi::Error::InvalidArgument(wrong);
  }
#if defined(__x86_64__)
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  const Stack stack = StackOf(codes, scales, group, x.dimensions(), first, sizes);
  if (widest && Supports512() && stack.first.group % kInteger512.int8.unit() == 0) {
    MultiplyIntegers(pool, kInteger512, x.typed_data(), rows, depth, stack, y->typed_data());
  } else {
    MultiplyIntegers(pool, kInteger256, x.typed_data(), rows, depth, stack, y->typed_data());
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
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("widest"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_integer_rows, easydel::IntegerRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("widest"));
