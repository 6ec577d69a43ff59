// Kernels for CPUs that XLA has no equal of. Built when the package is installed (hatch_build.py), called through
// XLA's foreign function interface (easydel/native/__init__.py).
//
// A few rows times a matrix cost what it costs to read the matrix once. On matrices of a few megabytes, the size of a
// layer's, XLA's product leaves a part of the memory's bandwidth unused; here each thread streams one contiguous part
// of the matrix, and the parts' sums are added up at the end.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// The same code for each generation of vector instructions; the loader picks the one that the processor has.
#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace {

constexpr int64_t kGroup = 8;              // rows of the matrix that are added to a result in one pass over it
constexpr int64_t kLeastPart = 128 << 10;  // bytes: handing out a smaller part costs more than it saves
constexpr int kSpins = 10'000;             // looks at the others' work, some microseconds, before giving up the processor

// y[r, c] = sum_i x[r, i] w[i, c] over i < depth; w is [depth, width], rows of x are `stride` apart. A group of w's
// rows serves all rows of x while it is in the cache.
FOR_EACH_PROCESSOR
void Multiply(const float* x, int64_t rows, int64_t stride, const float* w, int64_t depth, int64_t width, float* y) {
  std::fill(y, y + rows * width, 0.0f);
  int64_t i = 0;
  for (; i + kGroup <= depth; i += kGroup) {
    const float* __restrict m = w + i * width;
    for (int64_t r = 0; r < rows; ++r) {
      const float* a = x + r * stride + i;
      const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3], a4 = a[4], a5 = a[5], a6 = a[6], a7 = a[7];
      float* __restrict out = y + r * width;
      for (int64_t c = 0; c < width; ++c) {
        out[c] += ((a0 * m[c] + a1 * m[c + width]) + (a2 * m[c + 2 * width] + a3 * m[c + 3 * width])) +
                  ((a4 * m[c + 4 * width] + a5 * m[c + 5 * width]) + (a6 * m[c + 6 * width] + a7 * m[c + 7 * width]));
      }
    }
  }
  for (; i < depth; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) y[r * width + c] += x[r * stride + i] * w[i * width + c];
    }
  }
}

// A product that several threads work on. Each holds a share of it, so that one which comes when all is done finds
// nothing left to take, but never a product that is gone.
struct Product {
  const float *x, *w;
  float* y;
  int64_t rows, depth, width, parts;
  std::vector<float> sums;  // of all parts but the first, which is summed into y: [parts - 1, rows, width]
  std::atomic<int64_t> taken{0}, done{0};

  void Work() {
    for (int64_t part; (part = taken.fetch_add(1)) < parts;) {
      const int64_t groups = depth / kGroup;
      const int64_t first = groups * part / parts * kGroup;
      const int64_t last = part + 1 == parts ? depth : groups * (part + 1) / parts * kGroup;
      float* into = part == 0 ? y : sums.data() + (part - 1) * rows * width;
      Multiply(x + first, rows, depth, w + first * width, last - first, width, into);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  void Finish() {
    for (int spins = 0; done.load(std::memory_order_acquire) < parts; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
    }
    for (int64_t part = 1; part < parts; ++part) {
      const float* sum = sums.data() + (part - 1) * rows * width;
      for (int64_t c = 0; c < rows * width; ++c) y[c] += sum[c];
    }
  }
};

ffi::Error FewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> kernel,
                   ffi::ResultBuffer<ffi::F32> y) {
  const auto of_x = x.dimensions(), of_kernel = kernel.dimensions();
  if (of_x.size() != 2 || of_kernel.size() != 2 || of_x[1] != of_kernel[0]) {
    return ffi::Error::InvalidArgument("few_rows takes [rows, in] and [in, out]");
  }
  const int64_t bytes = kernel.element_count() * static_cast<int64_t>(sizeof(float));
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto product = std::make_shared<Product>();
  product->x = x.typed_data(), product->w = kernel.typed_data(), product->y = y->typed_data();
  product->rows = of_x[0], product->depth = of_kernel[0], product->width = of_kernel[1];
  product->parts = std::clamp<int64_t>(bytes / kLeastPart, 1, threads);
  product->sums.resize((product->parts - 1) * product->rows * product->width);
  for (int64_t part = 1; part < product->parts; ++part) pool.Schedule([product] { product->Work(); });
  product->Work();
  product->Finish();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(easydel_few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
