// Work divided among the threads that XLA keeps for its own operations.

#ifndef EASYDEL_NATIVE_PARALLEL_H_
#define EASYDEL_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace easydel {

inline int64_t Threads(xla::ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// Calls work(0) ... work(count - 1), each once, on this thread and those of the pool; returns when all have returned.
//
// A thread of the pool may come when all is done. It finds nothing left to take, and holds a share of the counters, so
// that they outlive this call; it never touches what `work` refers to.
template <class Work>
void ForEach(xla::ffi::ThreadPool& pool, int64_t count, Work work) {
  struct Shared {
    Work work;
    int64_t count;
    std::atomic<int64_t> taken{0}, done{0};

    Shared(Work work, int64_t count) : work(std::move(work)), count(count) {}

    void Take() {
      for (int64_t number; (number = taken.fetch_add(1)) < count;) {
        work(number);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  constexpr int kSpins = 10'000;  // looks at the others' work, some microseconds, before giving up the processor
  auto shared = std::make_shared<Shared>(std::move(work), count);
  const int64_t helpers = std::min(Threads(pool), count) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule([shared] { shared->Take(); });
  shared->Take();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > kSpins) std::this_thread::yield();
  }
}

// Some of many pieces of work, one after the other.
struct Run {
  int64_t first, count;
};

// Pieces of work cut into runs, shorter and shorter ones: few runs, and threads that end together.
inline std::vector<Run> Runs(int64_t count, int64_t threads) {
  std::vector<Run> runs;
  for (int64_t first = 0; first < count;) {
    const int64_t taken = std::max<int64_t>(1, (count - first) / (2 * threads));
    runs.push_back({first, taken});
    first += taken;
  }
  return runs;
}

}  // namespace easydel

#endif  // EASYDEL_NATIVE_PARALLEL_H_
