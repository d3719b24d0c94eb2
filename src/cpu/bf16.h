/* Attention in bfloat16 and float16 by products of pairs (pairs.h): those of kernels.c, rows as lanes as everywhere.
 *
 *   S[key][row]    = K * Q             K by rows, pairs of d: [d / 2][row][2]
 *   O[d][row]     += V * P             V turned, [key / 32][d][32]; pairs of keys: [key / 2][row][2]
 *   dP[key][row]   = V * dO            V by rows, pairs of d
 *   dV[key][d]    += P * dO            [key][row], pairs of rows: [row / 2][d][2]
 *   dK[key][d]    += dS * Q            the same
 *   dQ[d][row]    += K * dS            K turned, pairs of keys
 *
 * Rows of K and V are read where they lie, if they are bfloat16; what is turned, or has two planes, is so once, before all. Sums are
 * float32; P and dS are rounded to bfloat16, or to the sum of two. */
#ifndef CUFLASH_CPU_BF16_H
#define CUFLASH_CPU_BF16_H

#include "interrupt.h"
#include "keys.h"
#include "operands.h"

/* ---- Forward ------------------------------------------------------------------------------------ */

/* A block through so many keys: scores, softmax, and output. */
static void bf16_attend_tile(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, int64_t first,
                             int64_t count, const bf16_keys *keys, int missing_q, const scratch *w, const bf16_scratch *x) {
    float c = exponent_scale(p), factor = query_factor(p);
    int64_t dim_v = cuflash_round_up(p->head_dim_v, BF16_ROWS);
    int odd = keys->odd[first / BF16_BLOCK_N];
    for (int64_t done = 0; done < count; done += BF16_SCORES_N) {
        int64_t key = first + done, some = count - done < BF16_SCORES_N ? count - done : BF16_SCORES_N;
        bf16_multiply_rows(plan, block, key, some, &p->k, keys->k, x->k, &p->q, x->q, p->head_dim, factor,
                           missing_q || odd & MISSING_IN_PLACE, x->s);
        if (key + some > block->shared) mask_tile(block, key, some, -INFINITY, x->s);
        bf16_softmax(plan->planes, block->lanes, x->s, x->pairs, done, some, c, w->max, w->sum, w->o_lanes,
                     first > 0 ? p->head_dim_v : 0);
    }
    bf16_gemm(dim_v, block->lanes, cuflash_round_up(count, BF16_K) / BF16_K, bf16_turned_keys(plan, keys->turned, first, dim_v),
              (bf16_right){x->pairs, BF16_PAIRS, BF16_PAIRS_PLANE}, bf16_terms_of(plan), w->o_lanes, BLOCK_M, first > 0);
    if (odd & ODD_TURNED) bf16_add_to_lanes(plan, block, first, count, &p->v, p->head_dim_v, x->pairs, w->o_lanes);
}

/* As attend, with the output. */
static void bf16_attend(const cuflash_cpu_work *work, const row_block *blocks, const scratch *w, int64_t n, float *more) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    bf16_scratch x[CUFLASH_MOST_TOGETHER];
    int missing_q[CUFLASH_MOST_TOGETHER];
    int64_t most = 0;
    bf16_lay_out(plan, p, more, &x[0]);
    bf16_keys keys = bf16_keys_of(work, &blocks[0]);
    for (int64_t i = 0; i < n; i++) {
        bf16_rows q = bf16_rows_of(plan, &blocks[i], &p->q, p->head_dim);
        x[i] = bf16_scratch_of_block(plan, p, &x[0], i);
        missing_q[i] = q.missing && query_factor(p) != 0;
        BF16_WITH_PLANES(plan->planes, bf16_load_pairs(N, &q, blocks[i].lanes, p->head_dim, query_factor(p), x[i].q));
        forget(&blocks[i], &w[i]);
        if (blocks[i].keys > most) most = blocks[i].keys;
    }
    bf16_begin();
    for (int64_t first = 0; first < most && !cuflash_interrupted(work->ticket); first += BF16_BLOCK_N)
        for (int64_t i = 0; i < n; i++) {
            int64_t left = blocks[i].keys - first, count = left < BF16_BLOCK_N ? left : BF16_BLOCK_N;
            if (count > 0) bf16_attend_tile(plan, p, &blocks[i], first, count, &keys, missing_q[i], &w[i], &x[i]);
        }
    bf16_end();
}

/* ---- Backward ----------------------------------------------------------------------------------- */

/* Whether numbers are missing in what scores and dP of a block are made of, and odd in the pairs of its rows, and whether its
 * deltas are not finite. */
typedef struct {
    int q_pairs, d_o_pairs, q_rows, d_o_rows, delta;
} bf16_odd_rows;

/* Infinity is no sum of two. Takes infinite dS from its planes; says whether there is any. */
static int bf16_take_infinite(const cuflash_cpu_plan *plan, const row_block *block, int64_t count, const bf16_scratch *x) {
    int64_t columns = bf16_columns(plan), plane = BF16_PAIRS_PLANE / 2;
    uint16_t *ds = (uint16_t *)(void *)x->ds, *pairs = (uint16_t *)(void *)x->pairs;
    int some = 0;
    for (int64_t j = 0; j < BF16_BLOCK_N; j++) memset(x->infinite + j * columns, 0, BLOCK_M);
    for (int64_t j = 0; j < count; j++)
        for (int64_t r = 0; r < block->rows; r++) {
            uint16_t *row = ds + j * plan->planes * columns + r, *pair = pairs + j / 2 * (BF16_PAIRS / 2) + r * 2 + j % 2;
            if ((*row & 0x7fff) != BF16_INFINITY) continue;
            x->infinite[j * columns + r] = *row >> 15 ? -1 : 1;
            row[0] = row[columns] = pair[0] = pair[plane] = 0;
            some = 1;
        }
    return some;
}

/* out[d][row] += dS x of keys' x, and out[key][d] += dS y of rows' y, where it is infinite. */
static void bf16_add_infinite_to_lanes(const cuflash_cpu_plan *plan, const row_block *block, int64_t first, int64_t count,
                                       const cuflash_operand *keys, int64_t dim, const bf16_scratch *x, float *out) {
    for (int64_t j = 0; j < count; j++)
        for (int64_t r = 0; r < block->rows; r++) {
            float sign = x->infinite[j * bf16_columns(plan) + r];
            const uint16_t *row = bf16_key_row(block, keys, first + j);
            for (int64_t d = 0; d < dim && sign != 0; d++)
                out[d * BLOCK_M + r] += sign * INFINITY * bf16_value(keys->dtype, row[d]);
        }
}
static void bf16_add_infinite_to_keys(const cuflash_cpu_plan *plan, const row_block *block, int64_t count,
                                      const cuflash_operand *rows, int64_t dim, const bf16_scratch *x, float *out,
                                      int64_t pad) {
    for (int64_t r = 0; r < block->rows; r++) {
        const uint16_t *row = bf16_query_row(plan, block, rows, r);
        for (int64_t j = 0; j < count; j++) {
            float sign = x->infinite[j * bf16_columns(plan) + r];
            for (int64_t d = 0; d < dim && sign != 0; d++)
                out[j * pad + d] += sign * INFINITY * bf16_value(rows->dtype, row[d]);
        }
    }
}

/* P and dS of so many keys, two at a time, of V vectors of lanes, from scores and dP; 0 where a row does not see a key, where a
 * lane has no row, and up to `filled` keys. */
static inline __attribute__((always_inline)) void bf16_gradient_lanes(const int N, const int V, const int masked,
                                                                      const row_block *block, int64_t lane, int64_t first,
                                                                      int64_t count, int64_t filled, int64_t columns,
                                                                      float scale, const scratch *w, const bf16_scratch *x) {
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
            bf16_store_row(N, V, p + (j + e) * N * columns, columns, prob[e]);
            bf16_store_row(N, V, ds + (j + e) * N * columns, columns, gradient[e]);
        }
        for (int v = 0; v < V; v++)
            bf16_store_pairs(N, pairs + j / 2 * BF16_PAIRS + v * 64, BF16_PAIRS_PLANE, gradient[0][v], gradient[1][v]);
    }
}

static inline __attribute__((always_inline)) void bf16_gradients(const int N, const int masked, const row_block *block,
                                                                 int64_t first, int64_t count, int64_t filled, int64_t columns,
                                                                 float c, const scratch *w, const bf16_scratch *x) {
    int64_t lane = 0;
    for (; lane + 32 <= block->lanes; lane += 32)
        bf16_gradient_lanes(N, 2, masked, block, lane, first, count, filled, columns, c, w, x);
    if (lane < block->lanes) bf16_gradient_lanes(N, 1, masked, block, lane, first, count, filled, columns, c, w, x);
}

/* P and dS of a block and so many keys, up to `filled` of them, and what they are to dq; says whether some dS are infinite, and have
 * been taken from it. */
static int bf16_backward_rows(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, int64_t first,
                              int64_t count, int64_t filled, bf16_odd_rows odd, int odd_keys, const bf16_keys *keys, int add_dq,
                              const scratch *w, const bf16_scratch *x) {
    int64_t dim = cuflash_round_up(p->head_dim, BF16_ROWS), columns = bf16_columns(plan);
    int masked = first + count > block->shared || block->rows < block->lanes;
    float c = exponent_scale(p);
    bf16_multiply_rows(plan, block, first, count, &p->k, keys->k, x->k, &p->q, x->q, p->head_dim, query_factor(p),
                       odd.q_pairs || odd_keys & ODD_TURNED, x->s);
    bf16_multiply_rows(plan, block, first, count, &p->v, keys->v, x->v, &p->d_o, x->d_o, p->head_dim_v, 1,
                       odd.d_o_pairs || odd_keys & MISSING_IN_PLACE, x->dp);
    if (masked)
        BF16_WITH_PLANES(plan->planes, bf16_gradients(N, 1, block, first, count, filled, columns, c, w, x));
    else
        BF16_WITH_PLANES(plan->planes, bf16_gradients(N, 0, block, first, count, filled, columns, c, w, x));
    int infinite = plan->planes > 1 && (odd.q_pairs || odd.d_o_pairs || odd.delta || odd_keys) &&
                   bf16_take_infinite(plan, block, count, x);
    if (!p->dq.data) return infinite;
    bf16_gemm(dim, block->lanes, cuflash_round_up(count, BF16_K) / BF16_K, bf16_turned_keys(plan, keys->turned, first, dim),
              (bf16_right){x->pairs, BF16_PAIRS, BF16_PAIRS_PLANE}, bf16_terms_of(plan), w->dq_lanes, BLOCK_M, add_dq);
    if (odd_keys & ODD_TURNED) bf16_add_to_lanes(plan, block, first, count, &p->k, p->head_dim, x->pairs, w->dq_lanes);
    if (infinite) bf16_add_infinite_to_lanes(plan, block, first, count, &p->k, p->head_dim, x, w->dq_lanes);
    return infinite;
}

static inline __attribute__((always_inline)) void bf16_load_block(const int N, const cuflash_cpu_plan *plan,
                                                                  const cuflash_problem *p, int64_t lanes, const bf16_rows *q,
                                                                  const bf16_rows *d_o, const bf16_scratch *x) {
    bf16_load_pairs(N, q, lanes, p->head_dim, query_factor(p), x->q);
    bf16_load_pairs(N, d_o, lanes, p->head_dim_v, 1, x->d_o);
    bf16_load_row_pairs(N, q, p->head_dim, plan->pad_d, bf16_columns(plan) * plan->pad_d * 2, x->q_rows);
    bf16_load_row_pairs(N, d_o, p->head_dim_v, plan->pad_dv, bf16_columns(plan) * plan->pad_dv * 2, x->d_o_rows);
}

/* As backward_block, of n row blocks together: what they are to dk and dv is one product of the rows of all. */
static void bf16_backward_blocks(const cuflash_cpu_work *work, const row_block *blocks, const scratch *w, int64_t n,
                                 float *more, int64_t begin, int add, key_sums all) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    bf16_scratch x[CUFLASH_MOST_TOGETHER];
    bf16_odd_rows odd[CUFLASH_MOST_TOGETHER];
    int infinite[CUFLASH_MOST_TOGETHER];
    bf16_lay_out(plan, p, more, &x[0]);
    bf16_keys packed = bf16_keys_of(work, &blocks[0]);
    const int64_t columns = bf16_columns(plan), row = plan->planes * columns * 2;
    const int64_t q_plane = columns * plan->pad_d * 2, d_o_plane = columns * plan->pad_dv * 2;
    for (int64_t i = 0; i < n; i++) {
        x[i] = bf16_scratch_of_block(plan, p, &x[0], i);
        bf16_rows q = bf16_rows_of(plan, &blocks[i], &p->q, p->head_dim);
        bf16_rows d_o = bf16_rows_of(plan, &blocks[i], &p->d_o, p->head_dim_v);
        BF16_WITH_PLANES(plan->planes, bf16_load_block(N, plan, p, blocks[i].lanes, &q, &d_o, &x[i]));
        odd[i] = (bf16_odd_rows){q.missing && query_factor(p) != 0, d_o.missing, q.odd, d_o.odd, 0};
        for (int64_t r = 0; r < blocks[i].rows; r++) odd[i].delta |= !isfinite(w[i].delta[r]);
    }
    if (blocks[0].lanes < BLOCK_M) { /* columns of P and dS that no lane writes: the pair's last block has them */
        memset(x[0].p, 0, (size_t)(BF16_BLOCK_N * row));
        memset(x[0].ds, 0, (size_t)(BF16_BLOCK_N * row));
    }
    bf16_begin();
    for (int64_t first = begin; first < blocks[0].keys && !cuflash_interrupted(work->ticket); first += BF16_BLOCK_N) {
        int64_t count = blocks[0].keys - first < BF16_BLOCK_N ? blocks[0].keys - first : BF16_BLOCK_N, see = 0;
        for (; see < n && blocks[see].keys > first; see++) {
            int64_t some = blocks[see].keys - first < count ? blocks[see].keys - first : count;
            infinite[see] = bf16_backward_rows(plan, p, &blocks[see], first, some, cuflash_round_up(count, BF16_K), odd[see],
                                               packed.odd[first / BF16_BLOCK_N], &packed, first > begin, &w[see], &x[see]);
        }
        int64_t keys = cuflash_round_up(count, 16), rows = (see - 1) * BLOCK_M + blocks[see - 1].rows;
        int64_t steps = cuflash_round_up(rows, BF16_K) / BF16_K;
        key_sums sums = sums_of_tile(plan, all, first);
        if (p->dv.data) {
            bf16_gemm(keys, plan->pad_dv, steps, (bf16_left){x[0].p, row, 64, columns * 2},
                      (bf16_right){x[0].d_o_rows, plan->pad_dv * 4, d_o_plane}, bf16_terms_of(plan), sums.dv, plan->pad_dv,
                      add);
            for (int64_t i = 0; i < see; i++)
                if (odd[i].d_o_rows)
                    bf16_add_to_keys(plan, &blocks[i], first, count, &p->d_o, p->head_dim_v, x[i].p, sums.dv, plan->pad_dv);
        }
        if (p->dk.data) {
            bf16_gemm(keys, plan->pad_d, steps, (bf16_left){x[0].ds, row, 64, columns * 2},
                      (bf16_right){x[0].q_rows, plan->pad_d * 4, q_plane}, bf16_terms_of(plan), sums.dk, plan->pad_d, add);
            for (int64_t i = 0; i < see; i++) {
                if (odd[i].q_rows)
                    bf16_add_to_keys(plan, &blocks[i], first, count, &p->q, p->head_dim, x[i].ds, sums.dk, plan->pad_d);
                if (infinite[i])
                    bf16_add_infinite_to_keys(plan, &blocks[i], count, &p->q, p->head_dim, &x[i], sums.dk, plan->pad_d);
            }
        }
        if (cuflash_keys_at_once(plan)) store_keys(plan, p, blocks[0].batch, blocks[0].head_kv, first, count, sums);
    }
    bf16_end();
}

#endif
