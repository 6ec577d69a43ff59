// What a matrix unit is given: float32 split into parts, and laid out as its registers are.
//
// A register of bfloat16 holds 16 rows of 32 numbers of a; of b it holds 32 rows of 16, two by two interleaved. The two
// registers of 32 rows of a, or 32 columns of b, lie together; the three parts of the same numbers follow each other.

#ifndef EASYDEL_NATIVE_MATRIX_UNIT_PARTS_H_
#define EASYDEL_NATIVE_MATRIX_UNIT_PARTS_H_

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "tile.h"

#define EASYDEL_FOR_MATRIX_UNIT target("avx512f,avx512bw,avx512bf16,amx-tile,amx-bf16")
#define EASYDEL_UNIT_INLINE static inline __attribute__((always_inline, EASYDEL_FOR_MATRIX_UNIT))

namespace easydel {

using Half = uint16_t;  // the bits of a bfloat16

constexpr int64_t kSide = 16, kStep = 32;     // rows, and numbers of each, that a register holds
constexpr int64_t kRegister = kSide * kStep;  // numbers in all
constexpr int64_t kSquare = 2 * kSide;        // rows of a, or columns of b, in two registers
constexpr int64_t kPair = kSquare * kStep;    // their numbers
constexpr int64_t kParts = 3;                 // of a float32
constexpr int64_t kPairs = kParts * kPair;    // numbers of all parts
constexpr int64_t kDeep = 128;                // of the depth at a time: 24 KB of 32 rows of a, in the nearest cache

// The first `count` of 16.
EASYDEL_UNIT_INLINE __mmask16 First(int64_t count) {
  return count >= kSide ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1;
}

// The first `count` of 16 numbers, each `step` from the last, and 0 for the others.
EASYDEL_UNIT_INLINE __m512 Load(const float* from, int64_t step, int64_t count) {
  if (step == 1) return _mm512_maskz_loadu_ps(First(count), from);
  const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_mullo_epi32(numbers, _mm512_set1_epi32(step));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), First(count), places, from, sizeof(float));
}

// The nearest bfloat16 of 32 numbers, in their order.
EASYDEL_UNIT_INLINE __m512i Round(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// bfloat16 in the lower halves of words, or in the upper ones, as float32.
EASYDEL_UNIT_INLINE __m512 Lower(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
EASYDEL_UNIT_INLINE __m512 Upper(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000)));
}

// Packs up to 32 rows of a to [depth / 32][parts][2][16][32].
EASYDEL_UNIT_INLINE void PackRows(View a, int64_t rows, int64_t depth, Half* to) {
  for (int64_t k = 0; k < depth; k += kStep, to += kPairs) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = a.data + r * a.row + k * a.column;
      __m512 low = Load(from, a.column, depth - k), high = Load(from + kSide * a.column, a.column, depth - k - kSide);
      for (int part = 0; part < kParts; ++part) {
        const __m512i both = Round(low, high);
        _mm512_store_si512(to + part * kPair + r * kStep, both);
        low = _mm512_sub_ps(low, Lower(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both))));
        high = _mm512_sub_ps(high, Lower(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1))));
      }
    }
  }
}

// Packs up to two rows and 32 columns of b to a line of [parts][2][16][16][2], and asks memory for those 32 rows below.
EASYDEL_UNIT_INLINE void PackTwoRows(View b, int64_t rows, int64_t columns, Half* to) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                               23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t j = 0; j < columns; j += kSide, to += kRegister) {
    const float* from = b.data + j * b.column;
    __m512 low = Load(from, b.column, rows > 0 ? columns - j : 0);
    __m512 high = Load(from + b.row, b.column, rows > 1 ? columns - j : 0);
    __builtin_prefetch(from + kStep * b.row, 0, 1);
    __builtin_prefetch(from + (kStep + 1) * b.row, 0, 1);
    for (int part = 0; part < kParts; ++part) {
      const __m512i both = _mm512_permutexvar_epi16(interleaved, Round(low, high));
      _mm512_store_si512(to + part * kPair, both);
      low = _mm512_sub_ps(low, Lower(both));
      high = _mm512_sub_ps(high, Upper(both));
    }
  }
}

// Some of the depth of a job, over which all of its rows and columns are computed at once.
struct Panel {
  const Job *job, *end;
  int64_t k = 0;

  int64_t Depth() const { return std::min(kDeep, job->depth - k); }
  int64_t Steps() const { return (Depth() + kStep - 1) / kStep; }
  int64_t Across() const { return (job->c.columns + kSquare - 1) / kSquare; }
  Panel Next() const { return k + kDeep < job->depth ? Panel{job, end, k + kDeep} : Panel{job + 1, end}; }
};

// Packs a panel of b to [columns / 32][depth / 32][parts][2][16][16][2], two rows of 32 columns at a time.
class Packer {
 public:
  Packer(Panel panel, Half* to) : to_(to) {
    if (panel.job == panel.end) return;
    const View b = panel.job->b;
    b_ = {b.data + panel.k * b.row, b.row, b.column};
    columns_ = panel.job->c.columns, depth_ = panel.Depth(), steps_ = panel.Steps();
    left_ = steps_ * panel.Across() * kSide;
  }

  int64_t Left() const { return left_; }

  __attribute__((always_inline, EASYDEL_FOR_MATRIX_UNIT)) inline void Pack() {
    const View rows{b_.data + k_ * b_.row + j_ * b_.column, b_.row, b_.column};
    Half* to = to_ + (j_ / kSquare * steps_ + k_ / kStep) * kPairs + k_ % kStep * kSide;
    PackTwoRows(rows, depth_ - k_, std::min(kSquare, columns_ - j_), to);
    k_ += 2, --left_;
    if (k_ % kStep != 0) return;
    j_ += kSquare, k_ -= kStep;  // the next columns of the same rows
    if (j_ >= columns_) j_ = 0, k_ += kStep;
  }

 private:
  View b_{};
  int64_t columns_ = 0, depth_ = 0, steps_ = 0, left_ = 0, k_ = 0, j_ = 0;
  Half* to_;
};

// Packs a part of what is left at each of so many steps of a product, while the matrix unit is at work.
class Meanwhile {
 public:
  Meanwhile(Packer packer, int64_t steps) : packer_(packer), pieces_(packer.Left()), steps_(steps) {}

  __attribute__((always_inline, EASYDEL_FOR_MATRIX_UNIT)) inline void Step() {
    for (due_ += pieces_; due_ >= steps_; due_ -= steps_) packer_.Pack();
  }

 private:
  Packer packer_;
  int64_t pieces_, steps_, due_ = 0;
};

}  // namespace easydel

#endif  // EASYDEL_NATIVE_MATRIX_UNIT_PARTS_H_
