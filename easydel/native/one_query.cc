// Attention of one query in each row, as when tokens are generated (easydel/native/one_query.py).
//
// It costs what it costs to read the keys and values that are seen, once, where they lie. XLA's products want them with
// the heads first and copy them there. Threads take parts of the slots; each keeps, for every head, its largest product,
// the sum of weights relative to it and the weighted sum of values (online softmax, arXiv:1805.02867).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"
#include "processors.h"

namespace ffi = xla::ffi;

namespace easydel {
namespace {

constexpr int64_t kLeastPart = 128 << 10;  // bytes of keys and values: less is not worth handing out
constexpr int64_t kBlock = 32;             // slots whose products are weighed together
constexpr int64_t kLanes = 8;
constexpr float kNone = -std::numeric_limits<float>::infinity();

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(int32_t))));

struct Shape {
  int64_t heads, kv_heads, dim, value_dim;
  float scale, softcap;  // without a soft-cap: 0

  int64_t state_size() const { return heads * (2 + value_dim); }
};

// One row: queries [heads, dim], keys [slots, kv_heads, dim], values [slots, kv_heads, value_dim], seen [slots].
struct Row {
  const float *query, *key, *value;
  const bool* seen;
};

// What some slots give: largest [heads], total [heads], sum [heads, value_dim], one after another.
struct State {
  float *largest, *total, *sum;

  State(float* from, const Shape& shape)
      : largest(from), total(from + shape.heads), sum(from + 2 * shape.heads) {}
};

EASYDEL_INLINE const Lanes& Load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }

// The products of a query with four keys, `next` floats from one to the next.
EASYDEL_INLINE void FourProducts(const float* query, const float* key, int64_t next, int64_t dim, float* to) {
  Lanes a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const Lanes q = Load(query + i);
    a += q * Load(key + i);
    b += q * Load(key + next + i);
    c += q * Load(key + 2 * next + i);
    d += q * Load(key + 3 * next + i);
  }
  // Lanes next to one another are added up, a's and b's, c's and d's side by side; then those of both.
  const Lanes ab = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  const Lanes cd = __builtin_shufflevector(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
  const Lanes all = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  for (int64_t r = 0; r < 4; ++r) to[r] = all[r] + all[r + 4];
  for (; i < dim; ++i) {
    for (int64_t r = 0; r < 4; ++r) to[r] += query[i] * key[r * next + i];
  }
}

EASYDEL_INLINE float OneProduct(const float* query, const float* key, int64_t dim) {
  float sum = 0.0f;
  for (int64_t i = 0; i < dim; ++i) sum += query[i] * key[i];
  return sum;
}

// e^x for x <= 0 within 2e-7 of itself, 0 below -87; the coefficients are those of Cephes' expf.
EASYDEL_INLINE Lanes Exp(Lanes x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer in its last bits
  const Lanes shifted = x * 1.44269504088896341f + kMagic, n = shifted - kMagic;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Lanes power = (Lanes)((Bits)p + ((Bits)shifted << 23));
  return x < -87.0f ? Lanes{} : power;
}

// The products of a head with `count` slots; what is not seen gets none. Returns the largest.
EASYDEL_INLINE float Products(const Shape& shape, const float* query, const float* key, const bool* seen, int64_t count,
                              float* products) {
  const int64_t next = shape.kv_heads * shape.dim;
  int64_t done = 0;
  for (; done + 4 <= count; done += 4) FourProducts(query, key + done * next, next, shape.dim, products + done);
  for (; done < count; ++done) products[done] = OneProduct(query, key + done * next, shape.dim);
  for (int64_t t = 0; t < count; ++t) products[t] *= shape.scale;
  if (shape.softcap != 0.0f) {
    for (int64_t t = 0; t < count; ++t) products[t] = shape.softcap * std::tanh(products[t] / shape.softcap);
  }
  float largest = kNone;
  for (int64_t t = 0; t < kBlock; ++t) {
    if (t >= count || !seen[t]) products[t] = kNone;
    largest = std::max(largest, products[t]);
  }
  return largest;
}

// Adds `count` slots of weighted values to a head's sum.
EASYDEL_INLINE void AddValues(const Shape& shape, const float* weights, const float* value, int64_t count,
                              float* __restrict sum) {
  const int64_t next = shape.kv_heads * shape.value_dim;
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) {
    const float* __restrict v = value + t * next;
    const float w0 = weights[t], w1 = weights[t + 1], w2 = weights[t + 2], w3 = weights[t + 3];
    for (int64_t d = 0; d < shape.value_dim; ++d) {
      sum[d] += (w0 * v[d] + w1 * v[d + next]) + (w2 * v[d + 2 * next] + w3 * v[d + 3 * next]);
    }
  }
  for (; t < count; ++t) {
    for (int64_t d = 0; d < shape.value_dim; ++d) sum[d] += weights[t] * value[t * next + d];
  }
}

// The state of all heads after the slots first ... last - 1.
EASYDEL_FOR_EACH_PROCESSOR
void Attend(Shape shape, Row row, int64_t first, int64_t last, State state) {
  std::fill(state.largest, state.largest + shape.heads, kNone);
  std::fill(state.total, state.total + shape.heads, 0.0f);
  std::fill(state.sum, state.sum + shape.heads * shape.value_dim, 0.0f);
  const int64_t group = shape.heads / shape.kv_heads;
  float weights[kBlock];
  for (int64_t t = first; t < last; t += kBlock) {
    const int64_t count = std::min(kBlock, last - t);
    for (int64_t head = 0; head < shape.heads; ++head) {
      const int64_t of_key = t * shape.kv_heads + head / group;
      const float highest = Products(shape, row.query + head * shape.dim, row.key + of_key * shape.dim, row.seen + t,
                                     count, weights);
      if (highest == kNone) continue;
      const float largest = std::max(highest, state.largest[head]);
      const float fading = std::exp(state.largest[head] - largest);
      Lanes totals = {};
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        Lanes& some = *reinterpret_cast<Lanes*>(weights + i);
        some = Exp(some - largest);
        totals += some;
      }
      float total = 0.0f;
      for (int64_t lane = 0; lane < kLanes; ++lane) total += totals[lane];
      float* sum = state.sum + head * shape.value_dim;
      if (fading != 1.0f) {
        for (int64_t d = 0; d < shape.value_dim; ++d) sum[d] *= fading;
      }
      AddValues(shape, weights, row.value + of_key * shape.value_dim, count, sum);
      state.total[head] = state.total[head] * fading + total;
      state.largest[head] = largest;
    }
  }
}

// The parts' states as one result [heads, value_dim]; 0 where nothing is seen.
void Merge(const Shape& shape, float* states, int64_t parts, float* out) {
  for (int64_t head = 0; head < shape.heads; ++head) {
    float largest = kNone, total = 0.0f;
    float* to = out + head * shape.value_dim;
    for (int64_t part = 0; part < parts; ++part) {
      largest = std::max(largest, State(states + part * shape.state_size(), shape).largest[head]);
    }
    std::fill(to, to + shape.value_dim, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      const State state(states + part * shape.state_size(), shape);
      if (state.largest[head] == kNone) continue;
      const float fading = std::exp(state.largest[head] - largest);
      const float* sum = state.sum + head * shape.value_dim;
      for (int64_t d = 0; d < shape.value_dim; ++d) to[d] += sum[d] * fading;
      total += state.total[head] * fading;
    }
    for (int64_t d = 0; total > 0.0f && d < shape.value_dim; ++d) to[d] /= total;
  }
}

ffi::Error OneQuery(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::F32> key,
                    ffi::Buffer<ffi::F32> value, ffi::Buffer<ffi::PRED> seen, ffi::ResultBuffer<ffi::F32> out,
                    float scale, float softcap) {
  const auto q = query.dimensions(), k = key.dimensions(), v = value.dimensions(), s = seen.dimensions();
  if (q.size() != 3 || k.size() != 4 || v.size() != 4 || s.size() != 2 || q[0] != k[0] || q[2] != k[3] ||
      q[1] % k[2] || v[0] != k[0] || v[1] != k[1] || v[2] != k[2] || s[0] != k[0] || s[1] != k[1]) {
    return ffi::Error::InvalidArgument(
        "one_query takes [batch, heads, dim], keys and values [batch, slots, kv_heads, dim] and [batch, slots]");
  }
  const Shape shape{q[1], k[2], k[3], v[3], scale, softcap};
  const int64_t batch = q[0], slots = k[1], threads = Threads(pool);
  const int64_t slot_bytes = shape.kv_heads * (shape.dim + shape.value_dim) * static_cast<int64_t>(sizeof(float));
  const bool* all_seen = seen.typed_data();
  std::vector<int64_t> first(batch), last(batch);  // of the slots between which something is seen
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const bool* row = all_seen + b * slots;
    first[b] = std::find(row, row + slots, true) - row;
    for (last[b] = slots; last[b] > first[b] && !row[last[b] - 1];) --last[b];
    total += last[b] - first[b];
  }
  const int64_t workers = std::clamp<int64_t>(total * slot_bytes / kLeastPart, 1, threads);
  const int64_t parts = std::clamp<int64_t>((workers + batch - 1) / std::max<int64_t>(batch, 1), 1, threads);
  std::vector<float> states(batch * parts * shape.state_size());
  const auto attend = [&](int64_t task) {
    const int64_t b = task / parts, part = task % parts, length = last[b] - first[b];
    const Row row{query.typed_data() + b * shape.heads * shape.dim,
                  key.typed_data() + b * slots * shape.kv_heads * shape.dim,
                  value.typed_data() + b * slots * shape.kv_heads * shape.value_dim, all_seen + b * slots};
    Attend(shape, row, first[b] + length * part / parts, first[b] + length * (part + 1) / parts,
           State(states.data() + task * shape.state_size(), shape));
  };
  if (workers == 1) {
    for (int64_t task = 0; task < batch * parts; ++task) attend(task);
  } else {
    ForEach(pool, batch * parts, attend);
  }
  for (int64_t b = 0; b < batch; ++b) {
    Merge(shape, states.data() + b * parts * shape.state_size(), parts,
          out->typed_data() + b * shape.heads * shape.value_dim);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace easydel

XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_one_query, easydel::OneQuery,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
