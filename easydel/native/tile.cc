// `Product` for each kind of processor.

#include "tile.h"

namespace easydel {
namespace {

using Function = void (*)(View, View, int64_t, Block);

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void Product512(View a, View b, int64_t depth, Block c) {
  Tile<16, 12, 2>::Product(a, b, depth, c);  // 24 of 32 registers
}
__attribute__((target("avx2,fma"))) void Product256(View a, View b, int64_t depth, Block c) {
  Tile<8, 6, 2>::Product(a, b, depth, c);  // 12 of 16
}
#endif
void Product128(View a, View b, int64_t depth, Block c) {
  Tile<4, 6, 2>::Product(a, b, depth, c);  // 12 of 16, or of 32 on ARM
}

}  // namespace

void Product(View a, View b, int64_t depth, Block c) {
  static const Function function = EASYDEL_WIDEST(Product512, Product256, Product128);
  function(a, b, depth, c);
}

}  // namespace easydel
