// quantized.h for processors with AVX-512 and its byte dot products (VNNI): vectors of 16 floats, or of 64 codes.

#include "quantized.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define EASYDEL_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))
#define EASYDEL_OP static inline __attribute__((always_inline)) EASYDEL_TARGET

namespace easydel {
namespace {

constexpr int kRegisters = 32, kSums = 16;
using Vector = __m512;
using Integer = int8_t;

EASYDEL_OP Vector Splat(float value) { return _mm512_set1_ps(value); }
EASYDEL_OP Vector Fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
EASYDEL_OP Vector ToFloat(Vector sum) { return sum; }
EASYDEL_OP Vector ToFloat(__m512i sum) { return _mm512_cvtepi32_ps(sum); }
EASYDEL_OP float Total(Vector sum) { return _mm512_reduce_add_ps(sum); }

struct OfFloats {
  using Value = Vector;
  using Sum = Vector;
  static constexpr int kLanes = 16, kBytes = 16;
  EASYDEL_OP Sum Start(const int32_t*, int64_t) { return Splat(0.0f); }
  EASYDEL_OP Sum Add(Sum sum, Value value, const float* x) { return Fma(value, _mm512_loadu_ps(x), sum); }
};

struct Int8 : OfFloats {
  static constexpr int kVectors = 1;
  EASYDEL_OP void Decode(const uint8_t* codes, Value* values) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    values[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
  }
};

struct Table : OfFloats {
  static constexpr int kVectors = 2;
  Vector table;
  EASYDEL_TARGET explicit Table(const float* table) : table(_mm512_loadu_ps(table)) {}
  inline __attribute__((always_inline)) EASYDEL_TARGET void Decode(const uint8_t* codes, Value* values) const {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    values[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
    values[1] = _mm512_permutexvar_ps(pairs, table);  // which looks at the lowest four bits
  }
};

struct OfIntegers {
  using Value = __m512i;
  using Sum = __m512i;
  static constexpr int kVectors = 1;  // of 64 codes
  static constexpr int kLanes = 64;
  EASYDEL_OP Sum Start(const int32_t* start, int64_t number) { return _mm512_loadu_si512(start + number * kSums); }
  EASYDEL_OP Sum Add(Sum sum, Value value, const int8_t* x) {  // of four products to a lane, without saturation
    return _mm512_dpbusd_epi32(sum, value, _mm512_loadu_si512(x));
  }
};

struct IntegerInt8 : OfIntegers {
  static constexpr int kBytes = 64, kOffset = 128;
  EASYDEL_OP void Decode(const uint8_t* codes, Value* values) {
    values[0] = _mm512_xor_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(static_cast<char>(kOffset)));
  }
};

struct IntegerInt4 : OfIntegers {
  static constexpr int kBytes = 32, kOffset = 8;
  EASYDEL_OP void Decode(const uint8_t* codes, Value* values) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_srli_epi16(pairs, 4)), pairs, 1);
    values[0] = _mm512_xor_si512(_mm512_and_si512(both, _mm512_set1_epi8(15)), _mm512_set1_epi8(kOffset));
  }
};

#include "quantized_loop.h"

}  // namespace

const FloatKernel kFloat512{{16, 1}, {16, 2}, TimesInt8, TimesTable};
const IntegerKernel<int8_t> kInteger512{
    {64, 1}, {32, 2}, IntegerInt8::kOffset, IntegerInt4::kOffset, kSums, IntegerTimesInt8, IntegerTimesInt4};

}  // namespace easydel
#endif
