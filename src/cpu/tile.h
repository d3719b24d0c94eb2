/* What a thread works in; the scores of a block of rows with a tile of keys, and their softmax. */
#ifndef CUFLASH_CPU_TILE_H
#define CUFLASH_CPU_TILE_H

#include <float.h>
#include <math.h>

#include "few.h"
#include "gemm.h"
#include "rows.h"

static const float LOG2E = 1.44269504f;

/* What a thread works in. */
typedef struct {
    float *q_lanes, *o_lanes;   /* [dim][BLOCK_M] */
    float *s;                   /* [BLOCK_N][BLOCK_M]: scores, then probabilities */
    float *k_buffer, *v_buffer; /* [BLOCK_N, or all keys of a unit][dim] */
    float *max, *sum;           /* [BLOCK_M]: the largest score so far, or little below it; the sum of 2^((s - max) c - LESS) */
    float *few_q, *few_o;       /* forward, of up to FEW rows: [pad / VL][rows][VL], [rows][pad] */
    uint16_t *few_pairs;        /* few_q in bfloat16, [dim / 32][rows][32], or pairs of d (few_tiles.h) */
    char *few_v;                /* pairs of keys of V (few_tiles.h) */
    int64_t block_floats;       /* forward: from the lanes, max and sum of a block to those of the next */
    float *d_o_lanes, *dq_lanes; /* backward: [dim][BLOCK_M]; dq of all blocks that are together */
    float *q_rows, *d_o_rows;    /* backward: [BLOCK_M][pad] */
    float *ds;                   /* backward: [BLOCK_N][BLOCK_M] */
    float *dk, *dv;              /* backward: [keys of a tile][pad], where they are written at once */
    float *shift, *delta;        /* backward: [BLOCK_M] */
    cuflash_operand k, v;        /* backward: the problem's, or what stands for them */
} scratch;

/* Of dq of a block, [dim][BLOCK_M]: a product of pairs writes whole tiles. */
static int64_t dq_block_floats(const cuflash_problem *p) {
    return cuflash_round_up(p->head_dim, 16) * BLOCK_M;
}

/* The scratch of block `index` of those that go through the keys together. */
static scratch scratch_of_block(const scratch *first, int64_t index) {
    scratch w = *first;
    w.q_lanes += index * w.block_floats;
    w.o_lanes += index * w.block_floats;
    w.sum += index * w.block_floats;
    w.max += index * w.block_floats;
    return w;
}

/* Lays the scratch out from base; returns how many floats it takes. */
static int64_t lay_out(const cuflash_cpu_plan *plan, const cuflash_problem *p, cuflash_pass pass, float *base, scratch *w) {
    int64_t used = 0, keys = plan->part_keys > BLOCK_N ? plan->part_keys : BLOCK_N;
#define TAKE(name, count) w->name = (void *)(base + used), used += ((count) + 15) / 16 * 16
    TAKE(q_lanes, p->head_dim * BLOCK_M);
    TAKE(o_lanes, cuflash_round_up(p->head_dim_v, 16) * BLOCK_M);
    TAKE(sum, BLOCK_M);
    if (pass == CUFLASH_FORWARD) {
        TAKE(max, BLOCK_M);
        w->block_floats = used;
        used *= plan->together;
    }
    TAKE(s, BLOCK_N * BLOCK_M);
    TAKE(k_buffer, keys * p->head_dim);
    TAKE(v_buffer, keys * p->head_dim_v);
    if (pass == CUFLASH_FORWARD) {
        TAKE(few_q, FEW * plan->pad_d);
        TAKE(few_o, FEW * plan->pad_dv);
        TAKE(few_pairs, FEW * cuflash_round_up(p->head_dim, 32) / 2);
#ifdef __AMX_BF16__
        TAKE(few_v, BLOCK_N * cuflash_round_up(p->head_dim_v, 32) / 2);
#endif
        return used;
    }
    w->k = p->k, w->v = p->v;
    TAKE(d_o_lanes, p->head_dim_v * BLOCK_M);
    TAKE(dq_lanes, dq_block_floats(p) * plan->together);
    TAKE(q_rows, plan->pad_d * BLOCK_M);
    TAKE(d_o_rows, plan->pad_dv * BLOCK_M);
    TAKE(ds, BLOCK_N * BLOCK_M);
    if (cuflash_keys_at_once(plan)) {
        TAKE(dk, cuflash_tile_keys(plan) * plan->pad_d);
        TAKE(dv, cuflash_tile_keys(plan) * plan->pad_dv);
    }
#undef TAKE
    return used;
}

/* A score times this is a logit. Its sign is in the queries: the largest score must be the largest logit. */
static double logit_scale(const cuflash_problem *p) {
    return p->scale == 0 ? 1 : fabs(p->scale);
}

/* c: times this, a score is an exponent of 2. */
static float exponent_scale(const cuflash_problem *p) {
    double c = logit_scale(p) * 1.4426950408889634;
    return c < (double)FLT_MAX ? (float)c : FLT_MAX; /* 0 * c must stay 0 */
}

static float query_factor(const cuflash_problem *p) {
    return p->scale > 0 ? 1 : p->scale < 0 ? -1 : 0;
}

/* One step of the online softmax on V vectors of lanes: S becomes 2^((S - max) c - LESS), max and sum are brought up to date.
 * Where the largest score is too far above max, it becomes that, and the output so far, [dim][row], is scaled down to it. */
static inline __attribute__((always_inline)) void softmax_lanes(const int V, float *s, int64_t count, float c, float *max,
                                                                float *sum, float *out, int64_t dim) {
    vf m[4], base[4], total[4];
    vi moved[4];
    for (int v = 0; v < V; v++) m[v] = v_load(max + v * VL);
    for (int64_t j = 0; j < count; j++)
        for (int v = 0; v < V; v++) m[v] = v_max(v_load(s + j * BLOCK_M + v * VL), m[v]);
    for (int v = 0; v < V; v++) {
        vf before = v_load(max + v * VL);
        moved[v] = (m[v] - before) * c > MOST_EXPONENT; /* from -inf, too */
        m[v] = v_select(moved[v], m[v], before);
        base[v] = v_select(m[v] == -INFINITY, (vf){0}, m[v]); /* nothing seen yet: 2^(-inf - 0) = 0 */
        total[v] = (vf){0};
    }
    for (int64_t j = 0; j < count; j++)
        for (int v = 0; v < V; v++) {
            float *at = s + j * BLOCK_M + v * VL;
            vf prob = v_exp2((v_load(at) - base[v]) * c - LESS);
            v_store(at, prob);
            total[v] = total[v] + prob;
        }
    for (int v = 0; v < V; v++) {
        vf shrink = v_exp2((v_load(max + v * VL) - base[v]) * c);
        v_store(sum + v * VL, v_load(sum + v * VL) * shrink + total[v]);
        v_store(max + v * VL, m[v]);
        int any = 0;
        for (int i = 0; i < VL; i++) any |= moved[v][i];
        if (!any) continue;
        for (int64_t d = 0; d < dim; d++) {
            float *at = out + d * BLOCK_M + v * VL;
            v_store(at, v_load(at) * shrink);
        }
    }
}

static void softmax_tile(int64_t lanes, float *s, int64_t count, float c, float *max, float *sum, float *out, int64_t dim) {
    int64_t lane = 0;
    for (; lane + 4 * VL <= lanes; lane += 4 * VL)
        softmax_lanes(4, s + lane, count, c, max + lane, sum + lane, out + lane, dim);
    for (; lane < lanes; lane += VL) softmax_lanes(1, s + lane, count, c, max + lane, sum + lane, out + lane, dim);
}

/* Scores of one tile of keys, S = K Q, hidden ones -inf. */
static void score_tile(const cuflash_problem *p, const row_block *block, int64_t first, int64_t count, float_rows k,
                       const scratch *w) {
    gemm_rows(count, block->lanes, p->head_dim, k.data, k.stride, w->q_lanes, BLOCK_M, w->s, BLOCK_M, 0);
    if (first + count > block->shared) mask_tile(block, first, count, -INFINITY, w->s);
}

static int64_t tile_size(const row_block *block, int64_t first) {
    return block->keys - first < BLOCK_N ? block->keys - first : BLOCK_N;
}

/* No row has seen a key. */
static void forget(const row_block *block, const scratch *w) {
    for (int64_t r = 0; r < block->lanes; r++) w->max[r] = -INFINITY, w->sum[r] = 0;
}

/* Was there no key for this row, or none with a score above -inf? */
static int sees_nothing(const scratch *w, int64_t r) {
    return w->max[r] == -INFINITY && w->sum[r] == 0;
}

static void clear_lane(float *lanes, int64_t dim, int64_t r) {
    for (int64_t d = 0; d < dim; d++) lanes[d * BLOCK_M + r] = 0;
}

#endif
