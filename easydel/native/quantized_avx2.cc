// quantized.h for processors with AVX2 and FMA: vectors of 8 floats.

#include "quantized.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define EASYDEL_TARGET __attribute__((target("avx2,fma")))
#define EASYDEL_OP static inline __attribute__((always_inline)) EASYDEL_TARGET

namespace easydel {
namespace {

constexpr int kRegisters = 16, kSums = 8;
using Vector = __m256;
using Integer = int16_t;  // of the inputs of integer products: codes are widened to meet them, for no sum to overflow

EASYDEL_OP Vector Splat(float value) { return _mm256_set1_ps(value); }
EASYDEL_OP Vector Fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
EASYDEL_OP Vector ToFloat(Vector sum) { return sum; }
EASYDEL_OP Vector ToFloat(__m256i sum) { return _mm256_cvtepi32_ps(sum); }
EASYDEL_OP float Total(Vector sum) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

struct OfFloats {
  using Value = Vector;
  using Sum = Vector;
  static constexpr int kLanes = 8;
  EASYDEL_OP Sum Start(const int32_t*, int64_t) { return Splat(0.0f); }
  EASYDEL_OP Sum Add(Sum sum, Value value, const float* x) { return Fma(value, _mm256_loadu_ps(x), sum); }
};

struct Int8 : OfFloats {
  static constexpr int kVectors = 1, kBytes = 8;
  EASYDEL_OP void Decode(const uint8_t* codes, Value* values) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    values[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
  }
};

struct Table : OfFloats {
  static constexpr int kVectors = 2, kBytes = 8;
  Vector low, high;  // values of codes 0-7 and 8-15
  EASYDEL_TARGET explicit Table(const float* table) : low(_mm256_loadu_ps(table)), high(_mm256_loadu_ps(table + 8)) {}
  inline __attribute__((always_inline)) EASYDEL_TARGET Value Look(__m256i code) const {
    const Vector is_high = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3 in the place of the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), is_high);
  }
  inline __attribute__((always_inline)) EASYDEL_TARGET void Decode(const uint8_t* codes, Value* values) const {
    const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    values[0] = Look(_mm256_srli_epi32(pairs, 4));
    values[1] = Look(pairs);
  }
};

struct OfIntegers {
  using Value = __m256i;
  using Sum = __m256i;
  static constexpr int kVectors = 1;  // of 16 codes
  static constexpr int kLanes = 16;
  EASYDEL_OP Sum Start(const int32_t* start, int64_t number) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + number * kSums));
  }
  EASYDEL_OP Sum Add(Sum sum, Value value, const int16_t* x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
  }
};

struct IntegerInt8 : OfIntegers {
  static constexpr int kBytes = 16;
  EASYDEL_OP void Decode(const uint8_t* codes, Value* values) {
    values[0] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }
};

struct IntegerInt4 : OfIntegers {
  static constexpr int kBytes = 8;
  EASYDEL_OP void Decode(const uint8_t* codes, Value* values) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i all = _mm_unpacklo_epi64(_mm_srli_epi16(pairs, 4), pairs);
    const __m128i eight = _mm_set1_epi8(8);
    const __m128i flipped = _mm_xor_si128(_mm_and_si128(all, _mm_set1_epi8(15)), eight);  // the code plus 8
    values[0] = _mm256_cvtepi8_epi16(_mm_sub_epi8(flipped, eight));
  }
};

#include "quantized_loop.h"

}  // namespace

const FloatKernel kFloat256{{8, 1}, {8, 2}, TimesInt8, TimesTable};
const IntegerKernel<int16_t> kInteger256{{16, 1}, {8, 2}, 0, 0, kSums, IntegerTimesInt8, IntegerTimesInt4};

}  // namespace easydel
#endif
