/* Attention in bfloat16 by instructions that multiply pairs of numbers: the products of kernels.c, rows as lanes as everywhere, by
 * tiles (amx.h) or vectors (dots.h). A left operand has rows of k where it lies, 32 at a time; a right one has pairs of k, each of
 * all columns. So:
 *
 *   S[key][row]    = K * Q             K where it lies, pairs of d: [d / 2][row][2]
 *   O[d][row]     += V * P             V turned, [key / 32][d][32]; pairs of keys: [key / 2][row][2]
 *   dP[key][row]   = V * dO            V where it lies, pairs of d
 *   dV[key][d]    += P * dO            [key][row], pairs of rows: [row / 2][d][2]
 *   dK[key][d]    += dS * Q            the same
 *   dQ[d][row]    += K * dS            K turned, pairs of keys
 *
 * What is turned is so once, before all. Sums are float32; P and dS are rounded to bfloat16. */
#ifndef CUFLASH_CPU_BF16_H
#define CUFLASH_CPU_BF16_H

#include <immintrin.h>

#include "interrupt.h"
#include "keys.h"
#include "tile.h"

enum {
    BF16_ROWS = 16,               /* of a left operand, at least */
    BF16_K = 32,                  /* numbers of its rows at a time */
    BF16_BLOCK_N = 128,           /* keys at a time */
    BF16_PAIRS = 2 * BLOCK_M * 2, /* bytes of a pair of k, of all rows of a block */
};

/* A left operand: bytes from a row to the next, and from 32 of k to the next. */
typedef struct {
    const char *data;
    int64_t row, step;
} bf16_left;

/* Pairs: bytes from a pair of k to the next. */
typedef struct {
    const char *data;
    int64_t pair;
} bf16_right;

#ifdef __AMX_BF16__
#include "amx.h"
#else
#include "dots.h"
#endif

/* 2^x for x <= 0, within 3e-6 of it. */
static inline __m512 bf16_exp2(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT); /* -1/2 to 1/2; 0 of -infinity */
    __m512 p = _mm512_set1_ps(0.00958286420778814f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0559064537211178f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240240985954843f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693124190085566f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
}

/* Two vectors of lanes as pairs of bfloat16, rounded to the nearest, halves away from 0: by integers that is 2.5 clocks of
 * an Intel core, by the conversion and a permutation 3. */
static inline void bf16_store_pairs(char *to, __m512 first, __m512 second) {
    __m512i half = _mm512_set1_epi32(0x8000);
    __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)first, half), 16);
    _mm512_store_si512(to, _mm512_mask_mov_epi16(_mm512_add_epi32((__m512i)second, half), 0x55555555, low));
}

/* A key's V vectors of lanes, one or two, as bfloat16. */
static inline __attribute__((always_inline)) void bf16_store_row(const int V, uint16_t *to, const __m512 *x) {
    if (V == 2)
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
    else
        _mm256_store_si256((__m256i *)(void *)to, (__m256i)_mm512_cvtneps_pbh(x[0]));
}

/* Times so much, of each lane. */
static inline void bf16_scale_pairs(char *pairs, __m512 factor) {
    __m512i x = _mm512_load_si512(pairs), high = _mm512_and_si512(x, _mm512_set1_epi32((int32_t)0xffff0000));
    bf16_store_pairs(pairs, _mm512_mul_ps((__m512)_mm512_slli_epi32(x, 16), factor), _mm512_mul_ps((__m512)high, factor));
}

/* A vector of scores as probabilities: 2^((s - max) c - LESS). */
static inline __m512 bf16_probabilities(const float *s, __m512 max, __m512 c) {
    return bf16_exp2(_mm512_fmsub_ps(_mm512_sub_ps(_mm512_load_ps(s), max), c, _mm512_set1_ps(LESS)));
}

/* As softmax_lanes, of all lanes, from scores to pairs of probabilities; pairs of keys up to a multiple of 32, 0 where there
 * are none. They come behind `done` keys' that no output has yet, and that are scaled down with it. */
static inline __attribute__((always_inline)) void bf16_softmax_lanes(const int V, const float *s, char *pairs, int64_t done,
                                                                     int64_t count, float scale, float *max, float *sum,
                                                                     float *out, int64_t dim) {
    __mmask16 moved[4];
    __m512 m[4], base[4], total[4], c = _mm512_set1_ps(scale), none = _mm512_set1_ps(-INFINITY);
    for (int v = 0; v < V; v++) m[v] = _mm512_load_ps(max + v * 16);
    for (int64_t j = 0; j < count; j++)
        for (int v = 0; v < V; v++) m[v] = _mm512_max_ps(_mm512_load_ps(s + j * BLOCK_M + v * 16), m[v]);
    for (int v = 0; v < V; v++) {
        __m512 before = _mm512_load_ps(max + v * 16), above = _mm512_mul_ps(_mm512_sub_ps(m[v], before), c);
        moved[v] = _mm512_cmp_ps_mask(above, _mm512_set1_ps(MOST_EXPONENT), _CMP_GT_OQ); /* from -inf, too */
        m[v] = _mm512_mask_mov_ps(before, moved[v], m[v]);
        base[v] = _mm512_mask_mov_ps(m[v], _mm512_cmpeq_ps_mask(m[v], none), _mm512_setzero_ps());
        total[v] = _mm512_setzero_ps();
    }
    char *to = pairs + done / 2 * BF16_PAIRS;
    int64_t j = 0;
    for (; j + 2 <= count; j += 2)
        for (int v = 0; v < V; v++) {
            const float *at = s + j * BLOCK_M + v * 16;
            __m512 first = bf16_probabilities(at, base[v], c);
            __m512 second = bf16_probabilities(at + BLOCK_M, base[v], c);
            total[v] = _mm512_add_ps(total[v], _mm512_add_ps(first, second));
            bf16_store_pairs(to + j / 2 * BF16_PAIRS + v * 64, first, second);
        }
    for (; j < cuflash_round_up(count, BF16_K); j += 2)
        for (int v = 0; v < V; v++) {
            __m512 first = _mm512_setzero_ps();
            if (j < count) {
                first = bf16_probabilities(s + j * BLOCK_M + v * 16, base[v], c);
                total[v] = _mm512_add_ps(total[v], first);
            }
            bf16_store_pairs(to + j / 2 * BF16_PAIRS + v * 64, first, _mm512_setzero_ps());
        }
    for (int v = 0; v < V; v++) {
        __m512 before = _mm512_load_ps(max + v * 16);
        __m512 shrink = bf16_exp2(_mm512_mul_ps(_mm512_sub_ps(before, base[v]), c));
        _mm512_store_ps(sum + v * 16, _mm512_fmadd_ps(_mm512_load_ps(sum + v * 16), shrink, total[v]));
        _mm512_store_ps(max + v * 16, m[v]);
        if (moved[v] == 0) continue;
        for (int64_t i = 0; i < done; i += 2) bf16_scale_pairs(pairs + i / 2 * BF16_PAIRS + v * 64, shrink);
        for (int64_t d = 0; d < dim; d++) {
            float *at = out + d * BLOCK_M + v * 16;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
        }
    }
}

static void bf16_softmax(int64_t lanes, const float *s, char *pairs, int64_t done, int64_t count, float c, float *max,
                         float *sum, float *out, int64_t dim) {
    int64_t lane = 0;
    for (; lane + 64 <= lanes; lane += 64)
        bf16_softmax_lanes(4, s + lane, pairs + lane * 4, done, count, c, max + lane, sum + lane, out + lane, dim);
    for (; lane < lanes; lane += 16)
        bf16_softmax_lanes(1, s + lane, pairs + lane * 4, done, count, c, max + lane, sum + lane, out + lane, dim);
}

/* ---- Numbers that these products do not take ------------------------------------------------------
 *
 * They take denormal numbers for 0, in operands and products; and infinities and NaN must not meet the probability 0 of what hides
 * them. What meets probabilities, and is turned or in pairs of rows for that, has zeros in the place of odd numbers; in what
 * scores are made of, denormal ones are 0 already. Where there are any (hardly ever), what they come to is added by itself, so
 * that rows and keys that they do not concern have the same bits as without them. */

enum { ODD_TURNED = 1, DENORMAL_IN_PLACE = 2 }; /* there are some among 128 keys */

static int is_denormal(uint16_t x) {
    return (x & 0x7f80) == 0 && (x & 0x7f) != 0;
}

/* Below 2^-100, and not 0: times a probability that counts it may be denormal. */
enum { SMALL = (127 - 100) << 7 };

static int is_odd(uint16_t x) {
    return ((x & 0x7fff) != 0 && (x & 0x7fff) < SMALL) || (x & 0x7f80) == 0x7f80;
}

/* Which of a row's so many numbers from d on there are. */
static inline __mmask32 bf16_inside(int64_t dim, int64_t d) {
    return dim - d >= 32 ? 0xffffffff : (1u << (dim - d)) - 1;
}

/* Which of 32 numbers are. */
static inline __mmask32 odd_lanes(__m512i x) {
    __m512i size = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
    return (_mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(SMALL)) & _mm512_test_epi16_mask(size, size)) |
           _mm512_cmpge_epu16_mask(size, _mm512_set1_epi16(0x7f80));
}

/* The smallest size of numbers but 0, less 1, and the largest, of 32 lanes: whether any of them is denormal, or odd. */
typedef struct {
    __m512i least, most;
} bf16_sizes;

static const bf16_sizes bf16_no_sizes = {{-1, -1, -1, -1, -1, -1, -1, -1}, {0}};

/* Those of a row, too. */
static inline void bf16_add_sizes(bf16_sizes *sizes, const void *row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 32) {
        __m512i x = _mm512_maskz_loadu_epi16(bf16_inside(dim, d), (const uint16_t *)row + d);
        x = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
        sizes->least = _mm512_min_epu16(sizes->least, _mm512_sub_epi16(x, _mm512_set1_epi16(1)));
        sizes->most = _mm512_max_epu16(sizes->most, x);
    }
}

static int some_denormal(const bf16_sizes *sizes) {
    return _mm512_cmplt_epu16_mask(sizes->least, _mm512_set1_epi16(0x7f)) != 0;
}

static int some_odd(const bf16_sizes *sizes) {
    return (_mm512_cmplt_epu16_mask(sizes->least, _mm512_set1_epi16(SMALL - 1)) |
            _mm512_cmpge_epu16_mask(sizes->most, _mm512_set1_epi16(0x7f80))) != 0;
}

static const uint16_t *bf16_key_row(const row_block *block, const cuflash_operand *x, int64_t key) {
    return (const uint16_t *)(const void *)cuflash_row(x, block->batch, block->head_kv, key);
}

static const uint16_t *bf16_query_row(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x,
                                      int64_t r) {
    return (const uint16_t *)(const void *)row_address(plan, block, x, r);
}

/* s[key][row] += x y over the denormal numbers of keys' x and rows' y; s has rows of s_row numbers. */
static void bf16_add_scores(const cuflash_cpu_plan *plan, const row_block *block, int64_t first, int64_t count,
                            const cuflash_operand *keys, const cuflash_operand *rows, int64_t dim, float factor, float *s,
                            int64_t s_row) {
    for (int64_t r = 0; r < block->rows; r++) {
        const uint16_t *y = bf16_query_row(plan, block, rows, r);
        for (int64_t j = 0; j < count; j++) {
            const uint16_t *x = bf16_key_row(block, keys, first + j);
            for (int64_t d = 0; d < dim; d++)
                if (is_denormal(x[d]) || is_denormal(y[d]))
                    s[j * s_row + r] += factor * cuflash_bfloat_to_float(x[d]) * cuflash_bfloat_to_float(y[d]);
        }
    }
}

/* out[d][row] += x weight over the odd numbers of keys' x. */
static void bf16_add_to_lanes(const row_block *block, int64_t first, int64_t count, const cuflash_operand *keys, int64_t dim,
                              const char *pairs, float *out) {
    const uint16_t *weight = (const uint16_t *)(const void *)pairs;
    for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < dim; d++) {
            uint16_t x = bf16_key_row(block, keys, first + j)[d];
            if (!is_odd(x)) continue;
            for (int64_t r = 0; r < block->rows; r++)
                if (block->limit[r] > first + j)
                    out[d * BLOCK_M + r] +=
                        cuflash_bfloat_to_float(weight[j / 2 * (BF16_PAIRS / 2) + r * 2 + j % 2]) * cuflash_bfloat_to_float(x);
        }
}

/* Columns of P and dS of a backward: rows of all blocks that go through the keys together. */
static int64_t bf16_columns(const cuflash_cpu_plan *plan) {
    return plan->together * BLOCK_M;
}

/* out[key][d] += weight[key][row] y over the odd numbers of rows' y. */
static void bf16_add_to_keys(const cuflash_cpu_plan *plan, const row_block *block, int64_t first, int64_t count,
                             const cuflash_operand *rows, int64_t dim, const char *weights, float *out, int64_t pad) {
    const uint16_t *weight = (const uint16_t *)(const void *)weights;
    for (int64_t r = 0; r < block->rows; r++)
        for (int64_t d = 0; d < dim; d++) {
            uint16_t y = bf16_query_row(plan, block, rows, r)[d];
            if (!is_odd(y)) continue;
            for (int64_t j = 0; j < count && block->limit[r] > first + j; j++)
                out[j * pad + d] += cuflash_bfloat_to_float(weight[j * bf16_columns(plan) + r]) * cuflash_bfloat_to_float(y);
        }
}

/* ---- A block of rows ---------------------------------------------------------------------------- */

/* What a thread works in; in a backward the next block that goes through the keys with this one has what lies behind it, or in
 * the next columns. */
typedef struct {
    char *q, *d_o;           /* pairs of d: [dim / 2][BLOCK_M][2] */
    char *q_rows, *d_o_rows; /* pairs of rows: [BLOCK_M / 2][pad][2] */
    char *k, *v;             /* tiles of keys, padded */
    char *pairs;             /* of keys, of P or dS: [BF16_BLOCK_N / 2][BLOCK_M][2] */
    char *p, *ds;            /* [BF16_BLOCK_N][bf16_columns] */
    float *s, *dp;           /* [BF16_BLOCK_N][BLOCK_M]; forward, of BF16_SCORES_N keys */
} bf16_scratch;

static int64_t bf16_lay_out(const cuflash_cpu_plan *plan, const cuflash_problem *p, float *base, bf16_scratch *w) {
    int64_t used = 0, dim = cuflash_round_up(p->head_dim, BF16_K), dim_v = cuflash_round_up(p->head_dim_v, BF16_K);
    int64_t rows = bf16_columns(plan);
    char *at = (char *)base;
#define TAKE(name, bytes) w->name = (void *)(at + used), used += ((bytes) + 63) / 64 * 64
    TAKE(q, dim * rows * 2);
    TAKE(k, BF16_BLOCK_N * dim * 2);
    TAKE(pairs, BF16_BLOCK_N * BLOCK_M * 2);
    TAKE(s, (plan->pass == CUFLASH_FORWARD ? BF16_SCORES_N : BF16_BLOCK_N) * BLOCK_M * 4);
    if (plan->pass == CUFLASH_FORWARD) return used / 4;
    TAKE(d_o, dim_v * rows * 2);
    TAKE(q_rows, plan->pad_d * rows * 2);
    TAKE(d_o_rows, plan->pad_dv * rows * 2);
    TAKE(v, BF16_BLOCK_N * dim_v * 2);
    TAKE(p, BF16_BLOCK_N * rows * 2);
    TAKE(ds, BF16_BLOCK_N * rows * 2);
    TAKE(dp, BF16_BLOCK_N * BLOCK_M * 4);
#undef TAKE
    return used / 4;
}

/* A backward's of block `index` of those that go through the keys together. */
static bf16_scratch bf16_scratch_of_block(const cuflash_cpu_plan *plan, const cuflash_problem *p, const bf16_scratch *first,
                                          int64_t index) {
    bf16_scratch x = *first;
    x.q += index * cuflash_round_up(p->head_dim, BF16_K) * BLOCK_M * 2;
    x.d_o += index * cuflash_round_up(p->head_dim_v, BF16_K) * BLOCK_M * 2;
    x.q_rows += index * plan->pad_d * BLOCK_M * 2;
    x.d_o_rows += index * plan->pad_dv * BLOCK_M * 2;
    x.p += index * BLOCK_M * 2;
    x.ds += index * BLOCK_M * 2;
    return x;
}

/* The block's rows of x, NULL where a lane has none, and whether there are denormal or odd numbers among them. */
typedef struct {
    const uint16_t *at[BLOCK_M];
    int denormal, odd;
} bf16_rows;

static bf16_rows bf16_rows_of(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x, int64_t dim) {
    bf16_rows rows;
    bf16_sizes sizes = bf16_no_sizes;
    for (int64_t r = 0; r < BLOCK_M; r++) {
        rows.at[r] = r < block->rows ? bf16_query_row(plan, block, x, r) : NULL;
        if (rows.at[r]) bf16_add_sizes(&sizes, rows.at[r], dim);
    }
    rows.denormal = some_denormal(&sizes);
    rows.odd = some_odd(&sizes);
    return rows;
}

/* Rows, times 1, -1 or 0, as pairs of d. */
static void bf16_load_pairs(const bf16_rows *rows, int64_t lanes, int64_t dim, float factor, char *to) {
    if (factor == 0 || lanes < BLOCK_M) memset(to, 0, (size_t)(cuflash_round_up(dim, BF16_K) * BLOCK_M * 2));
    for (int64_t lane = 0; lane < lanes && factor != 0; lane += 16)
        for (int64_t d = 0; d < dim; d += 32) {
            __mmask32 inside = bf16_inside(dim, d);
            __m512i sign = _mm512_maskz_set1_epi16(inside, factor < 0 ? (int16_t)0x8000 : 0);
            vf pairs[16];
            for (int i = 0; i < 16; i++) {
                const uint16_t *row = rows->at[lane + i];
                pairs[i] = row ? (vf)_mm512_xor_si512(_mm512_maskz_loadu_epi16(inside, row + d), sign) : (vf){0};
            }
            v_transpose(pairs);
            for (int i = 0; i < 16; i++) v_store((float *)(void *)(to + (d / 2 + i) * BF16_PAIRS) + lane, pairs[i]);
        }
}

/* 16 numbers of two rows, number by number; zeros for those that are odd, if some are. */
static inline __m512i bf16_pair_rows(__m256i first, __m256i second, int odd) {
    __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
    return odd ? _mm512_mask_mov_epi16(both, odd_lanes(both), _mm512_setzero_si512()) : both;
}

/* Rows as pairs of rows, with zeros for odd numbers. */
static void bf16_load_row_pairs(const bf16_rows *rows, int64_t dim, int64_t pad, char *to) {
    for (int64_t r = 0; r < BLOCK_M; r += 2)
        for (int64_t d = 0; d < pad; d += 16, to += 64) {
            __mmask16 inside = (__mmask16)bf16_inside(dim, d);
            __m256i part[2];
            for (int e = 0; e < 2; e++)
                part[e] = rows->at[r + e] ? _mm256_maskz_loadu_epi16(inside, rows->at[r + e] + d) : _mm256_setzero_si256();
            _mm512_storeu_si512(to, bf16_pair_rows(part[0], part[1], rows->odd));
        }
}

/* Rows of K or V as left operands: in place where they are whole tiles. */
static bf16_left bf16_load_keys(const row_block *block, const cuflash_operand *x, int64_t first, int64_t count, int64_t dim,
                                char *buffer) {
    const char *rows = cuflash_row(x, block->batch, block->head_kv, first);
    int64_t step = x->seq * 2, whole = cuflash_round_up(dim, BF16_K);
    if (dim == whole && count % 16 == 0) return (bf16_left){rows, step, 64};
    memset(buffer, 0, (size_t)(cuflash_round_up(count, 16) * whole * 2));
    for (int64_t j = 0; j < count; j++) memcpy(buffer + j * whole * 2, rows + j * step, (size_t)dim * 2);
    return (bf16_left){buffer, whole * 2, 64};
}

/* s[key][row] = x y, of keys' x and rows' y, which are the pairs; `denormal`: there are some in either. */
static void bf16_multiply_rows(const cuflash_cpu_plan *plan, const row_block *block, int64_t first, int64_t count,
                               const cuflash_operand *keys, char *buffer, const cuflash_operand *rows, const char *pairs,
                               int64_t dim, float factor, int denormal, float *s) {
    bf16_left x = bf16_load_keys(block, keys, first, count, dim, buffer);
    bf16_gemm(cuflash_round_up(count, 16), block->lanes, cuflash_round_up(dim, BF16_K) / BF16_K, x,
              (bf16_right){pairs, BF16_PAIRS}, s, BLOCK_M, 0);
    if (denormal) bf16_add_scores(plan, block, first, count, keys, rows, dim, factor, s, BLOCK_M);
}

static bf16_left bf16_turned_keys(const char *packed, int64_t first, int64_t dim) {
    return (bf16_left){packed + first * dim * 2, 2 * BF16_K, dim * 2 * BF16_K};
}

/* ---- Packing ------------------------------------------------------------------------------------ */

/* What is turned: V forward, K backward; the other one is read in place. */
typedef struct {
    const cuflash_operand *turned, *in_place;
    int64_t turned_dim, in_place_dim, dim; /* dim: turned_dim rounded up to whole tiles */
} bf16_operands;

static bf16_operands bf16_operands_of(const cuflash_cpu_plan *plan, const cuflash_problem *p) {
    bool v = plan->pass == CUFLASH_FORWARD;
    int64_t dim = v ? p->head_dim_v : p->head_dim;
    return (bf16_operands){v ? &p->v : &p->k, v ? &p->k : &p->v, dim, v ? p->head_dim : p->head_dim_v,
                           cuflash_round_up(dim, BF16_ROWS)};
}

/* Bytes of a pair's turned operand; behind them a byte for each 128 keys says what is odd among them. */
static int64_t bf16_turned_bytes(const cuflash_cpu_plan *plan, const cuflash_problem *p) {
    return cuflash_round_up(p->seq_k, BF16_BLOCK_N) * bf16_operands_of(plan, p).dim * 2;
}

static int64_t bf16_packed_bytes(const cuflash_cpu_plan *plan, const cuflash_problem *p) {
    return bf16_turned_bytes(plan, p) + cuflash_round_up(cuflash_key_blocks(p, BF16_BLOCK_N), 64);
}

/* Turns 32 keys, [key][d], to [d][32]: 16 dimensions at a time, as 32-bit pairs of keys; with zeros for odd numbers. */
static void bf16_turn_keys(const cuflash_problem *p, const bf16_operands *of, int64_t pair, int64_t first, int odd,
                           uint16_t *to) {
    const char *rows[BF16_K];
    for (int64_t i = 0; i < BF16_K; i++)
        rows[i] = first + i < p->seq_k ? cuflash_row(of->turned, pair / p->heads_kv, pair % p->heads_kv, first + i) : NULL;
    for (int64_t d = 0; d < of->dim; d += BF16_ROWS) {
        __mmask16 inside = (__mmask16)bf16_inside(of->turned_dim, d);
        vf x[16];
        for (int i = 0; i < 16; i++) { /* of two keys, dimension by dimension */
            __m256i key[2];
            for (int e = 0; e < 2; e++)
                key[e] = rows[2 * i + e] ? _mm256_maskz_loadu_epi16(inside, rows[2 * i + e] + d * 2) : _mm256_setzero_si256();
            x[i] = (vf)bf16_pair_rows(key[0], key[1], odd);
        }
        v_transpose(x);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + (d + i) * BF16_K, (__m512i)x[i]);
    }
}

static bf16_sizes bf16_sizes_of_keys(const cuflash_problem *p, const cuflash_operand *x, int64_t pair, int64_t first,
                                     int64_t count, int64_t dim) {
    bf16_sizes sizes = bf16_no_sizes;
    for (int64_t key = first; key < first + count; key++)
        bf16_add_sizes(&sizes, cuflash_row(x, pair / p->heads_kv, pair % p->heads_kv, key), dim);
    return sizes;
}

/* Packs BF16_BLOCK_N keys. */
static void bf16_pack(const cuflash_cpu_work *work, int64_t unit, float *unused) {
    (void)unused;
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    bf16_operands of = bf16_operands_of(plan, p);
    int64_t blocks = cuflash_key_blocks(p, BF16_BLOCK_N), pair = unit / blocks, first = unit % blocks * BF16_BLOCK_N;
    int64_t count = p->seq_k - first < BF16_BLOCK_N ? p->seq_k - first : BF16_BLOCK_N;
    bf16_sizes turned = bf16_sizes_of_keys(p, of.turned, pair, first, count, of.turned_dim);
    bf16_sizes in_place = bf16_sizes_of_keys(p, of.in_place, pair, first, count, of.in_place_dim);
    int odd = some_odd(&turned);
    char *to = work->packed + pair * plan->packed_bytes;
    for (int64_t key = first; key < first + BF16_BLOCK_N; key += BF16_K)
        bf16_turn_keys(p, &of, pair, key, odd, (uint16_t *)(void *)(to + key * of.dim * 2));
    to[bf16_turned_bytes(plan, p) + first / BF16_BLOCK_N] =
        (char)((odd ? ODD_TURNED : 0) | (some_denormal(&in_place) ? DENORMAL_IN_PLACE : 0));
}

static const char *bf16_packed_keys(const cuflash_cpu_work *work, const row_block *block) {
    return work->packed + (block->batch * work->p->heads_kv + block->head_kv) * work->plan->packed_bytes;
}

/* ---- Forward ------------------------------------------------------------------------------------ */

/* As attend, with the output. */
static void bf16_attend(const cuflash_cpu_work *work, const row_block *block, const scratch *w, float *more) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    bf16_scratch x;
    bf16_lay_out(plan, p, more, &x);
    float c = exponent_scale(p), factor = query_factor(p);
    int64_t dim_v = cuflash_round_up(p->head_dim_v, BF16_ROWS);
    const char *packed = bf16_packed_keys(work, block), *odd = packed + bf16_turned_bytes(plan, p);
    bf16_rows q = bf16_rows_of(plan, block, &p->q, p->head_dim);
    int denormal_q = q.denormal && factor != 0;
    bf16_load_pairs(&q, block->lanes, p->head_dim, factor, x.q);
    bf16_right probabilities = {x.pairs, BF16_PAIRS};
    forget(block, w);
    bf16_begin();
    for (int64_t first = 0; first < block->keys && !cuflash_interrupted(work->ticket); first += BF16_BLOCK_N) {
        int64_t count = block->keys - first < BF16_BLOCK_N ? block->keys - first : BF16_BLOCK_N;
        int odd_here = odd[first / BF16_BLOCK_N];
        for (int64_t done = 0; done < count; done += BF16_SCORES_N) {
            int64_t key = first + done, keys = count - done < BF16_SCORES_N ? count - done : BF16_SCORES_N;
            bf16_multiply_rows(plan, block, key, keys, &p->k, x.k, &p->q, x.q, p->head_dim, factor,
                               denormal_q || odd_here & DENORMAL_IN_PLACE, x.s);
            if (key + keys > block->shared) mask_tile(block, key, keys, -INFINITY, x.s);
            bf16_softmax(block->lanes, x.s, x.pairs, done, keys, c, w->max, w->sum, w->o_lanes, first > 0 ? p->head_dim_v : 0);
        }
        bf16_gemm(dim_v, block->lanes, cuflash_round_up(count, BF16_K) / BF16_K, bf16_turned_keys(packed, first, dim_v),
                  probabilities, w->o_lanes, BLOCK_M, first > 0);
        if (odd_here & ODD_TURNED) bf16_add_to_lanes(block, first, count, &p->v, p->head_dim_v, x.pairs, w->o_lanes);
    }
    bf16_end();
}

/* ---- Backward ----------------------------------------------------------------------------------- */

/* Whether there are denormal numbers in what scores and dP of a block are made of, and odd ones in the pairs of its rows. */
typedef struct {
    int q_pairs, d_o_pairs, q_rows, d_o_rows;
} bf16_odd_rows;

/* P and dS of so many keys, two at a time, of V vectors of lanes, from scores and dP; 0 where a row does not see a key, where a
 * lane has no row, and up to `filled` keys. */
static inline __attribute__((always_inline)) void bf16_gradient_lanes(const int V, const int masked, const row_block *block,
                                                                      int64_t lane, int64_t first, int64_t count,
                                                                      int64_t filled, int64_t columns, float scale,
                                                                      const scratch *w, const bf16_scratch *x) {
    __m512 c = _mm512_set1_ps(scale), max[2], shift[2], delta[2];
    __m512i limit[2]; /* keys of these, by lane */
    uint16_t *p = (uint16_t *)(void *)x->p + lane, *ds = (uint16_t *)(void *)x->ds + lane;
    char *pairs = x->pairs + lane * 4;
    for (int v = 0; v < V; v++) {
        int64_t at = lane + v * 16, rows = block->rows - at;
        __mmask16 there = rows >= 16 ? 0xffff : (__mmask16)((1u << rows) - 1);
        max[v] = _mm512_load_ps(w->max + at);
        shift[v] = _mm512_load_ps(w->shift + at);
        delta[v] = _mm512_load_ps(w->delta + at);
        limit[v] = masked ? _mm512_maskz_mov_epi32(there, (__m512i)seen_keys(block, at, first, count)) : _mm512_setzero_si512();
    }
    for (int64_t j = 0; j < filled; j += 2) {
        __m512 prob[2][2], gradient[2][2];
        for (int e = 0; e < 2; e++) {
            for (int v = 0; v < V; v++) {
                prob[e][v] = gradient[e][v] = _mm512_setzero_ps();
                if (j + e >= count) continue;
                const float *s = x->s + (j + e) * BLOCK_M + lane + v * 16, *dp = x->dp + (j + e) * BLOCK_M + lane + v * 16;
                prob[e][v] = bf16_exp2(_mm512_fmadd_ps(_mm512_sub_ps(_mm512_load_ps(s), max[v]), c, shift[v]));
                gradient[e][v] = _mm512_mul_ps(prob[e][v], _mm512_sub_ps(_mm512_load_ps(dp), delta[v]));
                if (!masked) continue;
                __mmask16 sees = _mm512_cmpgt_epi32_mask(limit[v], _mm512_set1_epi32((int32_t)(j + e)));
                prob[e][v] = _mm512_maskz_mov_ps(sees, prob[e][v]);
                gradient[e][v] = _mm512_maskz_mov_ps(sees, gradient[e][v]);
            }
            bf16_store_row(V, p + (j + e) * columns, prob[e]);
            bf16_store_row(V, ds + (j + e) * columns, gradient[e]);
        }
        for (int v = 0; v < V; v++) bf16_store_pairs(pairs + j / 2 * BF16_PAIRS + v * 64, gradient[0][v], gradient[1][v]);
    }
}

static inline __attribute__((always_inline)) void bf16_gradients(const int masked, const row_block *block, int64_t first,
                                                                 int64_t count, int64_t filled, int64_t columns, float c,
                                                                 const scratch *w, const bf16_scratch *x) {
    int64_t lane = 0;
    for (; lane + 32 <= block->lanes; lane += 32)
        bf16_gradient_lanes(2, masked, block, lane, first, count, filled, columns, c, w, x);
    if (lane < block->lanes) bf16_gradient_lanes(1, masked, block, lane, first, count, filled, columns, c, w, x);
}

/* P and dS of a block and so many keys, up to `filled` of them, and what they are to dq. */
static void bf16_backward_rows(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, int64_t first,
                               int64_t count, int64_t filled, bf16_odd_rows odd, int odd_keys, const char *packed, int add_dq,
                               const scratch *w, const bf16_scratch *x) {
    int64_t dim = cuflash_round_up(p->head_dim, BF16_ROWS), columns = bf16_columns(plan);
    bf16_multiply_rows(plan, block, first, count, &p->k, x->k, &p->q, x->q, p->head_dim, query_factor(p),
                       odd.q_pairs || odd_keys & ODD_TURNED, x->s);
    bf16_multiply_rows(plan, block, first, count, &p->v, x->v, &p->d_o, x->d_o, p->head_dim_v, 1,
                       odd.d_o_pairs || odd_keys & DENORMAL_IN_PLACE, x->dp);
    if (first + count > block->shared || block->rows < block->lanes)
        bf16_gradients(1, block, first, count, filled, columns, exponent_scale(p), w, x);
    else
        bf16_gradients(0, block, first, count, filled, columns, exponent_scale(p), w, x);
    if (!p->dq.data) return;
    bf16_gemm(dim, block->lanes, cuflash_round_up(count, BF16_K) / BF16_K, bf16_turned_keys(packed, first, dim),
              (bf16_right){x->pairs, BF16_PAIRS}, w->dq_lanes, BLOCK_M, add_dq);
    if (odd_keys & ODD_TURNED) bf16_add_to_lanes(block, first, count, &p->k, p->head_dim, x->pairs, w->dq_lanes);
}

/* As backward_block, of n row blocks together: what they are to dk and dv is one product of the rows of all. */
static void bf16_backward_blocks(const cuflash_cpu_work *work, const row_block *blocks, const scratch *w, int64_t n,
                                 float *more, int64_t begin, int add, key_sums all) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    bf16_scratch x[CUFLASH_MOST_TOGETHER];
    bf16_odd_rows odd[CUFLASH_MOST_TOGETHER];
    bf16_lay_out(plan, p, more, &x[0]);
    const char *packed = bf16_packed_keys(work, &blocks[0]), *odd_keys = packed + bf16_turned_bytes(plan, p);
    const int64_t columns = bf16_columns(plan);
    for (int64_t i = 0; i < n; i++) {
        x[i] = bf16_scratch_of_block(plan, p, &x[0], i);
        bf16_rows q = bf16_rows_of(plan, &blocks[i], &p->q, p->head_dim);
        bf16_rows d_o = bf16_rows_of(plan, &blocks[i], &p->d_o, p->head_dim_v);
        bf16_load_pairs(&q, blocks[i].lanes, p->head_dim, query_factor(p), x[i].q);
        bf16_load_pairs(&d_o, blocks[i].lanes, p->head_dim_v, 1, x[i].d_o);
        bf16_load_row_pairs(&q, p->head_dim, plan->pad_d, x[i].q_rows);
        bf16_load_row_pairs(&d_o, p->head_dim_v, plan->pad_dv, x[i].d_o_rows);
        odd[i] = (bf16_odd_rows){q.denormal && query_factor(p) != 0, d_o.denormal, q.odd, d_o.odd};
    }
    if (blocks[0].lanes < BLOCK_M) { /* columns of P and dS that no lane writes: the pair's last block has them */
        memset(x[0].p, 0, (size_t)(BF16_BLOCK_N * columns * 2));
        memset(x[0].ds, 0, (size_t)(BF16_BLOCK_N * columns * 2));
    }
    bf16_begin();
    for (int64_t first = begin; first < blocks[0].keys && !cuflash_interrupted(work->ticket); first += BF16_BLOCK_N) {
        int64_t count = blocks[0].keys - first < BF16_BLOCK_N ? blocks[0].keys - first : BF16_BLOCK_N, see = 0;
        for (; see < n && blocks[see].keys > first; see++) {
            int64_t some = blocks[see].keys - first < count ? blocks[see].keys - first : count;
            bf16_backward_rows(plan, p, &blocks[see], first, some, cuflash_round_up(count, BF16_K), odd[see],
                               odd_keys[first / BF16_BLOCK_N], packed, first > begin, &w[see], &x[see]);
        }
        int64_t keys = cuflash_round_up(count, 16), rows = (see - 1) * BLOCK_M + blocks[see - 1].rows;
        int64_t steps = cuflash_round_up(rows, BF16_K) / BF16_K;
        key_sums sums = sums_of_tile(plan, all, first);
        if (p->dv.data) {
            bf16_gemm(keys, plan->pad_dv, steps, (bf16_left){x[0].p, columns * 2, 64},
                      (bf16_right){x[0].d_o_rows, plan->pad_dv * 4}, sums.dv, plan->pad_dv, add);
            for (int64_t i = 0; i < see; i++)
                if (odd[i].d_o_rows)
                    bf16_add_to_keys(plan, &blocks[i], first, count, &p->d_o, p->head_dim_v, x[i].p, sums.dv, plan->pad_dv);
        }
        if (p->dk.data) {
            bf16_gemm(keys, plan->pad_d, steps, (bf16_left){x[0].ds, columns * 2, 64},
                      (bf16_right){x[0].q_rows, plan->pad_d * 4}, sums.dk, plan->pad_d, add);
            for (int64_t i = 0; i < see; i++)
                if (odd[i].q_rows)
                    bf16_add_to_keys(plan, &blocks[i], first, count, &p->q, p->head_dim, x[i].ds, sums.dk, plan->pad_d);
        }
        if (cuflash_keys_at_once(plan)) store_keys(plan, p, blocks[0].batch, blocks[0].head_kv, first, count, sums);
    }
    bf16_end();
}

#endif
