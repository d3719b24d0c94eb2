/* Stands in for AMX's tile instructions where a test compiles the kernels for a machine without them: tiles in memory, products by
 * AVX512-BF16. It is included before all else (spec/amx_test.sh). */
#ifndef CUFLASH_AMX_TILES_H
#define CUFLASH_AMX_TILES_H

#ifdef __AMX_BF16__

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { TILES = 8, TILE_ROWS = 16, TILE_BYTES = 64 };
static __thread char amx_tiles[TILES][TILE_ROWS][TILE_BYTES] __attribute__((aligned(TILE_BYTES)));
static __thread int amx_configured;

/* A tile is not to be used without a configuration: that is an illegal instruction. */
static inline char (*amx_tile(int tile))[TILE_BYTES] {
    if (!amx_configured) __builtin_trap();
    return amx_tiles[tile];
}

static inline void amx_load(int tile, const void *from, int64_t step) {
    for (int64_t r = 0; r < TILE_ROWS; r++) memcpy(amx_tile(tile)[r], (const char *)from + r * step, TILE_BYTES);
}

static inline void amx_store(int tile, void *to, int64_t step) {
    for (int64_t r = 0; r < TILE_ROWS; r++) memcpy((char *)to + r * step, amx_tile(tile)[r], TILE_BYTES);
}

/* c += a b: of a 16 rows of 16 pairs, of b 16 rows of pairs of all columns. */
static inline void amx_multiply(int c, int a, int b) {
    for (int m = 0; m < TILE_ROWS; m++) {
        __m512 sum = _mm512_load_ps(amx_tile(c)[m]);
        for (int k = 0; k < TILE_ROWS; k++) {
            int32_t pair;
            memcpy(&pair, amx_tile(a)[m] + 4 * k, sizeof pair);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_load_si512(amx_tile(b)[k]));
        }
        _mm512_store_ps(amx_tile(c)[m], sum);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config), amx_configured = 1)
#define _tile_release() ((void)(amx_configured = 0))
#define _tile_zero(tile) memset(amx_tile(tile), 0, TILE_ROWS *TILE_BYTES)
#define _tile_loadd(tile, from, step) amx_load(tile, from, step)
#define _tile_stored(tile, to, step) amx_store(tile, to, step)
#define _tile_dpbf16ps(c, a, b) amx_multiply(c, a, b)

#endif
#endif
