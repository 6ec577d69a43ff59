// The product on a processor's matrix unit (matrix_unit.cc).

#ifndef EASYDEL_NATIVE_MATRIX_UNIT_H_
#define EASYDEL_NATIVE_MATRIX_UNIT_H_

#include <cstdint>

#include "tile.h"

namespace easydel {

constexpr int64_t kUnitColumns = 512;  // of a job at most

// Whether the processor has Intel's AMX for bfloat16, and the system lets this process use it.
bool HasMatrixUnit();

// What `Multiply` computes (tile.h); only where `HasMatrixUnit()`.
void MultiplyOnMatrixUnit(const Job* jobs, int64_t count);

}  // namespace easydel

#endif  // EASYDEL_NATIVE_MATRIX_UNIT_H_
