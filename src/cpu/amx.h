/* Attention forward in bfloat16 by AMX, in two products of tiles: scores S[key][row] = K Q and output O[d][row] += V P, rows as
 * lanes as everywhere. A tile of the left operand is 16 rows of 32 numbers, read where it lies; one of the right operand is 16
 * pairs of k, each of 16 columns, so Q and P are kept as pairs: [d / 2][row][2] and [key / 2][row][2]. V is the left operand
 * by columns; it is turned once, before all, to [key / 32][d][32]. Sums are float32; P is rounded to bfloat16. */
#ifndef CUFLASH_CPU_AMX_H
#define CUFLASH_CPU_AMX_H

#include <immintrin.h>

#include "vec.h"

enum {
    AMX_ROWS = 16,                 /* of a tile */
    AMX_K = 32,                    /* numbers of a tile's row */
    AMX_BLOCK_N = 128,             /* keys at a time */
    AMX_PAIRS = 2 * BLOCK_M * 2,   /* bytes of a pair of k, of all rows of a block */
    AMX_STEP = AMX_K * BLOCK_M * 2 /* bytes from one 32 of k to the next */
};

static int64_t amx_round_up(int64_t x, int64_t to) {
    return (x + to - 1) / to * to;
}

static void amx_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = AMX_ROWS;
    _tile_loadconfig(&config);
}

static void amx_end(void) {
    _tile_release();
}

/* Where a left operand's tiles are: bytes between a tile's rows, from 16 rows to the next, and from 32 of k to the next. */
typedef struct {
    const char *data;
    int64_t row, block, step;
} amx_left;

/* C[16 M][16 N] (+)= A B for M, N of 1 or 2 tiles; B is pairs. C has rows of BLOCK_M floats. */
#define AMX_PRODUCT(M, N)                                                                                                      \
    do {                                                                                                                       \
        if (add) {                                                                                                             \
            _tile_loadd(0, c, 4 * BLOCK_M);                                                                                    \
            if (N > 1) _tile_loadd(1, c + 16, 4 * BLOCK_M);                                                                    \
            if (M > 1) _tile_loadd(2, c + 16 * BLOCK_M, 4 * BLOCK_M);                                                          \
            if (M > 1 && N > 1) _tile_loadd(3, c + 16 * BLOCK_M + 16, 4 * BLOCK_M);                                            \
        } else {                                                                                                               \
            _tile_zero(0);                                                                                                     \
            if (N > 1) _tile_zero(1);                                                                                          \
            if (M > 1) _tile_zero(2);                                                                                          \
            if (M > 1 && N > 1) _tile_zero(3);                                                                                 \
        }                                                                                                                      \
        for (int64_t k = 0; k < steps; k++) {                                                                                  \
            const char *left = a + k * x->step, *right = b + k * AMX_STEP;                                                     \
            _tile_loadd(6, right, AMX_PAIRS);                                                                                  \
            if (N > 1) _tile_loadd(7, right + 64, AMX_PAIRS);                                                                  \
            _tile_loadd(4, left, x->row);                                                                                      \
            _tile_dpbf16ps(0, 4, 6);                                                                                           \
            if (N > 1) _tile_dpbf16ps(1, 4, 7);                                                                                \
            if (M > 1) _tile_loadd(5, left + x->block, x->row);                                                                \
            if (M > 1) _tile_dpbf16ps(2, 5, 6);                                                                                \
            if (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);                                                                       \
        }                                                                                                                      \
        _tile_stored(0, c, 4 * BLOCK_M);                                                                                       \
        if (N > 1) _tile_stored(1, c + 16, 4 * BLOCK_M);                                                                       \
        if (M > 1) _tile_stored(2, c + 16 * BLOCK_M, 4 * BLOCK_M);                                                             \
        if (M > 1 && N > 1) _tile_stored(3, c + 16 * BLOCK_M + 16, 4 * BLOCK_M);                                               \
    } while (0)

/* The same for m rows of C, a multiple of 16, `lanes` columns, and so many times 32 of k. */
static void amx_gemm(int64_t m, int64_t lanes, int64_t steps, const amx_left *x, const char *pairs, float *out, int add) {
    for (int64_t j = 0; j < lanes; j += 32)
        for (int64_t i = 0; i < m; i += 32) {
            const char *a = x->data + i / 16 * x->block, *b = pairs + j * 4;
            float *c = out + i * BLOCK_M + j;
            if (m - i >= 32 && lanes - j >= 32)
                AMX_PRODUCT(2, 2);
            else if (m - i >= 32)
                AMX_PRODUCT(2, 1);
            else if (lanes - j >= 32)
                AMX_PRODUCT(1, 2);
            else
                AMX_PRODUCT(1, 1);
        }
}

/* 2^x for x <= 0, within 3e-6 of it. */
static inline __m512 amx_exp2(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT); /* -1/2 to 1/2; 0 of -infinity */
    __m512 p = _mm512_set1_ps(0.00958286420778814f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0559064537211178f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240240985954843f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693124190085566f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
}

/* Two vectors of lanes as pairs of bfloat16. */
static inline void amx_store_pairs(char *to, __m512 first, __m512 second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first)));
}

/* As softmax_lanes, of all lanes, from scores to pairs of probabilities; pairs of keys up to a multiple of 32, 0 where there
 * are none. */
static inline __attribute__((always_inline)) void amx_softmax_lanes(const int V, const float *s, char *pairs, int64_t count,
                                                                    float scale, float *max, float *sum, float *out,
                                                                    int64_t dim) {
    __m512 m[4], base[4], total[4], c = _mm512_set1_ps(scale), none = _mm512_set1_ps(-INFINITY);
    for (int v = 0; v < V; v++) m[v] = _mm512_load_ps(max + v * 16);
    for (int64_t j = 0; j < count; j++)
        for (int v = 0; v < V; v++) m[v] = _mm512_max_ps(_mm512_load_ps(s + j * BLOCK_M + v * 16), m[v]);
    for (int v = 0; v < V; v++) {
        base[v] = _mm512_mask_mov_ps(m[v], _mm512_cmpeq_ps_mask(m[v], none), _mm512_setzero_ps());
        total[v] = _mm512_setzero_ps();
    }
    int64_t j = 0;
    for (; j + 2 <= count; j += 2)
        for (int v = 0; v < V; v++) {
            const float *at = s + j * BLOCK_M + v * 16;
            __m512 first = amx_exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(at), base[v]), c));
            __m512 second = amx_exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(at + BLOCK_M), base[v]), c));
            total[v] = _mm512_add_ps(total[v], _mm512_add_ps(first, second));
            amx_store_pairs(pairs + j / 2 * AMX_PAIRS + v * 64, first, second);
        }
    for (; j < amx_round_up(count, AMX_K); j += 2)
        for (int v = 0; v < V; v++) {
            __m512 first = _mm512_setzero_ps();
            if (j < count) {
                first = amx_exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(s + j * BLOCK_M + v * 16), base[v]), c));
                total[v] = _mm512_add_ps(total[v], first);
            }
            amx_store_pairs(pairs + j / 2 * AMX_PAIRS + v * 64, first, _mm512_setzero_ps());
        }
    for (int v = 0; v < V; v++) {
        __m512 before = _mm512_load_ps(max + v * 16);
        __m512 shrink = amx_exp2(_mm512_mul_ps(_mm512_sub_ps(before, base[v]), c));
        _mm512_store_ps(sum + v * 16, _mm512_fmadd_ps(_mm512_load_ps(sum + v * 16), shrink, total[v]));
        _mm512_store_ps(max + v * 16, m[v]);
        if (_mm512_cmp_ps_mask(before, m[v], _CMP_NEQ_UQ) == 0) continue;
        for (int64_t d = 0; d < dim; d++) {
            float *at = out + d * BLOCK_M + v * 16;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
        }
    }
}

static void amx_softmax(int64_t lanes, const float *s, char *pairs, int64_t count, float c, float *max, float *sum, float *out,
                        int64_t dim) {
    int64_t lane = 0;
    for (; lane + 64 <= lanes; lane += 64)
        amx_softmax_lanes(4, s + lane, pairs + lane * 4, count, c, max + lane, sum + lane, out + lane, dim);
    for (; lane < lanes; lane += 16)
        amx_softmax_lanes(1, s + lane, pairs + lane * 4, count, c, max + lane, sum + lane, out + lane, dim);
}

/* ---- Numbers that tiles do not take ---------------------------------------------------------------
 *
 * AMX takes denormal numbers for 0; and infinities and NaN in V must not meet the probability 0 of rows that do not see them. V
 * is packed with zeros in their place, and where there are any (hardly ever) what they come to is added by itself, so that rows
 * that they do not concern have the same bits as without them. */

enum { AMX_ODD_K = 1, AMX_ODD_V = 2 }; /* there are some among 128 keys; in K, where infinities do no harm, denormals */

static int is_denormal(uint16_t x) {
    return (x & 0x7f80) == 0 && (x & 0x7f) != 0;
}

static int is_odd(uint16_t x) {
    return is_denormal(x) || (x & 0x7f80) == 0x7f80;
}

static const uint16_t *amx_row(const row_block *block, const cuflash_operand *x, int64_t key) {
    return (const uint16_t *)(const void *)cuflash_row(x, block->batch, block->head_kv, key);
}

/* scores += K Q over the denormal numbers of either. */
static void amx_add_scores(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, int64_t first,
                           int64_t count, float *s) {
    for (int64_t r = 0; r < block->rows; r++) {
        const uint16_t *q = (const uint16_t *)(const void *)row_address(plan, block, &p->q, r);
        for (int64_t j = 0; j < count; j++) {
            const uint16_t *k = amx_row(block, &p->k, first + j);
            for (int64_t d = 0; d < p->head_dim; d++)
                if (is_denormal(q[d]) || is_denormal(k[d]))
                    s[j * BLOCK_M + r] += query_factor(p) * cuflash_bfloat_to_float(q[d]) * cuflash_bfloat_to_float(k[d]);
        }
    }
}

/* out += V P over the odd numbers of V. */
static void amx_add_values(const cuflash_problem *p, const row_block *block, int64_t first, int64_t count, const char *pairs,
                           float *out) {
    const uint16_t *weight = (const uint16_t *)(const void *)pairs;
    for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < p->head_dim_v; d++) {
            uint16_t v = amx_row(block, &p->v, first + j)[d];
            if (!is_odd(v)) continue;
            for (int64_t r = 0; r < block->rows; r++)
                if (block->limit[r] > first + j)
                    out[d * BLOCK_M + r] +=
                        cuflash_bfloat_to_float(weight[j / 2 * (AMX_PAIRS / 2) + r * 2 + j % 2]) * cuflash_bfloat_to_float(v);
        }
}

/* ---- A block of rows ---------------------------------------------------------------------------- */

/* What a thread works in. */
typedef struct {
    char *q, *k, *p; /* pairs of Q [dim / 2], a tile of K, padded, pairs of P [AMX_BLOCK_N / 2] */
    float *s;        /* [AMX_BLOCK_N][BLOCK_M] */
} amx_scratch;

static int64_t amx_lay_out(const cuflash_problem *p, float *base, amx_scratch *w) {
    int64_t used = 0, dim = amx_round_up(p->head_dim, AMX_K);
    char *at = (char *)base;
#define TAKE(name, bytes) w->name = (void *)(at + used), used += ((bytes) + 63) / 64 * 64
    TAKE(q, dim * BLOCK_M * 2);
    TAKE(k, AMX_BLOCK_N * dim * 2);
    TAKE(p, AMX_BLOCK_N * BLOCK_M * 2);
    TAKE(s, AMX_BLOCK_N * BLOCK_M * 4);
#undef TAKE
    return used / 4;
}

/* The block's rows of Q, times 1, -1 or 0, as pairs; says whether there are denormal numbers. */
static int amx_load_q(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, char *q) {
    float factor = query_factor(p);
    int64_t dim = amx_round_up(p->head_dim, AMX_K);
    uint16_t sign = factor < 0 ? 0x8000 : 0;
    memset(q, 0, (size_t)(dim * BLOCK_M * 2));
    int odd = 0;
    for (int64_t r = 0; r < block->rows && factor != 0; r++) {
        const uint16_t *row = (const uint16_t *)(const void *)row_address(plan, block, &p->q, r);
        uint16_t *to = (uint16_t *)(void *)q + r * 2;
        for (int64_t d = 0; d < p->head_dim; d++) {
            to[d / 2 * (AMX_PAIRS / 2) + d % 2] = row[d] ^ sign;
            odd |= is_denormal(row[d]);
        }
    }
    return odd;
}

/* Rows of K as left operands: in place where they are whole tiles. */
static amx_left amx_load_k(const cuflash_problem *p, const row_block *block, int64_t first, int64_t count, char *buffer) {
    const char *rows = cuflash_row(&p->k, block->batch, block->head_kv, first);
    int64_t step = p->k.seq * 2, dim = amx_round_up(p->head_dim, AMX_K);
    if (p->head_dim == dim && count % 16 == 0) return (amx_left){rows, step, 16 * step, 64};
    memset(buffer, 0, (size_t)(amx_round_up(count, 16) * dim * 2));
    for (int64_t j = 0; j < count; j++) memcpy(buffer + j * dim * 2, rows + j * step, (size_t)p->head_dim * 2);
    return (amx_left){buffer, dim * 2, 16 * dim * 2, 64};
}

/* ---- Packing ------------------------------------------------------------------------------------ */

/* Bytes of a pair's V as amx_pack leaves it; behind them a byte for each 128 keys says what is odd among them. */
static int64_t amx_value_bytes(const cuflash_problem *p) {
    return amx_round_up(p->seq_k, AMX_BLOCK_N) * amx_round_up(p->head_dim_v, AMX_ROWS) * 2;
}

static int64_t amx_packed_bytes(const cuflash_problem *p) {
    return amx_value_bytes(p) + amx_round_up((p->seq_k + AMX_BLOCK_N - 1) / AMX_BLOCK_N, 64);
}

/* Turns 32 keys of V, [key][d], to [d][32]: 16 dimensions at a time, as 32-bit pairs of keys. */
static int amx_pack_keys(const cuflash_problem *p, int64_t pair, int64_t first, uint16_t *to) {
    int64_t dim = amx_round_up(p->head_dim_v, AMX_ROWS), left = p->seq_k - first;
    __mmask32 odd = 0;
    for (int64_t d = 0; d < dim; d += AMX_ROWS) {
        __mmask16 inside = d + AMX_ROWS <= p->head_dim_v ? 0xffff : (__mmask16)((1u << (p->head_dim_v - d)) - 1);
        __m512i x[16];
        for (int i = 0; i < 16; i++) { /* of two keys, dimension by dimension */
            __m256i key[2];
            for (int e = 0; e < 2; e++) {
                const char *row = cuflash_row(&p->v, pair / p->heads_kv, pair % p->heads_kv, first + 2 * i + e);
                key[e] = 2 * i + e < left ? _mm256_maskz_loadu_epi16(inside, row + d * 2) : _mm256_setzero_si256();
            }
            __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(key[0]), _mm512_slli_epi32(_mm512_cvtepu16_epi32(key[1]), 16));
            __m512i exponent = _mm512_and_si512(both, _mm512_set1_epi16(0x7f80));
            __mmask32 wild = _mm512_cmpeq_epi16_mask(exponent, _mm512_set1_epi16(0x7f80));
            odd |= wild | (_mm512_testn_epi16_mask(both, _mm512_set1_epi16(0x7f80)) &
                           _mm512_test_epi16_mask(both, _mm512_set1_epi16(0x7f)));
            x[i] = _mm512_mask_mov_epi16(both, wild, _mm512_setzero_si512());
        }
        for (int bit = 1; bit < 16; bit *= 2) { /* a transpose of 16 x 16: across the diagonal, of 1, 2, 4, 8 */
            const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
            __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - bit));
            __m512i high =
                _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(bit)), upper, lane, _mm512_set1_epi32(16));
            for (int i = 0; i < 16; i++) {
                if (i & bit) continue;
                __m512i a = x[i], b = x[i + bit];
                x[i] = _mm512_permutex2var_epi32(a, low, b);
                x[i + bit] = _mm512_permutex2var_epi32(a, high, b);
            }
        }
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + (d + i) * AMX_K, x[i]);
    }
    return odd ? AMX_ODD_V : 0;
}

static int amx_odd_keys(const cuflash_problem *p, int64_t pair, int64_t first, int64_t count) {
    __mmask32 odd = 0;
    for (int64_t j = 0; j < count; j++) {
        const char *row = cuflash_row(&p->k, pair / p->heads_kv, pair % p->heads_kv, first + j);
        for (int64_t d = 0; d < p->head_dim; d += 32) {
            __mmask32 inside = p->head_dim - d >= 32 ? 0xffffffff : (1u << (p->head_dim - d)) - 1;
            __m512i x = _mm512_maskz_loadu_epi16(inside, row + d * 2);
            odd |= _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x7f80)) & _mm512_test_epi16_mask(x, _mm512_set1_epi16(0x7f));
        }
    }
    return odd ? AMX_ODD_K : 0;
}

/* Packs AMX_BLOCK_N keys; `packed` is of all pairs. */
static void amx_pack(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t pair, int64_t first, void *packed) {
    int64_t dim = amx_round_up(p->head_dim_v, AMX_ROWS), left = p->seq_k - first;
    char *to = (char *)packed + pair * plan->packed_bytes;
    int odd = amx_odd_keys(p, pair, first, left < AMX_BLOCK_N ? left : AMX_BLOCK_N);
    for (int64_t key = first; key < first + AMX_BLOCK_N; key += AMX_K)
        odd |= amx_pack_keys(p, pair, key, (uint16_t *)(void *)(to + key * dim * 2));
    to[amx_value_bytes(p) + first / AMX_BLOCK_N] = (char)odd;
}

/* As attend, with the output. */
static void amx_attend(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w,
                       const amx_scratch *x, const char *packed, unsigned ticket) {
    float c = exponent_scale(p);
    int64_t dim_v = amx_round_up(p->head_dim_v, AMX_ROWS), steps = amx_round_up(p->head_dim, AMX_K) / AMX_K;
    int odd_q = amx_load_q(plan, p, block, x->q);
    const char *odd = packed + amx_value_bytes(p);
    for (int64_t r = 0; r < block->lanes; r++) w->max[r] = -INFINITY, w->sum[r] = 0;
    amx_begin();
    for (int64_t first = 0; first < block->keys && !cuflash_interrupted(ticket); first += AMX_BLOCK_N) {
        int64_t count = block->keys - first < AMX_BLOCK_N ? block->keys - first : AMX_BLOCK_N;
        amx_left k = amx_load_k(p, block, first, count, x->k);
        int odd_here = odd[first / AMX_BLOCK_N];
        amx_gemm(amx_round_up(count, 16), block->lanes, steps, &k, x->q, x->s, 0);
        if (odd_q || odd_here & AMX_ODD_K) amx_add_scores(plan, p, block, first, count, x->s);
        if (first + count > block->shared) mask_tile(block, first, count, -INFINITY, x->s);
        amx_softmax(block->lanes, x->s, x->p, count, c, w->max, w->sum, w->o_lanes, first > 0 ? p->head_dim_v : 0);
        amx_left v = {packed + first * dim_v * 2, 2 * AMX_K, AMX_ROWS * 2 * AMX_K, dim_v * 2 * AMX_K};
        amx_gemm(dim_v, block->lanes, amx_round_up(count, AMX_K) / AMX_K, &v, x->p, w->o_lanes, first > 0);
        if (odd_here & AMX_ODD_V) amx_add_values(p, block, first, count, x->p, w->o_lanes);
    }
    amx_end();
}

#endif
