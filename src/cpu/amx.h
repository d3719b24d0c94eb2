/* Products of pairs by AMX: C = A B of tiles, of A 16 rows of 32 numbers, of B 16 pairs of k, each of 16 columns. */
#ifndef CUFLASH_CPU_AMX_H
#define CUFLASH_CPU_AMX_H

enum { BF16_SCORES_N = 32 }; /* keys at a time of a forward's scores and softmax: they stay in the L1 cache */

enum { BF16_HALF_PLANES = 2 }; /* of float16: four products of planes take a quarter of a float32 product's time */

#define BF16_WORDS "matrix units, tiles of 16 x 32 bfloat16"
#define BF16_FEW_WORDS BF16_WORDS ", 16 query rows at a time"

static void bf16_begin(void) {
    static const struct { /* not of this call: compilers are told of the first 8 bytes only that the instruction reads */
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {1,
                0,
                {0},
                {64, 64, 64, 64, 64, 64, 64, 64},
                {BF16_ROWS, BF16_ROWS, BF16_ROWS, BF16_ROWS, BF16_ROWS, BF16_ROWS, BF16_ROWS, BF16_ROWS}};
    _tile_loadconfig(&config);
}

static void bf16_end(void) {
    _tile_release();
}

/* A block of C, a tile high and two wide, or one where columns end. */
typedef struct {
    const char *a, *b;
    float *to;
    int two;
} amx_block;

/* Its sum, in the tiles X and Y. */
#define AMX_PRODUCT(X, Y)                                                                                                      \
    do {                                                                                                                       \
        _tile_zero(X);                                                                                                         \
        _tile_zero(Y);                                                                                                         \
        for (int term = BF16_ALL_TERMS - terms; term < BF16_ALL_TERMS; term++) {                                               \
            const char *a = now.a + bf16_terms[term].left * x.plane, *b = now.b + bf16_terms[term].right * y.plane;            \
            for (int64_t k = 0; k < steps; k++) {                                                                              \
                _tile_loadd(5, b + k * 16 * y.pair, y.pair);                                                                   \
                if (now.two) _tile_loadd(6, b + k * 16 * y.pair + 64, y.pair);                                                 \
                _tile_loadd(4, a + k * x.step, x.row);                                                                         \
                _tile_dpbf16ps(X, 4, 5);                                                                                       \
                if (now.two) _tile_dpbf16ps(Y, 4, 6);                                                                          \
            }                                                                                                                  \
        }                                                                                                                      \
    } while (0)

/* What is there is added to by vectors: tiles would take denormal numbers in it for 0. */
#define AMX_STORE(X, Y)                                                                                                        \
    do {                                                                                                                       \
        float *c = add ? sum : before.to;                                                                                      \
        int64_t c_row = add ? 32 : out_row;                                                                                    \
        _tile_stored(X, c, 4 * c_row);                                                                                         \
        if (before.two) _tile_stored(Y, c + 16, 4 * c_row);                                                                    \
        for (int64_t r = 0; add && r < BF16_ROWS; r++)                                                                         \
            for (int64_t v = 0; v <= 16 * before.two; v += 16) {                                                               \
                float *at = before.to + r * out_row + v;                                                                       \
                v_store(at, v_load(at) + v_load(sum + r * 32 + v));                                                            \
            }                                                                                                                  \
    } while (0)

/* C = A B, or C += A B, for m x n of C, multiples of 16, in rows of out_row floats, and so many times 32 of k and terms. A block is
 * stored when the next one's products have begun, in other tiles, so that these need not wait until it is. */
static void bf16_gemm(int64_t m, int64_t n, int64_t steps, bf16_left x, bf16_right y, int terms, float *out, int64_t out_row,
                      int add) {
    float sum[BF16_ROWS * 32] __attribute__((aligned(64)));
    amx_block before = {0}, now;
    int odd = 0;
    __asm__ volatile("" ::: "memory"); /* compilers are not told what tiles are loaded from */
    for (int64_t i = 0; i < m; i += BF16_ROWS)
        for (int64_t j = 0; j < n; j += 32) {
            now = (amx_block){x.data + i * x.row, y.data + j * 4, out + i * out_row + j, n - j > 16};
            if (odd) {
                AMX_PRODUCT(2, 3);
                AMX_STORE(0, 1);
            } else {
                AMX_PRODUCT(0, 1);
                if (before.to) AMX_STORE(2, 3);
            }
            before = now;
            odd = !odd;
        }
    if (odd)
        AMX_STORE(0, 1);
    else
        AMX_STORE(2, 3);
}

#endif
