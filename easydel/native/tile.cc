// `Multiply` for each kind of processor.

#include "tile.h"

#include "matrix_unit.h"

namespace easydel {
namespace {

using Function = void (*)(const Job*, int64_t);

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void Multiply512(const Job* jobs, int64_t count) {
  Tile<16, 12, 2>::Products(jobs, count);  // 24 of 32 registers
}
__attribute__((target("avx2,fma"))) void Multiply256(const Job* jobs, int64_t count) {
  Tile<8, 6, 2>::Products(jobs, count);  // 12 of 16
}
#endif
void Multiply128(const Job* jobs, int64_t count) {
  Tile<4, 6, 2>::Products(jobs, count);  // 12 of 16, or of 32 on ARM
}

}  // namespace

int64_t MostColumns() { return HasMatrixUnit() ? kUnitColumns : kColumns; }

void Multiply(const Job* jobs, int64_t count) {
  static const Function function =
      HasMatrixUnit() ? MultiplyOnMatrixUnit : EASYDEL_WIDEST(Multiply512, Multiply256, Multiply128);
  function(jobs, count);
}

}  // namespace easydel
