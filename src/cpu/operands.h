/* Q, K, V and dO as operands of products of pairs: rows of a block are laid out by the unit that takes it, and keys, where they
 * are not read in place, are packed once, before all. */
#ifndef CUFLASH_CPU_OPERANDS_H
#define CUFLASH_CPU_OPERANDS_H

#include "pairs.h"

/* ---- A block of rows ---------------------------------------------------------------------------- */

/* What a thread works in; in a backward the next block that goes through the keys with this one has what lies behind it, or in
 * the next columns. */
typedef struct {
    char *q, *d_o;           /* pairs of d: [planes][dim / 2][BLOCK_M][2] */
    char *q_rows, *d_o_rows; /* pairs of rows: [planes][bf16_columns / 2][pad][2] */
    char *k, *v;             /* tiles of keys, padded, where they are not packed */
    char *pairs;             /* of keys, of P or dS: [planes][BF16_BLOCK_N / 2][BLOCK_M][2] */
    char *p, *ds;            /* [BF16_BLOCK_N][planes][bf16_columns] */
    float *s, *dp;           /* [BF16_BLOCK_N][BLOCK_M]; forward, of BF16_SCORES_N keys */
    int8_t *infinite;        /* [BF16_BLOCK_N][bf16_columns]: where dS is infinite, its sign */
} bf16_scratch;

static int64_t bf16_lay_out(const cuflash_cpu_plan *plan, const cuflash_problem *p, float *base, bf16_scratch *w) {
    int64_t used = 0, dim = cuflash_round_up(p->head_dim, BF16_K), dim_v = cuflash_round_up(p->head_dim_v, BF16_K);
    int64_t rows = bf16_columns(plan) * plan->planes;
    char *at = (char *)base;
#define TAKE(name, bytes) w->name = (void *)(at + used), used += ((bytes) + 63) / 64 * 64
    TAKE(q, dim * rows * 2);
    TAKE(k, BF16_BLOCK_N * dim * 2);
    TAKE(pairs, BF16_PAIRS_PLANE * plan->planes);
    TAKE(s, (plan->pass == CUFLASH_FORWARD ? BF16_SCORES_N : BF16_BLOCK_N) * BLOCK_M * 4);
    if (plan->pass == CUFLASH_FORWARD) return used / 4;
    TAKE(d_o, dim_v * rows * 2);
    TAKE(q_rows, plan->pad_d * rows * 2);
    TAKE(d_o_rows, plan->pad_dv * rows * 2);
    TAKE(v, BF16_BLOCK_N * dim_v * 2);
    TAKE(p, BF16_BLOCK_N * rows * 2);
    TAKE(ds, BF16_BLOCK_N * rows * 2);
    TAKE(dp, BF16_BLOCK_N * BLOCK_M * 4);
    TAKE(infinite, BF16_BLOCK_N * rows);
#undef TAKE
    return used / 4;
}

/* That of block `index` of those that go through the keys together. */
static bf16_scratch bf16_scratch_of_block(const cuflash_cpu_plan *plan, const cuflash_problem *p, const bf16_scratch *first,
                                          int64_t index) {
    bf16_scratch x = *first;
    x.q += index * plan->planes * cuflash_round_up(p->head_dim, BF16_K) * BLOCK_M * 2;
    if (plan->pass == CUFLASH_FORWARD) return x;
    x.d_o += index * plan->planes * cuflash_round_up(p->head_dim_v, BF16_K) * BLOCK_M * 2;
    x.q_rows += index * plan->pad_d * BLOCK_M * 2;
    x.d_o_rows += index * plan->pad_dv * BLOCK_M * 2;
    x.p += index * BLOCK_M * 2;
    x.ds += index * BLOCK_M * 2;
    x.infinite += index * BLOCK_M;
    return x;
}

/* 32 numbers of a row, or none, in N planes: one of bfloat16, two of float16; zeros for odd ones, if there are some, and for
 * infinities and NaN of float16. */
static inline __attribute__((always_inline)) void bf16_load(const int N, const uint16_t *row, int64_t d, __mmask32 inside,
                                                            int odd, __m512i *planes) {
    __m512i x = row ? _mm512_maskz_loadu_epi16(inside, row + d) : _mm512_setzero_si512();
    if (N == 1) {
        planes[0] = odd ? _mm512_mask_mov_epi16(x, odd_lanes(x), _mm512_setzero_si512()) : x;
        return;
    }
    __m512i size = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
    x = _mm512_maskz_mov_epi16(_mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(HALF_INFINITY)), x);
    __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(x)), high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
    planes[0] = bf16_round(&low, &high, 1);
    planes[1] = bf16_round(&low, &high, 0);
}

/* The block's rows of x, NULL where a lane has none, and whether there are missing or odd numbers among them. */
typedef struct {
    const uint16_t *at[BLOCK_M];
    int missing, odd;
} bf16_rows;

static bf16_rows bf16_rows_of(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x, int64_t dim) {
    bf16_rows rows = {0};
    bf16_sizes sizes = bf16_no_sizes;
    for (int64_t r = 0; r < block->rows; r++) {
        rows.at[r] = bf16_query_row(plan, block, x, r);
        bf16_add_sizes(&sizes, rows.at[r], dim);
    }
    rows.missing = some_missing(x->dtype, &sizes);
    rows.odd = some_odd(x->dtype, &sizes);
    return rows;
}

/* Rows, times 1, -1 or 0, as pairs of d. */
static inline __attribute__((always_inline)) void bf16_load_pairs(const int N, const bf16_rows *rows, int64_t lanes,
                                                                  int64_t dim, float factor, char *to) {
    int64_t plane = cuflash_round_up(dim, BF16_K) * BLOCK_M * 2;
    if (factor == 0 || lanes < BLOCK_M) memset(to, 0, (size_t)(N * plane));
    for (int64_t lane = 0; lane < lanes && factor != 0; lane += 16)
        for (int64_t d = 0; d < dim; d += 32) {
            __mmask32 inside = bf16_inside(dim, d);
            __m512i sign = _mm512_maskz_set1_epi16(inside, factor < 0 ? (int16_t)0x8000 : 0), planes[BF16_MOST_PLANES];
            vf pairs[BF16_MOST_PLANES][16];
            for (int i = 0; i < 16; i++) {
                bf16_load(N, rows->at[lane + i], d, inside, 0, planes);
                for (int q = 0; q < N; q++) pairs[q][i] = (vf)_mm512_xor_si512(planes[q], sign);
            }
            for (int q = 0; q < N; q++) {
                v_transpose(pairs[q]);
                for (int i = 0; i < 16; i++)
                    v_store((float *)(void *)(to + q * plane + (d / 2 + i) * BF16_PAIRS) + lane, pairs[q][i]);
            }
        }
}

/* 16 numbers of two rows, the first or the last of 32, number by number. */
static inline __m512i bf16_pair_rows(__m512i first, __m512i second, int last) {
    __m256i a = last ? _mm512_extracti64x4_epi64(first, 1) : _mm512_castsi512_si256(first);
    __m256i b = last ? _mm512_extracti64x4_epi64(second, 1) : _mm512_castsi512_si256(second);
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

/* Rows as pairs of rows, with zeros for odd numbers; so many bytes from a plane to the next. */
static inline __attribute__((always_inline)) void bf16_load_row_pairs(const int N, const bf16_rows *rows, int64_t dim,
                                                                      int64_t pad, int64_t plane, char *to) {
    for (int64_t r = 0; r < BLOCK_M; r += 2, to += pad * 4)
        for (int64_t d = 0; d < pad; d += 32) {
            __mmask32 inside = bf16_inside(dim, d);
            __m512i one[BF16_MOST_PLANES], two[BF16_MOST_PLANES];
            bf16_load(N, rows->at[r], d, inside, rows->odd, one);
            bf16_load(N, rows->at[r + 1], d, inside, rows->odd, two);
            for (int q = 0; q < N; q++)
                for (int last = 0; last < 2 && d + 16 * last < pad; last++)
                    _mm512_storeu_si512(to + q * plane + (d + 16 * last) * 4, bf16_pair_rows(one[q], two[q], last));
        }
}

/* Rows of K or V as left operands: in place where they are whole tiles, or from where they are packed. */
static bf16_left bf16_load_keys(const row_block *block, const cuflash_operand *x, const char *packed, int64_t first,
                                int64_t count, int64_t dim, char *buffer) {
    int64_t step = x->seq * 2, whole = cuflash_round_up(dim, BF16_K), packed_row = BF16_MOST_PLANES * whole * 2;
    if (packed) return (bf16_left){packed + first * packed_row, packed_row, 64, whole * 2};
    const char *rows = cuflash_row(x, block->batch, block->head_kv, first);
    if (dim == whole && count % 16 == 0) return (bf16_left){rows, step, 64, 0};
    memset(buffer, 0, (size_t)(cuflash_round_up(count, 16) * whole * 2));
    for (int64_t j = 0; j < count; j++) memcpy(buffer + j * whole * 2, rows + j * step, (size_t)dim * 2);
    return (bf16_left){buffer, whole * 2, 64, 0};
}

/* s[key][row] = x y, of keys' x and rows' y, which are the pairs; `missing`: there are such numbers in either. */
static void bf16_multiply_rows(const cuflash_cpu_plan *plan, const row_block *block, int64_t first, int64_t count,
                               const cuflash_operand *keys, const char *packed, char *buffer, const cuflash_operand *rows,
                               const char *pairs, int64_t dim, float factor, int missing, float *s) {
    int64_t whole = cuflash_round_up(dim, BF16_K);
    bf16_left x = bf16_load_keys(block, keys, packed, first, count, dim, buffer);
    bf16_gemm(cuflash_round_up(count, 16), block->lanes, whole / BF16_K, x,
              (bf16_right){pairs, BF16_PAIRS, whole * BLOCK_M * 2}, plan->planes == 1 ? BF16_ONE_TERM : BF16_ALL_TERMS, s,
              BLOCK_M, 0);
    if (missing) bf16_add_scores(plan, block, first, count, keys, rows, dim, factor, s, BLOCK_M);
}

/* Terms of the other products. */
static int bf16_terms_of(const cuflash_cpu_plan *plan) {
    return plan->planes == 1 ? BF16_ONE_TERM : BF16_MOST_TERMS;
}

static bf16_left bf16_turned_keys(const cuflash_cpu_plan *plan, const char *packed, int64_t first, int64_t dim) {
    return (bf16_left){packed + first * dim * 2 * plan->planes, 2 * BF16_K, dim * 2 * BF16_K * plan->planes, dim * 2 * BF16_K};
}

/* ---- Packing ------------------------------------------------------------------------------------ */

/* What is turned: V forward, K backward. Rows: K, and V backward; they are packed, too, if they have more than one plane. */
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

/* What a pair has packed, in bytes from its begin on: the turned operand comes first. */
typedef struct {
    int64_t odd;        /* a byte for each 128 keys says what is odd among them */
    int64_t k, v, size; /* rows, [key][planes][dim rounded up to BF16_K], of two planes */
} bf16_packed;

static bf16_packed bf16_lay_out_packed(const cuflash_cpu_plan *plan, const cuflash_problem *p) {
    int64_t keys = cuflash_round_up(p->seq_k, BF16_BLOCK_N), bytes = keys * 2 * plan->planes;
    bf16_packed at = {.odd = bytes * bf16_operands_of(plan, p).dim};
    at.k = at.odd + cuflash_round_up(cuflash_key_blocks(p, BF16_BLOCK_N), 64);
    at.v = at.k + (plan->planes > 1 ? bytes * cuflash_round_up(p->head_dim, BF16_K) : 0);
    at.size = at.v;
    if (plan->planes > 1 && plan->pass == CUFLASH_BACKWARD) at.size += bytes * cuflash_round_up(p->head_dim_v, BF16_K);
    return at;
}

static int64_t bf16_packed_bytes(const cuflash_cpu_plan *plan, const cuflash_problem *p) {
    return bf16_lay_out_packed(plan, p).size;
}

/* Where so many keys of x lie, NULL behind the last. */
static void bf16_find_keys(const cuflash_problem *p, const cuflash_operand *x, int64_t pair, int64_t first, int64_t count,
                           const uint16_t **rows) {
    for (int64_t i = 0; i < count; i++) {
        const char *row = cuflash_row(x, pair / p->heads_kv, pair % p->heads_kv, first + i);
        rows[i] = first + i < p->seq_k ? (const uint16_t *)(const void *)row : NULL;
    }
}

/* Turns 32 keys, [key][d], to [planes][d][32]: 16 dimensions at a time, as 32-bit pairs of keys; with zeros for odd numbers. */
static inline __attribute__((always_inline)) void bf16_turn_keys(const int N, const bf16_operands *of,
                                                                 const uint16_t *const *rows, int odd, uint16_t *to) {
    for (int64_t d = 0; d < of->dim; d += BF16_K) {
        __mmask32 inside = bf16_inside(of->turned_dim, d);
        vf x[BF16_MOST_PLANES][2][16];
        for (int i = 0; i < 16; i++) { /* of two keys, dimension by dimension */
            __m512i one[BF16_MOST_PLANES], two[BF16_MOST_PLANES];
            bf16_load(N, rows[2 * i], d, inside, odd, one);
            bf16_load(N, rows[2 * i + 1], d, inside, odd, two);
            for (int q = 0; q < N; q++)
                for (int last = 0; last < 2; last++) x[q][last][i] = (vf)bf16_pair_rows(one[q], two[q], last);
        }
        for (int q = 0; q < N; q++)
            for (int last = 0; last < 2 && d + 16 * last < of->dim; last++) {
                v_transpose(x[q][last]);
                for (int i = 0; i < 16; i++)
                    _mm512_store_si512(to + (q * of->dim + d + 16 * last + i) * BF16_K, (__m512i)x[q][last][i]);
            }
    }
}

/* Rows of 128 keys in two planes. */
static void bf16_split_keys(const uint16_t *const *rows, int64_t dim, char *to) {
    int64_t whole = cuflash_round_up(dim, BF16_K);
    for (int64_t j = 0; j < BF16_BLOCK_N; j++)
        for (int64_t d = 0; d < whole; d += BF16_K) {
            __m512i planes[2];
            bf16_load(2, rows[j], d, bf16_inside(dim, d), 0, planes);
            for (int64_t q = 0; q < 2; q++) _mm512_storeu_si512(to + ((j * 2 + q) * whole + d) * 2, planes[q]);
        }
}

static bf16_sizes bf16_sizes_of_keys(const uint16_t *const *rows, int64_t dim) {
    bf16_sizes sizes = bf16_no_sizes;
    for (int64_t j = 0; j < BF16_BLOCK_N && rows[j]; j++) bf16_add_sizes(&sizes, rows[j], dim);
    return sizes;
}

/* Packs BF16_BLOCK_N keys. */
static void bf16_pack(const cuflash_cpu_work *work, int64_t unit, float *unused) {
    (void)unused;
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    bf16_operands of = bf16_operands_of(plan, p);
    bf16_packed at = bf16_lay_out_packed(plan, p);
    int64_t blocks = cuflash_key_blocks(p, BF16_BLOCK_N), pair = unit / blocks, first = unit % blocks * BF16_BLOCK_N;
    const uint16_t *turned[BF16_BLOCK_N], *in_place[BF16_BLOCK_N];
    bf16_find_keys(p, of.turned, pair, first, BF16_BLOCK_N, turned);
    bf16_find_keys(p, of.in_place, pair, first, BF16_BLOCK_N, in_place);
    bf16_sizes turned_sizes = bf16_sizes_of_keys(turned, of.turned_dim);
    bf16_sizes in_place_sizes = bf16_sizes_of_keys(in_place, of.in_place_dim);
    int odd = some_odd(p->dtype, &turned_sizes), missing = some_missing(p->dtype, &in_place_sizes);
    char *to = work->packed + pair * plan->packed_bytes;
    for (int64_t i = 0; i < BF16_BLOCK_N; i += BF16_K) {
        uint16_t *keys = (uint16_t *)(void *)(to + (first + i) * of.dim * 2 * plan->planes);
        BF16_WITH_PLANES(plan->planes, bf16_turn_keys(N, &of, turned + i, odd, keys));
    }
    to[at.odd + first / BF16_BLOCK_N] = (char)((odd ? ODD_TURNED : 0) | (missing ? MISSING_IN_PLACE : 0));
    if (plan->planes == 1) return;
    int64_t k_row = 2 * cuflash_round_up(p->head_dim, BF16_K) * 2;
    int64_t v_row = 2 * cuflash_round_up(p->head_dim_v, BF16_K) * 2;
    bool backward = plan->pass == CUFLASH_BACKWARD;
    bf16_split_keys(backward ? turned : in_place, p->head_dim, to + at.k + first * k_row);
    if (backward) bf16_split_keys(in_place, p->head_dim_v, to + at.v + first * v_row);
}

/* A block's pair's packed keys: turned, what is odd, and rows, or NULL where they are in place. */
typedef struct {
    const char *turned, *odd, *k, *v;
} bf16_keys;

static bf16_keys bf16_keys_of(const cuflash_cpu_work *work, const row_block *block) {
    const cuflash_cpu_plan *plan = work->plan;
    const char *from = work->packed + (block->batch * work->p->heads_kv + block->head_kv) * plan->packed_bytes;
    bf16_packed at = bf16_lay_out_packed(plan, work->p);
    return (bf16_keys){from, from + at.odd, plan->planes > 1 ? from + at.k : NULL, plan->planes > 1 ? from + at.v : NULL};
}

#endif
