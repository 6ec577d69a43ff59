// A block of a matrix product on one thread: c = a b, packed in the way of Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication" (ACM TOMS 34, 2008).
//
// `b` is packed to columns as wide as a tile, `a` to rows as tall as one; a tile of `c` stays in registers while the
// depth is run through. A matrix is given by its strides, so that a transposed one is the same to the code.

#ifndef EASYDEL_NATIVE_TILE_H_
#define EASYDEL_NATIVE_TILE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "processors.h"

namespace easydel {

constexpr int64_t kDepth = 256, kColumns = 256;  // of the part of `b` that is packed at a time: a quarter of a megabyte

// Element [i, j] is data[i * row + j * column].
struct View {
  const float* data;
  int64_t row, column;
};

// c[i, j] is data[i * stride + j].
struct Block {
  float* data;
  int64_t stride, rows, columns;
};

// c = a b over `depth`; c has at most `MostColumns()` columns.
struct Job {
  View a, b;
  int64_t depth;
  Block c;
};

// Tiles of `kTall` rows and `kVectors` vectors of `kWidth` floats: as many as the processor's registers hold.
template <int kWidth, int kTall, int kVectors>
struct Tile {
  typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(float)), may_alias));
  static constexpr int64_t kAcross = kVectors * kWidth;
  static_assert(kColumns % kAcross == 0 && kTall % 3 == 0);

  // c = a b for a packed [kRows, kDepth] and b [depth, kAcross]; added to what is there, or in its place.
  template <int kRows>
  EASYDEL_INLINE void Multiply(const float* a, const float* b, int64_t depth, Block c, bool add) {
    Vector sum[kRows][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vector line[kVectors];
      for (int v = 0; v < kVectors; ++v) line[v] = *reinterpret_cast<const Vector*>(b + k * kAcross + v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * kDepth + k] * line[v];
      }
    }
    if (c.rows == kRows && c.columns == kAcross) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          Vector* to = reinterpret_cast<Vector*>(c.data + r * c.stride + v * kWidth);
          *to = add ? *to + sum[r][v] : sum[r][v];
        }
      }
      return;
    }
    for (int64_t r = 0; r < c.rows; ++r) {
      float* to = c.data + r * c.stride;
      const float* from = reinterpret_cast<const float*>(sum[r]);
      for (int64_t j = 0; j < c.columns; ++j) to[j] = add ? to[j] + from[j] : from[j];
    }
  }

  // The same by the lowest of three heights that takes all rows of c.
  EASYDEL_INLINE void MultiplyRows(const float* a, const float* b, int64_t depth, Block c, bool add) {
    if (c.rows > kTall / 3 * 2) {
      Multiply<kTall>(a, b, depth, c, add);
    } else if (c.rows > kTall / 3) {
      Multiply<kTall / 3 * 2>(a, b, depth, c, add);
    } else {
      Multiply<kTall / 3>(a, b, depth, c, add);
    }
  }

  // Packs [depth, columns] of b to [columns / kAcross][depth][kAcross]; columns beyond are 0.
  EASYDEL_INLINE void PackColumns(View b, int64_t depth, int64_t columns, float* to) {
    const int64_t whole = b.column == 1 ? columns / kAcross * kAcross : 0;
    for (int64_t k = 0; k < depth; ++k) {
      const float* from = b.data + k * b.row;
      for (int64_t j = 0; j < whole; j += kAcross) {
        std::memcpy(to + j * depth + k * kAcross, from + j, kAcross * sizeof(float));
      }
    }
    for (int64_t j = whole; j < columns; j += kAcross) {
      const int64_t across = std::min(kAcross, columns - j);
      float* tile = to + j * depth;
      if (across < kAcross) std::fill(tile, tile + depth * kAcross, 0.0f);
      for (int64_t q = 0; q < across; ++q) {
        const float* from = b.data + (j + q) * b.column;
        for (int64_t k = 0; k < depth; ++k) tile[k * kAcross + q] = from[k * b.row];
      }
    }
  }

  // Packs [rows, depth] of a to [kTall][kDepth]: rows that lie a power of two apart drive each other out of the cache.
  EASYDEL_INLINE void PackRows(View a, int64_t rows, int64_t depth, float* to) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = a.data + r * a.row;
      if (a.column == 1) {
        std::memcpy(to + r * kDepth, from, depth * sizeof(float));
      } else {
        for (int64_t k = 0; k < depth; ++k) to[r * kDepth + k] = from[k * a.column];
      }
    }
  }

  EASYDEL_INLINE void Product(View a, View b, int64_t depth, Block c) {
    alignas(64) static thread_local float packed_b[kDepth * kColumns];
    alignas(64) static thread_local float packed_a[kDepth * kTall];
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t deep = std::min(kDepth, depth - k);
      PackColumns({b.data + k * b.row, b.row, b.column}, deep, c.columns, packed_b);
      for (int64_t i = 0; i < c.rows; i += kTall) {
        const int64_t tall = std::min<int64_t>(kTall, c.rows - i);
        PackRows({a.data + i * a.row + k * a.column, a.row, a.column}, tall, deep, packed_a);
        for (int64_t j = 0; j < c.columns; j += kAcross) {
          const Block tile{c.data + i * c.stride + j, c.stride, tall, std::min(kAcross, c.columns - j)};
          MultiplyRows(packed_a, packed_b + j * deep, deep, tile, k > 0);
        }
      }
    }
  }

  EASYDEL_INLINE void Products(const Job* jobs, int64_t count) {
    for (const Job* job = jobs; job != jobs + count; ++job) Product(job->a, job->b, job->depth, job->c);
  }
};

// Of a product that is computed at once: kColumns, or more on a matrix unit, which is so fast that packing shows.
int64_t MostColumns();

// Computes products one after the other, by the widest instructions that this processor has.
void Multiply(const Job* jobs, int64_t count);

}  // namespace easydel

#endif  // EASYDEL_NATIVE_TILE_H_
