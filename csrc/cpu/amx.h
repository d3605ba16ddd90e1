// The matrix unit of newer Intel processors: tiles of 16 rows by 64 bytes, bf16 products in fp32.
#pragma once

#include <aigc_fast/vec.h>

#if defined(__AVX512F__) && defined(__linux__)
#define AIGC_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

#include <aigc_fast/cpu_features.h>

#define AIGC_AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512bf16"), noinline))
#endif

namespace aigc_fast {

// Whether this process may use bf16 tiles. The system gives a process the room to save them only
// when asked.
inline bool has_amx_bf16() {
#if AIGC_AMX
  static const bool has = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    auto features = cpu_features();
    return features["amx_tile"] && features["amx_bf16"] && features["avx512bf16"] &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}

#if AIGC_AMX

// All eight tiles of full size. Static: g++ 12 leaves out the stores to a local configuration.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) inline const TileConfig kFullTiles;

// Configures the thread's tiles as long as it lives.
class Tiles {
 public:
  AIGC_AMX_TARGET Tiles() { _tile_loadconfig(&kFullTiles); }
  AIGC_AMX_TARGET ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#endif

}  // namespace aigc_fast
