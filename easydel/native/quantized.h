// A few rows times quantized weights: what the handlers (quantized.cc) and the loops for each kind of processor share.

#ifndef EASYDEL_NATIVE_QUANTIZED_H_
#define EASYDEL_NATIVE_QUANTIZED_H_

#include <cstdint>

namespace easydel {

// Weights [out, in]: `bytes` of codes and `groups` scales for each output, a scale for `group` inputs, of which the last
// group may have fewer.
struct Weights {
  const uint8_t* codes;
  const float* scales;
  int64_t bytes, group, groups;
};

// Inputs arranged so that those a vector of decoded weights meets lie together: per unit of `lanes * vectors` inputs,
// vector v holds inputs v, v + vectors, v + 2 vectors, ... Rows are `padded` apart, a multiple of a unit, and end in 0.
template <class T>
struct Rows {
  const T* data;
  int64_t count, padded;
};

// What a kernel wants of its inputs, and what it is.
struct Layout {
  int64_t lanes, vectors;
  constexpr int64_t unit() const { return lanes * vectors; }
};

// Columns [first, last) of y[r, o] = sum_g scale[o, g] sum_{i in g} x[r, i] w[o, i]; rows of y are `stride` apart.
struct Target {
  float* y;
  int64_t stride, first, last;
};

// Float inputs; 4-bit codes stand for the values of a table of 16.
struct FloatKernel {
  Layout int8, table;
  void (*times_int8)(const Weights&, const Rows<float>&, const Target&);
  void (*times_table)(const Weights&, const Rows<float>&, const Target&, const float* table);
};

// Inputs of 8 bits, summed in int32 within a group. A kernel that takes codes for unsigned, greater by `offset`, begins
// at minus what that adds: `start` holds, for each row and group, one number for each of its `sums` lanes of int32.
template <class T>
struct IntegerKernel {
  Layout int8, int4;
  int64_t offset8, offset4, sums;
  void (*times_int8)(const Weights&, const Rows<T>&, const int32_t* start, const Target&);
  void (*times_int4)(const Weights&, const Rows<T>&, const int32_t* start, const Target&);
};

#if defined(__x86_64__)
extern const FloatKernel kFloat256, kFloat512;
extern const IntegerKernel<int16_t> kInteger256;
extern const IntegerKernel<int8_t> kInteger512;
#endif

}  // namespace easydel

#endif  // EASYDEL_NATIVE_QUANTIZED_H_
