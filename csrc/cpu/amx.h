// The matrix unit of newer Intel processors: tiles of 16 rows by 64 bytes, bf16 products in
// fp32, int8 products in int32.
#pragma once

#include <algorithm>
#include <initializer_list>

#include <aigc_fast/vec.h>

#if defined(__AVX512F__) && defined(__linux__)
#define AIGC_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

#include <aigc_fast/cpu_features.h>

#define AIGC_AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512bf16"), noinline))
#define AIGC_AMX_INT8_TARGET __attribute__((target("amx-tile,amx-int8,avx512vbmi"), noinline))
#endif

namespace aigc_fast {

// Whether this process may use tiles, on a CPU with the named features. The system gives a process
// the room to save them only when asked.
inline bool may_use_tiles(std::initializer_list<const char*> needed) {
#if AIGC_AMX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  auto features = cpu_features();
  return std::all_of(needed.begin(), needed.end(), [&](auto name) { return features[name]; }) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
inline bool has_amx_bf16() {
  static const bool has = may_use_tiles({"amx_tile", "amx_bf16", "avx512bf16"});
  return has;
}
inline bool has_amx_int8() {
  static const bool has = may_use_tiles({"amx_tile", "amx_int8", "avx512vbmi"});
  return has;
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
  AIGC_AMX_TARGET explicit Tiles(const TileConfig* config = &kFullTiles) {
    _tile_loadconfig(config);
  }
  AIGC_AMX_TARGET ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#endif

}  // namespace aigc_fast
