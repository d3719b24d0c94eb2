/* Its gradients: what is needed of each row first, then splits of a pair's row blocks by parts of its keys, and the sums of both. */
#ifndef CUFLASH_CPU_BACKWARD_H
#define CUFLASH_CPU_BACKWARD_H

#include "forward.h"
#include "keys.h"

/* A float32 log-sum-exp beyond this is too coarse: exp(s - lse) would be off by |lse| 2^-24. */
static const float LARGEST_LSE = 32;

static int is_fine(float lse, int64_t visible) {
    return visible == 0 || !(fabsf(lse) > LARGEST_LSE);
}

/* Where max, shift and delta of a row block are. */
static void find_rows(float *rows, int64_t number, scratch *w) {
    w->max = rows + number * CUFLASH_ROW_NUMBERS * BLOCK_M;
    w->shift = w->max + BLOCK_M;
    w->delta = w->shift + BLOCK_M;
}

/* max and shift of every row, so that its probabilities are 2^((s - max) c + shift): from the log-sum-exp where that
 * will do, computed anew otherwise. Which of the two is each row's own affair: it must not depend on what its neighbours
 * see. Rows that see nothing get shift -inf, and so probabilities 0. */
static void load_softmax(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w,
                         unsigned ticket) {
    int given = p->lse.data && p->lse.dtype == CUFLASH_FLOAT32, enough = given;
    float lse[BLOCK_M];
    for (int64_t r = 0; r < block->rows && given; r++) {
        memcpy(lse + r, row_address(plan, block, &p->lse, r), sizeof *lse);
        enough = enough && is_fine(lse[r], block->limit[r]);
    }
    if (!enough) {
        load_lanes(plan, block, &p->q, p->head_dim, query_factor(p), w->q_lanes);
        attend(p, block, w, 1, 0, 0, p->seq_k, ticket);
    }
    for (int64_t r = 0; r < block->lanes; r++) {
        if (r < block->rows && !(given && is_fine(lse[r], block->limit[r]))) {
            w->shift[r] = sees_nothing(w, r) ? -INFINITY : -log2f(w->sum[r]) - LESS;
            if (sees_nothing(w, r)) w->max[r] = 0;
        } else {
            w->max[r] = 0;
            w->shift[r] = r >= block->rows || block->limit[r] == 0 ? -INFINITY : -lse[r] * LOG2E;
        }
    }
}

/* delta = sum of dO * O, for every row, in so many chains of additions */
static void load_delta(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w) {
    enum { CHAINS = 16 };
    float o[CUFLASH_MAX_HEAD_DIM];
    for (int64_t r = 0; r < block->lanes; r++) {
        double sums[CHAINS] = {0}, sum = 0;
        if (r < block->rows) {
            const float *d_o = w->d_o_rows + r * plan->pad_dv;
            load_row(p->o.dtype, row_address(plan, block, &p->o, r), p->head_dim_v, o);
            int64_t d = 0;
            for (; d + CHAINS <= p->head_dim_v; d += CHAINS)
                for (int i = 0; i < CHAINS; i++) sums[i] += (double)o[d + i] * (double)d_o[d + i];
            for (; d < p->head_dim_v; d++) sum += (double)o[d] * (double)d_o[d];
        }
        for (int i = 0; i < CHAINS; i++) sum += sums[i];
        w->delta[r] = (float)sum;
    }
}

/* S becomes P = 2^((S - max) c + shift), and dS (which holds dP) becomes P (dP - delta). */
static void gradient_tile(const row_block *block, int64_t count, float c, const scratch *w) {
    for (int64_t lane = 0; lane < block->lanes; lane += VL) {
        vf max = v_load(w->max + lane), shift = v_load(w->shift + lane), delta = v_load(w->delta + lane);
        for (int64_t j = 0; j < count; j++) {
            float *s = w->s + j * BLOCK_M + lane, *ds = w->ds + j * BLOCK_M + lane;
            vf prob = v_exp2((v_load(s) - max) * c + shift);
            v_store(s, prob);
            v_store(ds, prob * (v_load(ds) - delta));
        }
    }
}

/* The block's rows, and whether they are such that a weight of 0 hides them, where a tile is masked. */
typedef struct {
    float_rows q, d_o;
    int finite_q, finite_d_o;
} backward_rows;

static void backward_tile(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, int64_t first,
                          int64_t count, const backward_rows *rows, int add, int add_dq, const scratch *w, key_sums sums) {
    float_rows k = load_keys(block, &w->k, first, count, p->head_dim, w->k_buffer);
    float_rows v = load_keys(block, &w->v, first, count, p->head_dim_v, w->v_buffer);
    int masked = first + count > block->shared;
    score_tile(p, block, first, count, k, w);
    gemm_rows(count, block->lanes, p->head_dim_v, v.data, v.stride, w->d_o_lanes, BLOCK_M, w->ds, BLOCK_M, 0);
    gradient_tile(block, count, exponent_scale(p), w);
    if (masked) { /* P is 0 where dP may be anything */
        mask_tile(block, first, count, 0, w->s);
        mask_tile(block, first, count, 0, w->ds);
    }
    if (p->dv.data) {
        if (masked && !rows->finite_d_o)
            visible_to_keys(block, first, count, rows->d_o, plan->pad_dv, w->s, sums.dv, add);
        else
            gemm_rows(count, plan->pad_dv, block->rows, w->s, BLOCK_M, rows->d_o.data, rows->d_o.stride, sums.dv, plan->pad_dv,
                      add);
    }
    if (p->dk.data) {
        if (masked && !rows->finite_q)
            visible_to_keys(block, first, count, rows->q, plan->pad_d, w->ds, sums.dk, add);
        else
            gemm_rows(count, plan->pad_d, block->rows, w->ds, BLOCK_M, rows->q.data, rows->q.stride, sums.dk, plan->pad_d, add);
    }
    if (p->dq.data) {
        if (masked && !all_finite(k, count, p->head_dim))
            visible_to_lanes(block, first, count, k, p->head_dim, w->ds, w->dq_lanes, add_dq);
        else
            gemm_columns(p->head_dim, block->lanes, count, k.data, k.stride, w->ds, BLOCK_M, w->dq_lanes, BLOCK_M, add_dq);
    }
}

/* The tiles of a block from key `begin` on: dq_lanes of them, and dk and dv, added to the split's, or the first of it. */
static void backward_block(const cuflash_cpu_work *work, const row_block *block, const scratch *w, int64_t begin, int add,
                           key_sums all) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    backward_rows rows = {
        load_rows_and_lanes(plan, block, &p->q, p->head_dim, plan->pad_d, query_factor(p), w->q_rows, w->q_lanes),
        load_rows_and_lanes(plan, block, &p->d_o, p->head_dim_v, plan->pad_dv, 1, w->d_o_rows, w->d_o_lanes), 0, 0};
    if (block->keys > block->shared) { /* there is a masked tile */
        rows.finite_q = all_finite(rows.q, block->rows, plan->pad_d);
        rows.finite_d_o = all_finite(rows.d_o, block->rows, plan->pad_dv);
    }
    for (int64_t first = begin; first < block->keys && !cuflash_interrupted(work->ticket); first += BLOCK_N) {
        int64_t count = tile_size(block, first);
        key_sums sums = sums_of_tile(plan, all, first);
        backward_tile(plan, p, block, first, count, &rows, add, first > begin, w, sums);
        if (cuflash_keys_at_once(plan)) store_keys(plan, p, block->batch, block->head_kv, first, count, sums);
    }
}

/* The same of n blocks that go through the keys together: of pairs; otherwise there is one. */
static void backward_blocks(const cuflash_cpu_work *work, const row_block *blocks, const scratch *w, int64_t n, float *more,
                            int64_t begin, int add, key_sums all) {
#ifdef __AVX512BF16__
    if (work->plan->packed_bytes > 0) {
        bf16_backward_blocks(work, blocks, w, n, more, begin, add, all);
        return;
    }
#else
    (void)n, (void)more;
#endif
    backward_block(work, blocks, w, begin, add, all);
}

/* dq of a block, from lanes of it. */
static void store_dq(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const float *lanes) {
    float scale[BLOCK_M];
    for (int64_t r = 0; r < BLOCK_M; r++) scale[r] = (float)p->scale;
    store_lanes(plan, block, &p->dq, p->head_dim, lanes, scale);
}

static void backward_begin(const cuflash_cpu_work *work, int64_t number, float *base) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    row_block block = block_at(plan, p, number / plan->row_blocks, number % plan->row_blocks);
    scratch w;
    lay_out(plan, p, CUFLASH_BACKWARD, base, &w);
    find_rows(work->rows, number, &w);
    load_rows(plan, &block, &p->d_o, p->head_dim_v, plan->pad_dv, w.d_o_rows);
    load_delta(plan, p, &block, &w);
    load_softmax(plan, p, &block, &w, work->ticket);
}

/* Keys of x from `begin` to `end` as float32, in the buffer: what stands for x where these are read. */
static cuflash_operand convert_keys(const row_block *block, const cuflash_operand *x, int64_t begin, int64_t end, int64_t dim,
                                    float *buffer) {
    load_keys(block, x, begin, end - begin, dim, buffer);
    uintptr_t first = (uintptr_t)buffer - (uintptr_t)(begin * dim) * sizeof *buffer; /* where key 0 would be */
    return (cuflash_operand){.data = (void *)first, .dtype = CUFLASH_FLOAT32, .seq = dim};
}

/* One split of a pair's rows by one part of its keys: row blocks one after the other, or so many together, the last first, as it
 * sees all keys that others see. dk and dv of these keys are summed in the split's partial; dq is the unit's alone where the keys
 * are one part, else it is summed where the part keeps it. Units of the first keys, which the most rows see, come first. */
static void backward(const cuflash_cpu_work *work, int64_t unit, float *base) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    int64_t split = unit % plan->splits, part = unit / plan->splits % plan->key_parts,
            pair = unit / plan->splits / plan->key_parts;
    int64_t begin = cuflash_part_begin(plan, p, part), end = cuflash_part_begin(plan, p, part + 1);
    float *dq = work->dq_parts + (pair * plan->key_parts + part) * plan->dq_floats;
    row_block blocks[CUFLASH_MOST_TOGETHER];
    scratch w[CUFLASH_MOST_TOGETHER], own;
    float *more = base + lay_out(plan, p, CUFLASH_BACKWARD, base, &own);
    int64_t floats = dq_block_floats(p);
    key_sums all = {own.dk, own.dv};
    if (!cuflash_keys_at_once(plan)) all = sums_of_split(work, pair, split);
    int64_t begun = begin; /* keys up to here have a sum */
    int64_t index = (plan->row_blocks - 1 - split) / plan->splits * plan->splits + split;
    while (index >= 0) {
        int64_t n = 0;
        for (; n < plan->together && index >= 0; n++, index -= plan->splits) {
            blocks[n] = block_at(plan, p, pair, index);
            if (blocks[n].keys > end) blocks[n].keys = end;
            if (plan->key_parts > 1 && begin >= blocks[n].keys) {
                index = -1; /* this one and the rest see none of the part */
                break;
            }
            w[n] = own;
            w[n].dq_lanes = plan->key_parts > 1 ? dq + index * floats : own.dq_lanes + n * floats;
            find_rows(work->rows, pair * plan->row_blocks + index, &w[n]);
            if (begin >= blocks[n].keys) memset(w[n].dq_lanes, 0, (size_t)floats * sizeof(float));
        }
        if (n == 0) break;
        int64_t seen = blocks[0].keys;
        if (plan->part_keys > 0 && own.k.data == p->k.data) { /* the first block, which sees all that others see */
            w[0].k = own.k = convert_keys(&blocks[0], &p->k, begin, seen, p->head_dim, own.k_buffer);
            w[0].v = own.v = convert_keys(&blocks[0], &p->v, begin, seen, p->head_dim_v, own.v_buffer);
        }
        backward_blocks(work, blocks, w, n, more, begin, begun > begin, all);
        if (cuflash_interrupted(work->ticket)) return;
        if (seen > begun) begun = seen;
        for (int64_t i = 0; i < n && p->dq.data; i++) {
            for (int64_t r = 0; r < blocks[i].rows; r++)
                if (w[i].shift[r] == -INFINITY) clear_lane(w[i].dq_lanes, p->head_dim, r);
            if (plan->key_parts == 1) store_dq(plan, p, &blocks[i], w[i].dq_lanes);
        }
    }
    if (begun == end) return;
    key_sums rest = sums_of_tile(plan, all, begun); /* that none of the split's rows sees: a pair's last row sees all */
    memset(rest.dk, 0, (size_t)((end - begun) * plan->pad_d) * sizeof *rest.dk);
    memset(rest.dv, 0, (size_t)((end - begun) * plan->pad_dv) * sizeof *rest.dv);
}

static void backward_finish_rows(const cuflash_cpu_work *work, int64_t number, float *base) {
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    int64_t pair = number / plan->row_blocks, index = number % plan->row_blocks, floats = dq_block_floats(p);
    row_block block = block_at(plan, p, pair, index);
    scratch w;
    lay_out(plan, p, CUFLASH_BACKWARD, base, &w);
    memset(w.dq_lanes, 0, (size_t)floats * sizeof *w.dq_lanes);
    for (int64_t part = 0; part < plan->key_parts && cuflash_part_begin(plan, p, part) < block.keys; part++) {
        const float *dq = work->dq_parts + (pair * plan->key_parts + part) * plan->dq_floats + index * floats;
        for (int64_t i = 0; i < floats; i += VL) v_store(w.dq_lanes + i, v_load(w.dq_lanes + i) + v_load(dq + i));
    }
    store_dq(plan, p, &block, w.dq_lanes);
}

static void backward_finish_keys(const cuflash_cpu_work *work, int64_t unit, float *unused) {
    (void)unused;
    const cuflash_cpu_plan *plan = work->plan;
    const cuflash_problem *p = work->p;
    int64_t blocks = cuflash_key_blocks(p, BLOCK_N), pair = unit / blocks, first = unit % blocks * BLOCK_N;
    int64_t keys = p->seq_k - first < BLOCK_N ? p->seq_k - first : BLOCK_N;
    store_keys(plan, p, pair / p->heads_kv, pair % p->heads_kv, first, keys,
               sums_of_tile(plan, sums_of_split(work, pair, 0), first));
}

#endif
