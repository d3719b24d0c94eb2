/* Blocks of query rows, as rows and as lanes, and the keys they see: how tensors of any dtype are read and written, and what is
 * hidden. */
#ifndef CUFLASH_CPU_ROWS_H
#define CUFLASH_CPU_ROWS_H

#include <string.h>

#include "cpu.h"
#include "vec.h"

enum { BLOCK_M = 64, BLOCK_N = 96 }; /* rows of a block, keys of a tile */

/* ---- Rows and keys of any dtype ----------------------------------------------------------------- */

static void load_row(cuflash_dtype dtype, const void *row, int64_t n, float *dst) {
    switch (dtype) {
    case CUFLASH_FLOAT16: half_to_float_row(row, n, dst); break;
    case CUFLASH_BFLOAT16: bfloat_to_float_row(row, n, dst); break;
    default: memcpy(dst, row, (size_t)n * sizeof(float));
    }
}

static void store_row(cuflash_dtype dtype, void *row, int64_t n, const float *src) {
    switch (dtype) {
    case CUFLASH_FLOAT16: float_to_half_row(src, n, row); break;
    case CUFLASH_BFLOAT16: float_to_bfloat_row(src, n, row); break;
    default: memcpy(row, src, (size_t)n * sizeof(float));
    }
}

/* Some query rows of one (batch, KV head) pair, and what they may see. */
typedef struct {
    int64_t batch, head_kv, first; /* first: row number within the pair */
    int64_t rows, lanes;           /* lanes: rows rounded up to whole vectors */
    int64_t keys;                  /* the most any row sees */
    int64_t shared;                /* keys that every row sees */
    int64_t limit[BLOCK_M];        /* keys that each row sees; all of them where a lane has no row */
} row_block;

/* So many rows of a pair from `first` on. */
static row_block rows_at(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t pair, int64_t first, int64_t rows) {
    row_block block = {.batch = pair / p->heads_kv, .head_kv = pair % p->heads_kv, .first = first, .rows = rows};
    block.lanes = cuflash_round_up(block.rows, VL);
    block.shared = p->seq_k;
    for (int64_t r = 0; r < block.lanes; r++) {
        int64_t visible = r < block.rows ? cuflash_visible_keys(p, (block.first + r) / plan->group) : p->seq_k;
        if (r < block.rows && visible > block.keys) block.keys = visible;
        if (visible < block.shared) block.shared = visible;
        block.limit[r] = visible;
    }
    return block;
}

static row_block block_at(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t pair, int64_t index) {
    int64_t first = index * BLOCK_M, rows = plan->rows - first;
    return rows_at(plan, p, pair, first, rows < BLOCK_M ? rows : BLOCK_M);
}

/* Where row r of the block lies in q, o or one of their like. */
static char *row_address(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x, int64_t r) {
    int64_t row = block->first + r;
    return cuflash_row(x, block->batch, block->head_kv * plan->group + row % plan->group, row / plan->group);
}

/* Turns VL rows of `width` floats, whole vectors: to[d][row], of the first dim of them. */
static __attribute__((noinline)) void turn_rows(const float *rows, int64_t width, int64_t dim, float factor, float *to) {
    for (int64_t d = 0; d < dim; d += VL) {
        vf x[VL];
        for (int i = 0; i < VL; i++) x[i] = v_load(rows + i * width + d) * factor;
        v_transpose(x);
        for (int i = 0; i < VL && d + i < dim; i++) v_store(to + (d + i) * BLOCK_M, x[i]);
    }
}

/* And back. */
static __attribute__((noinline)) void turn_lanes(const float *lanes, int64_t width, int64_t dim, vf factor, float *rows) {
    for (int64_t d = 0; d < dim; d += VL) {
        vf x[VL];
        for (int i = 0; i < VL; i++) x[i] = d + i < dim ? v_load(lanes + (d + i) * BLOCK_M) * factor : (vf){0};
        v_transpose(x);
        for (int i = 0; i < VL; i++) v_store(rows + i * width + d, x[i]);
    }
}

enum { WIDEST = (CUFLASH_MAX_HEAD_DIM + VL - 1) / VL * VL };

/* Rows of float32. */
typedef struct {
    const float *data;
    int64_t stride;
} float_rows;

/* The block's rows of x from `first` on where they lie, if they are float32, whole vectors, and one behind the other; else NULL. */
static const float *rows_in_place(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x, int64_t dim,
                                  int64_t first, int64_t count) {
    if (x->dtype != CUFLASH_FLOAT32 || plan->group > 1 || dim % VL != 0 || x->seq != dim || first + count > block->rows)
        return NULL;
    const char *at = row_address(plan, block, x, first);
    return (uintptr_t)at % sizeof(vf) == 0 ? (const float *)(const void *)at : NULL;
}

/* The block's rows of x times factor, as lanes: dst[d][row]. Lanes without a row are zero. */
static void load_lanes(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x, int64_t dim,
                       float factor, float *dst) {
    float rows[VL * WIDEST];
    int64_t width = cuflash_round_up(dim, VL);
    for (int64_t lane = 0; lane < block->lanes; lane += VL) {
        const float *there = rows_in_place(plan, block, x, dim, lane, VL);
        for (int64_t i = 0; i < VL && !there; i++) {
            float *row = rows + i * width;
            int64_t loaded = lane + i < block->rows ? dim : 0;
            if (loaded) load_row(x->dtype, row_address(plan, block, x, lane + i), dim, row);
            for (int64_t d = loaded; d < width; d++) row[d] = 0;
        }
        turn_rows(there ? there : rows, width, dim, factor, dst + lane);
    }
}

/* The block's rows of x as rows, dst[row][pad], padded with zeros. */
static void load_rows(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x, int64_t dim, int64_t pad,
                      float *dst) {
    for (int64_t r = 0; r < block->rows; r++) {
        load_row(x->dtype, row_address(plan, block, x, r), dim, dst + r * pad);
        for (int64_t d = dim; d < pad; d++) dst[r * pad + d] = 0;
    }
}

/* Both, rows where they lie or in the buffer, which has room for as many as there are lanes. factor: of the lanes. */
static float_rows load_rows_and_lanes(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x,
                                      int64_t dim, int64_t pad, float factor, float *buffer, float *lanes) {
    const float *rows = rows_in_place(plan, block, x, dim, 0, block->lanes);
    if (!rows) {
        load_rows(plan, block, x, dim, pad, buffer);
        memset(buffer + block->rows * pad, 0, (size_t)((block->lanes - block->rows) * pad) * sizeof *buffer);
        rows = buffer;
    }
    for (int64_t lane = 0; lane < block->lanes; lane += VL) turn_rows(rows + lane * pad, pad, dim, factor, lanes + lane);
    return (float_rows){rows, pad};
}

/* Writes lanes, src[d][row] * factor[row], to the block's rows of x. */
static void store_lanes(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x, int64_t dim,
                        const float *src, const float *factor) {
    float rows[VL * WIDEST];
    int64_t width = cuflash_round_up(dim, VL);
    for (int64_t lane = 0; lane < block->rows; lane += VL) {
        turn_lanes(src + lane, width, dim, v_load(factor + lane), rows);
        for (int64_t i = 0; i < VL && lane + i < block->rows; i++)
            store_row(x->dtype, row_address(plan, block, x, lane + i), dim, rows + i * width);
    }
}

/* Rows of K or V: in place where they are float32, converted into the buffer otherwise. */
static float_rows load_keys(const row_block *block, const cuflash_operand *x, int64_t first, int64_t count, int64_t dim,
                            float *buffer) {
    const char *rows = cuflash_row(x, block->batch, block->head_kv, first);
    if (x->dtype == CUFLASH_FLOAT32) return (float_rows){(const float *)(const void *)rows, x->seq};
    int64_t step = x->seq * (int64_t)cuflash_dtype_size(x->dtype);
    for (int64_t j = 0; j < count; j++) load_row(x->dtype, rows + j * step, dim, buffer + j * dim);
    return (float_rows){buffer, dim};
}

/* ---- Masking ------------------------------------------------------------------------------------ */

/* How many keys of a tile a vector of lanes sees. */
static vi seen_keys(const row_block *block, int64_t lane, int64_t first, int64_t count) {
    vi seen;
    for (int i = 0; i < VL; i++) {
        int64_t keys = block->limit[lane + i] - first;
        seen[i] = keys < 0 ? 0 : keys < count ? (int32_t)keys : (int32_t)count;
    }
    return seen;
}

/* Writes value where a row does not see a key; x is [key][row], its first key number `first`. */
static void mask_tile(const row_block *block, int64_t first, int64_t count, float value, float *x) {
    for (int64_t lane = 0; lane < block->lanes; lane += VL) {
        vi seen = seen_keys(block, lane, first, count);
        for (int32_t j = 0; j < (int32_t)count; j++) {
            float *at = x + j * BLOCK_M + lane;
            v_store(at, v_select(seen <= j, v_set(value), v_load(at)));
        }
    }
}

/* A product gives a hidden key weight 0, and 0 times infinity or NaN is NaN. So where a tile hides something, and the
 * rows it multiplies are not all finite, these take the product's place and skip what is hidden. */
static int all_finite(float_rows x, int64_t rows, int64_t dim) {
    vf sums = {0}; /* 0 times a number is 0, or NaN where it is not finite */
    float sum = 0;
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x.data + r * x.stride;
        int64_t d = 0;
        for (; d + VL <= dim; d += VL) sums = sums + v_load(row + d) * 0.0f;
        for (; d < dim; d++) sum += row[d] * 0;
    }
    for (int i = 0; i < VL; i++) sum += sums[i];
    return sum == 0;
}

/* out[d][row] (+)= x[key][d] * weight[key][row] */
static void visible_to_lanes(const row_block *block, int64_t first, int64_t count, float_rows x, int64_t dim,
                             const float *weight, float *out, int add) {
    for (int64_t r = 0; r < block->lanes; r++) {
        int64_t seen = block->limit[r] - first < count ? block->limit[r] - first : count;
        for (int64_t d = 0; d < dim; d++) {
            float sum = 0;
            for (int64_t j = 0; j < seen; j++) sum += x.data[j * x.stride + d] * weight[j * BLOCK_M + r];
            out[d * BLOCK_M + r] = add ? out[d * BLOCK_M + r] + sum : sum;
        }
    }
}

/* out[key][d] (+)= weight[key][row] * x[row][d] */
static void visible_to_keys(const row_block *block, int64_t first, int64_t count, float_rows x, int64_t pad,
                            const float *weight, float *out, int add) {
    for (int64_t j = 0; j < count; j++) {
        float sum[WIDEST] = {0};
        for (int64_t r = 0; r < block->rows; r++) {
            if (block->limit[r] <= first + j) continue;
            for (int64_t d = 0; d < pad; d++) sum[d] += weight[j * BLOCK_M + r] * x.data[r * x.stride + d];
        }
        for (int64_t d = 0; d < pad; d++) out[j * pad + d] = add ? out[j * pad + d] + sum[d] : sum[d];
    }
}

#endif
