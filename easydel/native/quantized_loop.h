// The loops of quantized_avx2.cc and quantized_avx512.cc, each of which includes this file once, after what it is made
// of: EASYDEL_TARGET, kRegisters, Vector with Load, Splat, Fma and Total, and IntVector with LoadInt and ToFloat.
//
// Each output of each row is summed in the same order whatever else is computed beside it: a result depends neither on
// the number of threads nor on the other rows.

constexpr int64_t kAhead = 16 << 10;  // bytes between the codes in work and those that are fetched from memory

#define EASYDEL_STEP static inline __attribute__((always_inline)) EASYDEL_TARGET

// As many outputs at a time as registers hold a running and a whole sum of, for each row.
constexpr int Across(int rows) { return rows * 16 <= kRegisters ? 4 : rows * 8 <= kRegisters ? 2 : 1; }

// One unit of a row's codes times the rows: decoded once, used for all.
template <class Decoder, int kRows, class X, class Sum>
EASYDEL_STEP void Unit(const Decoder& decoder, const uint8_t* codes, const X* x, int64_t padded, Sum* sums) {
  typename Decoder::Value values[Decoder::kVectors];
  decoder.Decode(codes, values);
  for (int v = 0; v < Decoder::kVectors; ++v) {
    for (int r = 0; r < kRows; ++r) sums[r] = decoder.Add(sums[r], values[v], x + r * padded + v * Decoder::kLanes);
  }
}

// `kOutputs` outputs, from `output` on, of `kRows` rows.
template <class Decoder, int kRows, int kOutputs, class X>
EASYDEL_STEP void Outputs(const Decoder& decoder, const Weights& w, const X* x, int64_t padded, const int32_t* start,
                          int64_t output, float* y, int64_t stride) {
  constexpr int64_t kUnit = Decoder::kLanes * Decoder::kVectors;
  const int64_t whole = w.bytes / Decoder::kBytes, rest = w.bytes % Decoder::kBytes;
  const uint8_t* codes = w.codes + output * w.bytes;
  const float* scales = w.scales + output * w.groups;
  const int64_t block = kOutputs * w.bytes, ahead = block * (block < kAhead ? kAhead / block : 1);
  Vector total[kOutputs][kRows];
  for (int o = 0; o < kOutputs; ++o) {
    for (int r = 0; r < kRows; ++r) total[o][r] = Splat(0.0f);
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    typename Decoder::Sum sums[kOutputs][kRows];
    for (int o = 0; o < kOutputs; ++o) {
      for (int r = 0; r < kRows; ++r) sums[o][r] = Decoder::Start(start, r * w.groups + g);
    }
    const int64_t first = g * w.group / kUnit, end = first + w.group / kUnit;
    const int64_t last = end < whole ? end : whole;
    for (int o = 0; o < kOutputs; ++o) {  // of outputs to come: rows end before the processor sees that they go on
      const uint8_t* next = codes + ahead + o * w.bytes;
      for (int64_t b = first * Decoder::kBytes; b < last * Decoder::kBytes; b += 64) __builtin_prefetch(next + b);
    }
    for (int64_t u = first; u < last; ++u) {
      for (int o = 0; o < kOutputs; ++o) {
        Unit<Decoder, kRows>(decoder, codes + o * w.bytes + u * Decoder::kBytes, x + u * kUnit, padded, sums[o]);
      }
    }
    if (rest > 0 && g + 1 == w.groups) {  // codes that do not fill a unit; the inputs beyond are 0
      for (int o = 0; o < kOutputs; ++o) {
        uint8_t filled[Decoder::kBytes] = {};
        for (int64_t i = 0; i < rest; ++i) filled[i] = codes[o * w.bytes + whole * Decoder::kBytes + i];
        Unit<Decoder, kRows>(decoder, filled, x + whole * kUnit, padded, sums[o]);
      }
    }
    for (int o = 0; o < kOutputs; ++o) {
      const Vector scale = Splat(scales[o * w.groups + g]);
      for (int r = 0; r < kRows; ++r) total[o][r] = Fma(scale, ToFloat(sums[o][r]), total[o][r]);
    }
  }
  for (int o = 0; o < kOutputs; ++o) {
    for (int r = 0; r < kRows; ++r) y[r * stride + output + o] = Total(total[o][r]);
  }
}

// Columns [first, last) of kRows rows.
template <class Decoder, int kRows, class X>
EASYDEL_STEP void Columns(const Decoder& decoder, const Weights& w, const X* x, int64_t padded, const int32_t* start,
                          float* y, int64_t stride, int64_t first, int64_t last) {
  constexpr int kOutputs = Across(kRows);
  int64_t o = first;
  for (; o + kOutputs <= last; o += kOutputs) {
    Outputs<Decoder, kRows, kOutputs>(decoder, w, x, padded, start, o, y, stride);
  }
  for (; o < last; ++o) Outputs<Decoder, kRows, 1>(decoder, w, x, padded, start, o, y, stride);
}

// All rows, four at a time; few columns at a time, so that their codes are still in the cache for the next four rows.
template <class Decoder, class X>
EASYDEL_TARGET void Multiply(const Decoder& decoder, const Weights& w, const Rows<X>& x, const int32_t* start,
                             const Target& to) {
  constexpr int64_t kColumns = 4;
  for (int64_t first = to.first, step = x.count > 4 ? kColumns : to.last; first < to.last; first += step) {
    const int64_t last = first + step < to.last ? first + step : to.last;
    for (int64_t r = 0; r < x.count; r += 4) {
      const X* rows = x.data + r * x.padded;
      const int32_t* from = start == nullptr ? nullptr : start + r * w.groups * kSums;
      float* y = to.y + r * to.stride;
      switch (x.count - r) {
        case 1: Columns<Decoder, 1>(decoder, w, rows, x.padded, from, y, to.stride, first, last); break;
        case 2: Columns<Decoder, 2>(decoder, w, rows, x.padded, from, y, to.stride, first, last); break;
        case 3: Columns<Decoder, 3>(decoder, w, rows, x.padded, from, y, to.stride, first, last); break;
        default: Columns<Decoder, 4>(decoder, w, rows, x.padded, from, y, to.stride, first, last);
      }
    }
  }
}

void TimesInt8(const Weights& w, const Rows<float>& x, const Target& to) { Multiply(Int8(), w, x, nullptr, to); }
void TimesTable(const Weights& w, const Rows<float>& x, const Target& to, const float* table) {
  Multiply(Table(table), w, x, nullptr, to);
}
void IntegerTimesInt8(const Weights& w, const Rows<Integer>& x, const int32_t* start, const Target& to) {
  Multiply(IntegerInt8(), w, x, start, to);
}
void IntegerTimesInt4(const Weights& w, const Rows<Integer>& x, const int32_t* start, const Target& to) {
  Multiply(IntegerInt4(), w, x, start, to);
}
