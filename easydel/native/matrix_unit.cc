// float32 products on Intel's matrix unit (AMX), which multiplies bfloat16, sixteen times as fast as AVX-512 float32.
//
// A float32 of 24 bits is the sum of three bfloat16 of 8. Of the nine products of two such sums the six largest are
// added up in float32; those left out are below a rounding of float32: Henry, Tang and Heinecke, "Leveraging the
// bfloat16 artificial intelligence datatype for higher-precision computations" (ARITH 2019), and what XLA does on TPUs
// for the highest precision. The unit takes numbers below 1e-38 for 0, so that those below 1e-33 lose digits; a sum
// with an infinite term is not a number.

#include "matrix_unit.h"

#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "matrix_unit_parts.h"

namespace easydel {
namespace {

constexpr int64_t kBytes = kStep * sizeof(Half);  // of a register's row

// Registers: c in 0 to 3, two of a in 4 and 5, two of b in 6 and 7. With kTall 1 there are 16 rows, in 0, 1 and 4.
template <int kTall>
EASYDEL_UNIT_INLINE void LoadRows(const Half* a) {
  _tile_loadd(4, a, kBytes);
  if (kTall == 2) _tile_loadd(5, a + kRegister, kBytes);
}

EASYDEL_UNIT_INLINE void LoadColumns(const Half* b) {
  _tile_loadd(6, b, kBytes);
  _tile_loadd(7, b + kRegister, kBytes);
}

template <int kTall>
EASYDEL_UNIT_INLINE void Add() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (kTall == 2) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <int kTall>
EASYDEL_UNIT_INLINE void Begin(const float* c, int64_t stride, bool add) {
  if (!add) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, c, stride * sizeof(float));
  _tile_loadd(1, c + kSide, stride * sizeof(float));
  if (kTall == 2) {
    _tile_loadd(2, c + kSide * stride, stride * sizeof(float));
    _tile_loadd(3, c + kSide * stride + kSide, stride * sizeof(float));
  }
}

template <int kTall>
EASYDEL_UNIT_INLINE void End(float* c, int64_t stride) {
  _tile_stored(0, c, stride * sizeof(float));
  _tile_stored(1, c + kSide, stride * sizeof(float));
  if (kTall == 2) {
    _tile_stored(2, c + kSide * stride, stride * sizeof(float));
    _tile_stored(3, c + kSide * stride + kSide, stride * sizeof(float));
  }
}

// c = a b for 32 columns and 16 or 32 rows, of packed a and b; added to what is there, or in its place.
template <int kTall>
EASYDEL_UNIT_INLINE void Square(const Half* a, const Half* b, int64_t steps, float* c, int64_t stride, bool add,
                                Meanwhile& meanwhile) {
  Begin<kTall>(c, stride, add);
  for (int64_t s = 0; s < steps; ++s, a += kPairs, b += kPairs) {
    meanwhile.Step();
    LoadRows<kTall>(a), LoadColumns(b + 2 * kPair), Add<kTall>();
    LoadColumns(b + kPair), Add<kTall>();
    LoadRows<kTall>(a + kPair), Add<kTall>();
    LoadColumns(b), Add<kTall>();
    LoadRows<kTall>(a + 2 * kPair), Add<kTall>();
    LoadRows<kTall>(a), Add<kTall>();  // the largest parts of both
  }
  End<kTall>(c, stride);
}

// The part of `from`, [32, 32], that is in c; added to what is there, or in its place.
EASYDEL_UNIT_INLINE void Keep(const float* from, Block c, bool add) {
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t j = 0; j < c.columns; j += kSide) {
      float* to = c.data + r * c.stride + j;
      const __mmask16 there = First(c.columns - j);
      __m512 sum = _mm512_load_ps(from + r * kSquare + j);
      if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, to));
      _mm512_mask_storeu_ps(to, there, sum);
    }
  }
}

// At most 32 rows of c, of packed a and b.
EASYDEL_UNIT_INLINE void Row(const Half* a, const Half* b, int64_t steps, Block c, bool add, Meanwhile& meanwhile) {
  alignas(64) float part[kSquare * kSquare];
  for (int64_t j = 0; j < c.columns; j += kSquare, b += steps * kPairs) {
    const Block square{c.data + j, c.stride, c.rows, std::min(kSquare, c.columns - j)};
    const bool whole = c.rows % kSide == 0 && square.columns == kSquare;
    float* to = whole ? square.data : part;
    const int64_t stride = whole ? c.stride : kSquare;
    if (c.rows > kSide) {
      Square<2>(a, b, steps, to, stride, add && whole, meanwhile);
    } else {
      Square<1>(a, b, steps, to, stride, add && whole, meanwhile);
    }
    if (!whole) Keep(part, square, add);
  }
}

struct alignas(64) Shapes {  // of the registers, as the unit is told them
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((EASYDEL_FOR_MATRIX_UNIT)) void Compute(Panel panel) {
  alignas(64) static thread_local Half packed_a[kDeep * kSquare * kParts];
  alignas(64) static thread_local Half packed_b[2][kDeep * kUnitColumns * kParts];
  const Shapes shapes;
  _tile_loadconfig(&shapes);
  Half *now = packed_b[0], *next = packed_b[1];
  for (Packer first(panel, now); first.Left() > 0;) first.Pack();
  for (; panel.job != panel.end; panel = panel.Next(), std::swap(now, next)) {
    const auto& [a, b, depth, c] = *panel.job;
    const int64_t down = (c.rows + kSquare - 1) / kSquare, steps = panel.Steps();
    Meanwhile meanwhile(Packer(panel.Next(), next), down * panel.Across() * steps);
    for (int64_t i = 0; i < c.rows; i += kSquare) {
      const int64_t tall = std::min(kSquare, c.rows - i);
      PackRows({a.data + i * a.row + panel.k * a.column, a.row, a.column}, tall, panel.Depth(), packed_a);
      Row(packed_a, now, steps, {c.data + i * c.stride, c.stride, tall, c.columns}, panel.k > 0, meanwhile);
    }
  }
  _tile_release();
}

// The system gives the unit's registers, 8 KB a thread, to processes that ask for them; with EASYDEL_MATRIX_UNIT=0, we
// do not.
bool Ask() {
  const char* wanted = std::getenv("EASYDEL_MATRIX_UNIT");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return false;
  constexpr long kRequest = 0x1023, kRegisters = 18;           // ARCH_REQ_XCOMP_PERM and XTILEDATA, in Linux's headers
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;  // of edx, leaf 7
  constexpr unsigned kVectors = 1u << 5;                       // of eax, its second part: AVX-512 for bfloat16
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat16) == 0 || (d & kTiles) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kVectors) == 0) return false;
  return __builtin_cpu_supports("avx512bw") && syscall(SYS_arch_prctl, kRequest, kRegisters) == 0;
}

}  // namespace

bool HasMatrixUnit() {
  static const bool has = Ask();
  return has;
}

void MultiplyOnMatrixUnit(const Job* jobs, int64_t count) { Compute({jobs, jobs + count}); }

}  // namespace easydel

#else

namespace easydel {

bool HasMatrixUnit() { return false; }
void MultiplyOnMatrixUnit(const Job*, int64_t) {}

}  // namespace easydel

#endif

extern "C" bool easydel_has_matrix_unit() { return easydel::HasMatrixUnit(); }
