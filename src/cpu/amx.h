/* Products of pairs by AMX: C = A B of tiles, of A 16 rows of 32 numbers, of B 16 pairs of k, each of 16 columns. */
#ifndef CUFLASH_CPU_AMX_H
#define CUFLASH_CPU_AMX_H

#define BF16_WORDS "matrix units, tiles of 16 x 32 bfloat16"

static void bf16_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = BF16_ROWS;
    _tile_loadconfig(&config);
}

static void bf16_end(void) {
    _tile_release();
}

/* C[16 M][16 N] = A B for M, N of 1 or 2 tiles. */
#define AMX_PRODUCT(M, N)                                                                                                      \
    do {                                                                                                                       \
        _tile_zero(0);                                                                                                         \
        if (N > 1) _tile_zero(1);                                                                                              \
        if (M > 1) _tile_zero(2);                                                                                              \
        if (M > 1 && N > 1) _tile_zero(3);                                                                                     \
        for (int64_t k = 0; k < steps; k++) {                                                                                  \
            const char *left = a + k * x.step, *right = b + k * 16 * y.pair;                                                   \
            _tile_loadd(6, right, y.pair);                                                                                     \
            if (N > 1) _tile_loadd(7, right + 64, y.pair);                                                                     \
            _tile_loadd(4, left, x.row);                                                                                       \
            _tile_dpbf16ps(0, 4, 6);                                                                                           \
            if (N > 1) _tile_dpbf16ps(1, 4, 7);                                                                                \
            if (M > 1) _tile_loadd(5, left + 16 * x.row, x.row);                                                               \
            if (M > 1) _tile_dpbf16ps(2, 5, 6);                                                                                \
            if (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);                                                                       \
        }                                                                                                                      \
        _tile_stored(0, c, 4 * c_row);                                                                                         \
        if (N > 1) _tile_stored(1, c + 16, 4 * c_row);                                                                         \
        if (M > 1) _tile_stored(2, c + 16 * c_row, 4 * c_row);                                                                 \
        if (M > 1 && N > 1) _tile_stored(3, c + 16 * c_row + 16, 4 * c_row);                                                   \
    } while (0)

/* The same, or C += A B, for m x n of C, multiples of 16, in rows of out_row floats, and so many times 32 of k. What is there is
 * added to by vectors: tiles would take denormal numbers in it for 0. */
static inline __attribute__((always_inline)) void bf16_gemm(int64_t m, int64_t n, int64_t steps, bf16_left x, bf16_right y,
                                                            float *out, int64_t out_row, int add) {
    float product[32 * 32] __attribute__((aligned(64)));
    for (int64_t j = 0; j < n; j += 32)
        for (int64_t i = 0; i < m; i += 32) {
            const char *a = x.data + i * x.row, *b = y.data + j * 4;
            float *to = out + i * out_row + j, *c = add ? product : to;
            int64_t c_row = add ? 32 : out_row, rows = m - i < 32 ? 16 : 32, columns = n - j < 32 ? 16 : 32;
            if (rows == 32 && columns == 32)
                AMX_PRODUCT(2, 2);
            else if (rows == 32)
                AMX_PRODUCT(2, 1);
            else if (columns == 32)
                AMX_PRODUCT(1, 2);
            else
                AMX_PRODUCT(1, 1);
            for (int64_t r = 0; add && r < rows; r++)
                for (int64_t v = 0; v < columns; v += 16)
                    v_store(to + r * out_row + v, v_load(to + r * out_row + v) + v_load(product + r * 32 + v));
        }
}

#endif
