// Quantized weights back to floats (easydel/native/quantized.py), for products of many rows.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "processors.h"

namespace ffi = xla::ffi;

namespace easydel {
namespace {

constexpr int64_t kOutputs = 16;  // of a block of work

// The values of both codes of each byte.
struct Pairs {
  float values[256][2];
  explicit Pairs(const float* table) {
    for (int byte = 0; byte < 256; ++byte) {
      values[byte][0] = table[byte >> 4];
      values[byte][1] = table[byte & 15];
    }
  }
};

EASYDEL_FOR_EACH_PROCESSOR
static void ScaleBytes(const int8_t* __restrict codes, float scale, float* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = scale * codes[i];
}

EASYDEL_FOR_EACH_PROCESSOR
static void ScaleNibbles(const uint8_t* __restrict codes, const Pairs& pairs, float scale, float* __restrict to,
                         int64_t count) {
  for (int64_t b = 0; b < count / 2; ++b) std::memcpy(to + 2 * b, pairs.values[codes[b]], 2 * sizeof(float));
  if (count % 2) to[count - 1] = pairs.values[codes[count / 2]][0];
  for (int64_t i = 0; i < count; ++i) to[i] *= scale;
}

ffi::Error Dequantize(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::Buffer<ffi::F32> scales,
                      ffi::Buffer<ffi::F32> table, ffi::AnyBuffer, ffi::ResultBuffer<ffi::F32> weights,
                      int64_t group) {
  const auto of_codes = codes.dimensions(), of_weights = weights->dimensions();
  const bool bytes = codes.element_type() == ffi::S8;
  if (of_codes.size() != 2 || of_weights.size() != 2 || of_codes[0] != of_weights[0] || group < 1 || group % 2 ||
      of_codes[1] != (bytes ? of_weights[1] : (of_weights[1] + 1) / 2) || table.element_count() != 16 ||
      (!bytes && codes.element_type() != ffi::U8)) {
    return ffi::Error::InvalidArgument("dequantize takes codes [out, bytes] for weights [out, in], in even groups");
  }
  const int64_t outputs = of_weights[0], depth = of_weights[1], width = of_codes[1];
  const int64_t groups = (depth + group - 1) / group;
  if (static_cast<int64_t>(scales.element_count()) != outputs * groups) {
    return ffi::Error::InvalidArgument("there are other scales than groups");
  }
  const Pairs pairs(table.typed_data());
  const auto* from = static_cast<const uint8_t*>(codes.untyped_data());
  const float* scale = scales.typed_data();
  float* to = weights->typed_data();
  ForEach(pool, (outputs + kOutputs - 1) / kOutputs, [=, &pairs](int64_t block) {
    for (int64_t o = block * kOutputs; o < std::min(outputs, (block + 1) * kOutputs); ++o) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * group, count = std::min(group, depth - first);
        float* out = to + o * depth + first;
        if (bytes) {
          ScaleBytes(reinterpret_cast<const int8_t*>(from + o * width + first), scale[o * groups + g], out, count);
        } else {
          ScaleNibbles(from + o * width + first / 2, pairs, scale[o * groups + g], out, count);
        }
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace easydel

XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_dequantize, easydel::Dequantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()  // not read: what must be there first
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group_size"));
