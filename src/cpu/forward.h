/* Attention, one row block by some of the keys: by rows as lanes, by vectors over d where there are few rows (few.h), in pairs of
 * bfloat16 (bf16.h). */
#ifndef CUFLASH_CPU_FORWARD_H
#define CUFLASH_CPU_FORWARD_H

#include "interrupt.h"
#include "tile.h"
#ifdef __AVX512BF16__
#include "bf16.h"
#include "few_pairs.h"
#endif

/* max and sum of the rows of n blocks of a pair over keys from `begin` to `end` and, if asked for, the outputs, not yet divided by
 * sum. Needs their q_lanes. What a tile of keys comes from, memory or a conversion, it does once for all of them. */
static void attend(const cuflash_problem *p, const row_block *blocks, const scratch *w, int64_t n, int with_output,
                   int64_t begin, int64_t end, unsigned ticket) {
    float c = exponent_scale(p);
    int64_t keys = 0;
    for (int64_t i = 0; i < n; i++) {
        forget(&blocks[i], &w[i]);
        if (blocks[i].keys > keys) keys = blocks[i].keys;
    }
    if (end > keys) end = keys;
    for (int64_t first = begin; first < end; first += BLOCK_N) {
        if (cuflash_interrupted(ticket)) return;
        int64_t tile = keys - first < BLOCK_N ? keys - first : BLOCK_N; /* of it a block sees `count` */
        float_rows k = load_keys(blocks, &p->k, first, tile, p->head_dim, w->k_buffer), v = {0};
        for (int64_t i = 0; i < n; i++) {
            const row_block *block = &blocks[i];
            if (first >= block->keys) continue;
            int64_t count = tile_size(block, first);
            score_tile(p, block, first, count, k, &w[i]);
            softmax_tile(block->lanes, w->s, count, c, w[i].max, w[i].sum, w[i].o_lanes,
                         with_output && first > begin ? p->head_dim_v : 0);
            if (!with_output) continue;
            if (!v.data) v = load_keys(block, &p->v, first, tile, p->head_dim_v, w->v_buffer);
            if (first + count > block->shared && !all_finite(v, count, p->head_dim_v))
                visible_to_lanes(block, first, count, v, p->head_dim_v, w->s, w[i].o_lanes, first > begin);
            else
                gemm_columns(p->head_dim_v, block->lanes, count, v.data, v.stride, w->s, BLOCK_M, w[i].o_lanes, BLOCK_M,
                             first > begin);
        }
    }
}

/* ---- Few rows ----------------------------------------------------------------------------------- */

/* As visible_to_lanes, in add_few's order: what is hidden must not change a bit. */
static void add_visible_rows(const row_block *block, int R, int64_t first, int64_t count, float_rows v, int64_t dim,
                             int64_t pad, const scratch *w) {
    for (int64_t r = 0; r < block->rows; r++)
        for (int64_t j = 0; j < count && first + j < block->limit[r]; j++)
            for (int64_t d = 0; d < dim; d++) w->few_o[r * pad + d] += w->s[j * R + r] * v.data[j * v.stride + d];
}

/* Are products of so many rows products of pairs? */
static inline int few_by_pairs(int R, cuflash_dtype T) {
#ifdef __AVX512BF16__
    return cuflash_cpu_few_by_pairs(R, T);
#else
    (void)R, (void)T;
    return 0;
#endif
}

/* The block's rows of q for score_few or score_few_pairs, those that there are none of 0; says whether there are denormal numbers. */
static int load_few(int R, cuflash_dtype T, const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block,
                    const scratch *w) {
    float row[WIDEST] __attribute__((aligned(64))), factor = query_factor(p);
    int64_t whole = cuflash_round_up(p->head_dim, 32);
    vi denormal = {0};
    for (int64_t r = 0; r < R; r++) {
        int64_t dim = r < block->rows ? p->head_dim : 0;
        if (dim > 0) load_row(T, row_address(plan, block, &p->q, r), dim, row);
        memset(row + dim, 0, (size_t)(whole - dim) * sizeof *row);
        for (int64_t d = 0; d < plan->pad_d; d += VL) {
            vf x = v_load(row + d) * factor;
            denormal |= (x < FLT_MIN) & (x > -FLT_MIN) & (x != 0);
            v_store(row + d, x);
        }
#ifdef __AVX512BF16__
        if (few_by_pairs(R, T)) {
            uint16_t pairs[WIDEST] __attribute__((aligned(64)));
            float_to_bfloat_row(row, whole, pairs);
            few_put_row(R, r, whole, pairs, w->few_pairs);
            continue;
        }
#endif
        for (int64_t d = 0; d < plan->pad_d; d += VL) v_store(w->few_q + d * R + r * VL, v_load(row + d));
    }
    int some = 0;
    for (int i = 0; i < VL; i++) some |= denormal[i] != 0;
    return some;
}

/* s[key][R] of a tile. */
static inline __attribute__((always_inline)) void score_few_tile(const int R, const cuflash_dtype T,
                                                                 const cuflash_cpu_plan *plan, const cuflash_problem *p,
                                                                 const row_block *block, int64_t first, int64_t count,
                                                                 int denormal_q, const scratch *w) {
    const char *k = cuflash_row(&p->k, block->batch, block->head_kv, first);
    int64_t k_row = p->k.seq * few_bytes(T);
#ifdef __AVX512BF16__
    if (few_by_pairs(R, T)) {
        int denormal_k = score_few_pairs(R, count, p->head_dim, k, k_row, w->few_pairs, w->s);
        if (denormal_q || denormal_k)
            bf16_add_scores(plan, block, first, count, &p->k, &p->q, p->head_dim, query_factor(p), w->s, R);
        return;
    }
#else
    (void)plan, (void)denormal_q;
#endif
    score_few(R, T, count, p->head_dim, k, k_row, w->few_q, w->s);
}

/* As attend(), of a block of at most R rows of T, both constants. */
static inline __attribute__((always_inline)) void attend_few_rows(const int R, const cuflash_dtype T,
                                                                  const cuflash_cpu_plan *plan, const cuflash_problem *p,
                                                                  const row_block *block, const scratch *w, int64_t begin,
                                                                  int64_t end, unsigned ticket) {
    float c = exponent_scale(p);
    int64_t v_row = p->v.seq * few_bytes(T), pad = plan->pad_dv;
    int denormal = load_few(R, T, plan, p, block, w);
    memset(w->few_o, 0, (size_t)(R * pad) * sizeof *w->few_o);
    for (int64_t first = begin; first < end && !cuflash_interrupted(ticket); first += BLOCK_N) {
        int64_t count = tile_size(block, first);
        int masked = first + count > block->shared;
        score_few_tile(R, T, plan, p, block, first, count, denormal, w);
        for (int64_t r = 0; masked && r < block->rows; r++)
            for (int64_t j = 0; j < count; j++)
                if (first + j >= block->limit[r]) w->s[j * R + r] = -INFINITY;
        vf shrink = softmax_few(R, count, c, w->s, w->max, w->sum);
        for (int r = 0; r < R; r++)
            for (int64_t d = 0; shrink[r] != 1 && d < pad; d += VL)
                v_store(w->few_o + r * pad + d, v_load(w->few_o + r * pad + d) * shrink[r]);
        const char *v = cuflash_row(&p->v, block->batch, block->head_kv, first);
#ifdef __AVX512BF16__
        if (few_by_pairs(R, T)) {
            add_few_pairs(R, block, first, count, p->head_dim_v, v, v_row, w->s, w->few_v, w->few_o, pad);
            continue;
        }
#endif
        if (masked) {
            float_rows rows = load_keys(block, &p->v, first, count, p->head_dim_v, w->v_buffer);
            if (!all_finite(rows, count, p->head_dim_v)) {
                add_visible_rows(block, R, first, count, rows, p->head_dim_v, pad, w);
                continue;
            }
        }
        add_few(R, T, count, p->head_dim_v, v, v_row, w->s, w->few_o, pad);
    }
}

/* For each number of rows and each dtype. */
typedef void few_function(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w,
                          int64_t begin, int64_t end, unsigned ticket);
#define FEW_FUNCTION(R, T)                                                                                                     \
    static void attend_##R##_##T(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block,               \
                                 const scratch *w, int64_t begin, int64_t end, unsigned ticket) {                              \
        if (R <= FEW) attend_few_rows(R, CUFLASH_##T, plan, p, block, w, begin, end, ticket);                                  \
    }
#define FEW_FUNCTIONS(R) FEW_FUNCTION(R, FLOAT32) FEW_FUNCTION(R, FLOAT16) FEW_FUNCTION(R, BFLOAT16)
FEW_FUNCTIONS(1)
FEW_FUNCTIONS(2)
FEW_FUNCTIONS(4)
FEW_FUNCTIONS(8)
FEW_FUNCTIONS(16)
#define FEW_KINDS(R)                                                                                                           \
    [CUFLASH_FLOAT32] = attend_##R##_FLOAT32, [CUFLASH_FLOAT16] = attend_##R##_FLOAT16,                                        \
    [CUFLASH_BFLOAT16] = attend_##R##_BFLOAT16
static few_function *const few_kinds[5][3] = {{FEW_KINDS(1)}, {FEW_KINDS(2)}, {FEW_KINDS(4)}, {FEW_KINDS(8)}, {FEW_KINDS(16)}};

/* As attend(), of a block of few rows. */
static void attend_few(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w,
                       int64_t begin, int64_t end, unsigned ticket) {
    forget(block, w);
    if (end > block->keys) end = block->keys;
    int64_t rows = block->rows;
#ifdef __AVX512BF16__
    int by_pairs = few_by_pairs((int)rows, p->k.dtype);
    if (by_pairs && rows < LEAST_FEW_PAIRS) rows = LEAST_FEW_PAIRS;
    if (by_pairs) bf16_begin();
#endif
    int kind = rows <= 2 ? (int)rows - 1 : rows <= 4 ? 2 : rows <= 8 ? 3 : 4;
    few_kinds[kind][p->k.dtype](plan, p, block, w, begin, end, ticket);
#ifdef __AVX512BF16__
    if (by_pairs) bf16_end();
#endif
    for (int64_t r = 0; r < block->rows; r++)
        for (int64_t d = 0; d < p->head_dim_v; d++) w->o_lanes[d * BLOCK_M + r] = w->few_o[r * plan->pad_dv + d];
}

static const double LN2 = 0.6931471805599453;

static void store_lse(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w) {
    for (int64_t r = 0; r < block->rows; r++) {
        float lse = (float)((double)w->max[r] * logit_scale(p) + log((double)w->sum[r]) + (double)LESS * LN2);
        store_row(p->lse.dtype, row_address(plan, block, &p->lse, r), 1, &lse);
    }
}

/* Divides by sum, and writes the block's output and log-sum-exp. */
static void store_output(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w) {
    if (p->lse.data) store_lse(plan, p, block, w);
    for (int64_t r = 0; r < block->rows; r++) {
        if (sees_nothing(w, r))
            clear_lane(w->o_lanes, p->head_dim_v, r);
        else
            w->sum[r] = 1 / w->sum[r];
    }
    store_lanes(plan, block, &p->o, p->head_dim_v, w->o_lanes, w->sum);
}

/* The row_blocks of a pair, the longest rows first. */
static row_block forward_block(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t number) {
    int64_t pair = number / plan->row_blocks, index = number % plan->row_blocks;
    return block_at(plan, p, pair, p->causal ? plan->row_blocks - 1 - index : index);
}

/* What of a row block is in units [begin, end), counted from its own: its halves, the longer rows first. */
static row_block halves_of_block(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, int64_t begin,
                                 int64_t end) {
    enum { HALF = BLOCK_M / 2 };
    if (begin < 0) begin = 0;
    if (end > 2) end = 2;
    int64_t first = p->causal ? 2 - end : begin, last = p->causal ? 2 - begin : end;
    int64_t rows = (last * HALF < block->rows ? last * HALF : block->rows) - first * HALF;
    int64_t pair = block->batch * p->heads_kv + block->head_kv;
    return rows_at(plan, p, pair, block->first + first * HALF, rows > 0 ? rows : 0);
}

/* What a part of the keys came to, in `partial`: max, sum, and the output, [dim][rows]. */
static void keep_part(const cuflash_problem *p, const row_block *block, const scratch *w, float *partial) {
    size_t bytes = (size_t)block->rows * sizeof(float);
    memcpy(partial, w->max, bytes);
    memcpy(partial + block->rows, w->sum, bytes);
    for (int64_t d = 0; d < p->head_dim_v; d++) memcpy(partial + (2 + d) * block->rows, w->o_lanes + d * BLOCK_M, bytes);
}

/* What a unit came to for a block, if it has not been interrupted. */
static void keep_block(const cuflash_cpu_work *work, int64_t unit, const row_block *block, const scratch *w) {
    if (cuflash_interrupted(work->ticket)) return;
    if (work->plan->key_parts > 1)
        keep_part(work->p, block, w, work->partials + unit * work->plan->partial_floats);
    else
        store_output(work->plan, work->p, block, w);
}

/* Blocks through a part of the keys, with their outputs. */
static void attend_blocks(const cuflash_cpu_work *work, const row_block *blocks, const scratch *w, int64_t n, float *more,
                          int64_t begin, int64_t end) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
#ifdef __AVX512BF16__
    if (plan->packed_bytes > 0) { /* and so all keys are one part */
        bf16_attend(work, blocks, w, n, more);
        return;
    }
#else
    (void)more;
#endif
    for (int64_t i = 0; i < n; i++) load_lanes(plan, &blocks[i], &p->q, p->head_dim, query_factor(p), w[i].q_lanes);
    attend(p, blocks, w, n, 1, begin, end, work->ticket);
}

static void forward(const cuflash_cpu_work *work, int64_t unit, int64_t count, float *base) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    int64_t part = unit % plan->key_parts, begin = cuflash_part_begin(plan, p, part),
            end = cuflash_part_begin(plan, p, part + 1);
    int64_t each = plan->key_parts * plan->halves, n = 0;
    row_block blocks[CUFLASH_MOST_TOGETHER];
    scratch w[CUFLASH_MOST_TOGETHER];
    int64_t used = lay_out(plan, p, CUFLASH_FORWARD, base, &w[0]);
    for (int64_t number = unit / each; number * each < unit + count; number++) {
        row_block block = forward_block(plan, p, number);
        bool few = plan->packed_bytes == 0 && cuflash_cpu_is_few(block.rows, p->k.dtype, VL);
        int64_t from = unit - number * each, to = from + count;
        if (plan->halves == 2 && (from > 0 || to < 2)) block = halves_of_block(plan, p, &block, from, to);
        if (block.rows == 0) continue;
        if (few) {
            attend_few(plan, p, &block, &w[0], begin, end, work->ticket);
            keep_block(work, unit, &block, &w[0]);
            continue;
        }
        w[n] = scratch_of_block(&w[0], n);
        blocks[n++] = block;
    }
    if (n == 0) return; /* there were few rows, or none in a half */
    attend_blocks(work, blocks, w, n, base + used, begin, end);
    for (int64_t i = 0; i < n; i++) keep_block(work, unit, &blocks[i], &w[i]);
}

/* The parts of a row block together, in their order. */
static void forward_finish(const cuflash_cpu_work *work, int64_t number, float *base) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    const float *partials = work->partials + number * plan->key_parts * plan->partial_floats;
    row_block block = forward_block(plan, p, number);
    scratch w;
    lay_out(plan, p, CUFLASH_FORWARD, base, &w);
    int64_t rows = block.rows, parts = 0;
    while (parts < plan->key_parts && cuflash_part_begin(plan, p, parts) < block.keys)
        parts++; /* which have keys that a row sees */
    for (int64_t r = 0; r < rows; r++) {
        w.max[r] = -INFINITY, w.sum[r] = 0;
        for (int64_t part = 0; part < parts; part++) w.max[r] = fmaxf(w.max[r], partials[part * plan->partial_floats + r]);
        clear_lane(w.o_lanes, p->head_dim_v, r);
    }
    float c = exponent_scale(p);
    for (int64_t part = 0; part < parts; part++) {
        const float *max = partials + part * plan->partial_floats, *sum = max + rows, *out = sum + rows;
        float factor[BLOCK_M];
        for (int64_t r = 0; r < rows; r++) {
            factor[r] = exp2f((max[r] - (w.max[r] == -INFINITY ? 0 : w.max[r])) * c);
            w.sum[r] += factor[r] * sum[r];
        }
        for (int64_t d = 0; d < p->head_dim_v; d++)
            for (int64_t r = 0; r < rows; r++) w.o_lanes[d * BLOCK_M + r] += factor[r] * out[d * rows + r];
    }
    store_output(plan, p, &block, &w);
}

#endif
