/* The CPU kernels: FlashAttention (Dao et al. 2022; backward as in FlashAttention-2, Dao 2023) on tiles of block_m query
 * rows and block_n keys.
 *
 * Query rows are the lanes of the vectors. Scores are kept transposed, S[key][row], and so is the output while it
 * grows, O[d][row]: then the softmax needs no sums across lanes, a row's maximum and sum are one lane each, and every
 * product is gemm() with K and V read where they lie:
 *
 *   S[key][row]    = K[key][d]   * Q[d][row]           forward and backward
 *   O[d][row]     += V[key][d]   * P[key][row]         A read by columns
 *   dP[key][row]   = V[key][d]   * dO[d][row]
 *   dV[key][d]    += P[key][row] * dO[row][d]
 *   dK[key][d]    += dS[key][row] * Q[row][d]
 *   dQ[d][row]    += K[key][d]   * dS[key][row]        A read by columns
 *
 * Scores are differences before they are scaled: p = 2^((s - m) c), c = |scale| log2 e, with the sign of scale in Q.
 * Near the maximum the difference is exact, so logits of any size lose nothing. m is the largest, or little below it. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "few.h"
#include "gemm.h"
#include "interrupt.h"

enum { BLOCK_M = 64, BLOCK_N = 96, ALIGNMENT = 64 };

static const float LOG2E = 1.44269504f;

/* What is subtracted from scores stays until a score is so many exponents of 2 above it: the output need not be scaled as often.
 * Probabilities are up to 2 to this then, before they are divided by their sum, and what they multiply is to stay finite. */
static const float MOST_EXPONENT = 1;

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

static row_block block_at(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t pair, int64_t index) {
    row_block block = {.batch = pair / p->heads_kv, .head_kv = pair % p->heads_kv, .first = index * BLOCK_M};
    block.rows = plan->rows - block.first < BLOCK_M ? plan->rows - block.first : BLOCK_M;
    block.lanes = (block.rows + VL - 1) / VL * VL;
    block.shared = p->seq_k;
    for (int64_t r = 0; r < block.lanes; r++) {
        int64_t visible = r < block.rows ? cuflash_visible_keys(p, (block.first + r) / plan->group) : p->seq_k;
        if (r < block.rows && visible > block.keys) block.keys = visible;
        if (visible < block.shared) block.shared = visible;
        block.limit[r] = visible;
    }
    return block;
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

/* The block's rows of x times factor, as lanes: dst[d][row]. Lanes without a row are zero. */
static void load_lanes(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x, int64_t dim,
                       float factor, float *dst) {
    float rows[VL * WIDEST];
    int64_t width = cuflash_round_up(dim, VL);
    for (int64_t lane = 0; lane < block->lanes; lane += VL) {
        for (int64_t i = 0; i < VL; i++) {
            float *row = rows + i * width;
            int64_t loaded = lane + i < block->rows ? dim : 0;
            if (loaded) load_row(x->dtype, row_address(plan, block, x, lane + i), dim, row);
            for (int64_t d = loaded; d < width; d++) row[d] = 0;
        }
        turn_rows(rows, width, dim, factor, dst + lane);
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

/* Both; factor: of the lanes. There is room for as many rows as lanes. */
static void load_rows_and_lanes(const cuflash_cpu_plan *plan, const row_block *block, const cuflash_operand *x, int64_t dim,
                                int64_t pad, float factor, float *rows, float *lanes) {
    load_rows(plan, block, x, dim, pad, rows);
    memset(rows + block->rows * pad, 0, (size_t)((block->lanes - block->rows) * pad) * sizeof *rows);
    for (int64_t lane = 0; lane < block->lanes; lane += VL) turn_rows(rows + lane * pad, pad, dim, factor, lanes + lane);
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

/* Rows of K or V as float32: in place where they are that, converted into the buffer otherwise. */
typedef struct {
    const float *data;
    int64_t stride;
} key_tile;

static key_tile load_keys(const row_block *block, const cuflash_operand *x, int64_t first, int64_t count, int64_t dim,
                          float *buffer) {
    const char *rows = cuflash_row(x, block->batch, block->head_kv, first);
    if (x->dtype == CUFLASH_FLOAT32) return (key_tile){(const float *)(const void *)rows, x->seq};
    int64_t step = x->seq * (int64_t)cuflash_dtype_size(x->dtype);
    for (int64_t j = 0; j < count; j++) load_row(x->dtype, rows + j * step, dim, buffer + j * dim);
    return (key_tile){buffer, dim};
}

/* Where a part of the keys begins: at a tile. */
static int64_t part_begin(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t part) {
    int64_t size = plan->packed_bytes > 0 ? plan->kernels->pack_n : BLOCK_N, tiles = (p->seq_k + size - 1) / size;
    int64_t first = tiles * part / plan->key_parts * size;
    return first < p->seq_k ? first : p->seq_k;
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
static int all_finite(const float *x, int64_t stride, int64_t rows, int64_t dim) {
    vf sums = {0}; /* 0 times a number is 0, or NaN where it is not finite */
    float sum = 0;
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * stride;
        int64_t d = 0;
        for (; d + VL <= dim; d += VL) sums = sums + v_load(row + d) * 0.0f;
        for (; d < dim; d++) sum += row[d] * 0;
    }
    for (int i = 0; i < VL; i++) sum += sums[i];
    return sum == 0;
}

/* out[d][row] (+)= x[key][d] * weight[key][row] */
static void visible_to_lanes(const row_block *block, int64_t first, int64_t count, key_tile x, int64_t dim, const float *weight,
                             float *out, int add) {
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
static void visible_to_keys(const row_block *block, int64_t first, int64_t count, const float *x, int64_t pad,
                            const float *weight, float *out, int add) {
    for (int64_t j = 0; j < count; j++) {
        float sum[WIDEST] = {0};
        for (int64_t r = 0; r < block->rows; r++) {
            if (block->limit[r] <= first + j) continue;
            for (int64_t d = 0; d < pad; d++) sum[d] += weight[j * BLOCK_M + r] * x[r * pad + d];
        }
        for (int64_t d = 0; d < pad; d++) out[j * pad + d] = add ? out[j * pad + d] + sum[d] : sum[d];
    }
}

/* ---- Forward ------------------------------------------------------------------------------------ */

/* What a thread works in. */
typedef struct {
    float *q_lanes, *o_lanes;    /* [dim][BLOCK_M] */
    float *s;                    /* [BLOCK_N][BLOCK_M]: scores, then probabilities */
    float *k_buffer, *v_buffer;  /* [BLOCK_N][dim] */
    float *max, *sum;            /* [BLOCK_M]: the largest score so far, or little below it; the sum of 2^((s - max) c) */
    float *few_q, *few_o;        /* forward: [FEW][pad] */
    float *d_o_lanes, *dq_lanes; /* backward: [dim][BLOCK_M] */
    float *q_rows, *d_o_rows;    /* backward: [BLOCK_M][pad] */
    float *ds;                   /* backward: [BLOCK_N][BLOCK_M] */
    float *shift, *delta;        /* backward: [BLOCK_M] */
} scratch;

/* Of dq of a block, [dim][BLOCK_M]: a product of pairs writes whole tiles. */
static int64_t dq_block_floats(const cuflash_problem *p) {
    return cuflash_round_up(p->head_dim, 16) * BLOCK_M;
}

/* Lays the scratch out from base; returns how many floats it takes. */
static int64_t lay_out(const cuflash_cpu_plan *plan, const cuflash_problem *p, cuflash_pass pass, float *base, scratch *w) {
    int64_t used = 0;
#define TAKE(name, count) w->name = base + used, used += ((count) + 15) / 16 * 16
    TAKE(q_lanes, p->head_dim * BLOCK_M);
    TAKE(o_lanes, cuflash_round_up(p->head_dim_v, 16) * BLOCK_M);
    TAKE(s, BLOCK_N * BLOCK_M);
    TAKE(k_buffer, BLOCK_N * p->head_dim);
    TAKE(v_buffer, BLOCK_N * p->head_dim_v);
    TAKE(sum, BLOCK_M);
    if (pass == CUFLASH_FORWARD) {
        TAKE(max, BLOCK_M);
        TAKE(few_q, FEW * plan->pad_d);
        TAKE(few_o, FEW * plan->pad_dv);
        return used;
    }
    TAKE(d_o_lanes, p->head_dim_v * BLOCK_M);
    TAKE(dq_lanes, dq_block_floats(p));
    TAKE(q_rows, plan->pad_d * BLOCK_M);
    TAKE(d_o_rows, plan->pad_dv * BLOCK_M);
    TAKE(ds, BLOCK_N * BLOCK_M);
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

/* One step of the online softmax on V vectors of lanes: S becomes 2^((S - max) c), max and sum are brought up to date. Where the
 * largest score is too far above max, it becomes that, and the output so far, [dim][row], is scaled down to it. */
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
            vf prob = v_exp2((v_load(at) - base[v]) * c);
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
static void score_tile(const cuflash_problem *p, const row_block *block, int64_t first, int64_t count, key_tile k,
                       const scratch *w) {
    gemm(count, block->lanes, p->head_dim, k.data, k.stride, 1, w->q_lanes, BLOCK_M, w->s, BLOCK_M, 0);
    if (first + count > block->shared) mask_tile(block, first, count, -INFINITY, w->s);
}

static int64_t tile_size(const row_block *block, int64_t first) {
    return block->keys - first < BLOCK_N ? block->keys - first : BLOCK_N;
}

/* No row has seen a key. */
static void forget(const row_block *block, const scratch *w) {
    for (int64_t r = 0; r < block->lanes; r++) w->max[r] = -INFINITY, w->sum[r] = 0;
}

#ifdef __AVX512BF16__
#include "bf16.h"
#endif

/* max and sum of the block's rows over keys from `begin` to `end` and, if asked for, the output, not yet divided by sum. Needs
 * q_lanes. */
static void attend(const cuflash_problem *p, const row_block *block, const scratch *w, int with_output, int64_t begin,
                   int64_t end, unsigned ticket) {
    float c = exponent_scale(p);
    forget(block, w);
    if (end > block->keys) end = block->keys;
    for (int64_t first = begin; first < end; first += BLOCK_N) {
        if (cuflash_interrupted(ticket)) return;
        int64_t count = tile_size(block, first);
        score_tile(p, block, first, count, load_keys(block, &p->k, first, count, p->head_dim, w->k_buffer), w);
        softmax_tile(block->lanes, w->s, count, c, w->max, w->sum, w->o_lanes,
                     with_output && first > begin ? p->head_dim_v : 0);
        if (!with_output) continue;
        key_tile v = load_keys(block, &p->v, first, count, p->head_dim_v, w->v_buffer);
        if (first + count > block->shared && !all_finite(v.data, v.stride, count, p->head_dim_v))
            visible_to_lanes(block, first, count, v, p->head_dim_v, w->s, w->o_lanes, first > begin);
        else
            gemm(p->head_dim_v, block->lanes, count, v.data, 1, v.stride, w->s, BLOCK_M, w->o_lanes, BLOCK_M, first > begin);
    }
}

/* ---- Few rows ----------------------------------------------------------------------------------- */

#define FEW_ROWS(function, dtype, ...)                                                                                         \
    do {                                                                                                                       \
        if (block->rows == 1)                                                                                                  \
            function(1, dtype, __VA_ARGS__);                                                                                   \
        else if (block->rows == 2)                                                                                             \
            function(2, dtype, __VA_ARGS__);                                                                                   \
        else if (block->rows <= 4 && FEW > 4)                                                                                  \
            function(4, dtype, __VA_ARGS__);                                                                                   \
        else                                                                                                                   \
            function(FEW, dtype, __VA_ARGS__);                                                                                 \
    } while (0)
#define FEW_KINDS(function, ...)                                                                                               \
    switch (p->k.dtype) {                                                                                                      \
    case CUFLASH_FLOAT16: FEW_ROWS(function, CUFLASH_FLOAT16, __VA_ARGS__); break;                                             \
    case CUFLASH_BFLOAT16: FEW_ROWS(function, CUFLASH_BFLOAT16, __VA_ARGS__); break;                                           \
    default: FEW_ROWS(function, CUFLASH_FLOAT32, __VA_ARGS__);                                                                 \
    }

static void score_rows(const cuflash_problem *p, const row_block *block, int64_t first, int64_t count, int64_t pad,
                       const scratch *w) {
    const char *k = cuflash_row(&p->k, block->batch, block->head_kv, first);
    int64_t step = p->k.seq * (int64_t)cuflash_dtype_size(p->k.dtype);
    FEW_KINDS(score_few, count, p->head_dim, k, step, w->few_q, pad, w->s, BLOCK_M)
}

static void add_rows(const cuflash_problem *p, const row_block *block, int64_t first, int64_t count, int64_t pad,
                     const scratch *w) {
    const char *v = cuflash_row(&p->v, block->batch, block->head_kv, first);
    int64_t step = p->v.seq * (int64_t)cuflash_dtype_size(p->v.dtype);
    FEW_KINDS(add_few, count, p->head_dim_v, v, step, w->s, BLOCK_M, w->few_o, pad)
}

/* As visible_to_lanes, in add_few's order: what is hidden must not change a bit. */
static void add_visible_rows(const row_block *block, int64_t first, int64_t count, key_tile v, int64_t dim, int64_t pad,
                             const scratch *w) {
    for (int64_t r = 0; r < block->rows; r++)
        for (int64_t j = 0; j < count && first + j < block->limit[r]; j++)
            for (int64_t d = 0; d < dim; d++) w->few_o[r * pad + d] += w->s[j * BLOCK_M + r] * v.data[j * v.stride + d];
}

/* As attend(), of a block of at most FEW rows. */
static void attend_few(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w,
                       int64_t begin, int64_t end, unsigned ticket) {
    float c = exponent_scale(p), factor = query_factor(p);
    load_rows(plan, block, &p->q, p->head_dim, plan->pad_d, w->few_q);
    for (int64_t i = 0; i < block->rows * plan->pad_d; i++) w->few_q[i] *= factor;
    memset(w->few_q + block->rows * plan->pad_d, 0, (size_t)((FEW - block->rows) * plan->pad_d) * sizeof(float));
    memset(w->few_o, 0, (size_t)(FEW * plan->pad_dv) * sizeof(float));
    forget(block, w);
    if (end > block->keys) end = block->keys;
    for (int64_t first = begin; first < end; first += BLOCK_N) {
        if (cuflash_interrupted(ticket)) return;
        int64_t count = tile_size(block, first);
        score_rows(p, block, first, count, plan->pad_d, w);
        if (first + count > block->shared) mask_tile(block, first, count, -INFINITY, w->s);
        float before[FEW];
        memcpy(before, w->max, sizeof before);
        softmax_tile(block->lanes, w->s, count, c, w->max, w->sum, w->o_lanes, 0);
        for (int64_t r = 0; r < block->rows; r++) {
            if (before[r] == w->max[r] || before[r] == -INFINITY) continue;
            float shrink = exp2f((before[r] - w->max[r]) * c);
            for (int64_t d = 0; d < p->head_dim_v; d++) w->few_o[r * plan->pad_dv + d] *= shrink;
        }
        if (first + count > block->shared) {
            key_tile v = load_keys(block, &p->v, first, count, p->head_dim_v, w->v_buffer);
            if (!all_finite(v.data, v.stride, count, p->head_dim_v)) {
                add_visible_rows(block, first, count, v, p->head_dim_v, plan->pad_dv, w);
                continue;
            }
        }
        add_rows(p, block, first, count, plan->pad_dv, w);
    }
    for (int64_t r = 0; r < block->rows; r++)
        for (int64_t d = 0; d < p->head_dim_v; d++) w->o_lanes[d * BLOCK_M + r] = w->few_o[r * plan->pad_dv + d];
}

/* Was there no key for this row, or none with a score above -inf? */
static int sees_nothing(const scratch *w, int64_t r) {
    return w->max[r] == -INFINITY && w->sum[r] == 0;
}

static void clear_lane(float *lanes, int64_t dim, int64_t r) {
    for (int64_t d = 0; d < dim; d++) lanes[d * BLOCK_M + r] = 0;
}

static void store_lse(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w) {
    for (int64_t r = 0; r < block->rows; r++) {
        float lse = (float)((double)w->max[r] * logit_scale(p) + log((double)w->sum[r]));
        store_row(p->lse.dtype, row_address(plan, block, &p->lse, r), 1, &lse);
    }
}

/* The block's output over some keys, not yet divided by sum, by the fastest way. */
static void attend_forward(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w,
                           float *more, const void *packed, int64_t begin, int64_t end, unsigned ticket) {
#ifdef __AVX512BF16__
    if (plan->packed_bytes > 0) { /* and so all keys are one part */
        bf16_scratch x;
        bf16_lay_out(plan, p, more, &x);
        int64_t pair = block->batch * p->heads_kv + block->head_kv;
        bf16_attend(plan, p, block, w, &x, (const char *)packed + pair * plan->packed_bytes, ticket);
        return;
    }
#else
    (void)more, (void)packed;
#endif
    if (block->rows <= FEW) {
        attend_few(plan, p, block, w, begin, end, ticket);
        return;
    }
    load_lanes(plan, block, &p->q, p->head_dim, query_factor(p), w->q_lanes);
    attend(p, block, w, 1, begin, end, ticket);
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

/* What a part of the keys came to, in `partial`: max, sum, and the output, [dim][rows]. */
static void keep_part(const cuflash_problem *p, const row_block *block, const scratch *w, float *partial) {
    size_t bytes = (size_t)block->rows * sizeof(float);
    memcpy(partial, w->max, bytes);
    memcpy(partial + block->rows, w->sum, bytes);
    for (int64_t d = 0; d < p->head_dim_v; d++) memcpy(partial + (2 + d) * block->rows, w->o_lanes + d * BLOCK_M, bytes);
}

static void forward(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t unit, float *base, const void *packed,
                    float *partial, unsigned ticket) {
    int64_t part = unit % plan->key_parts;
    row_block block = forward_block(plan, p, unit / plan->key_parts);
    scratch w;
    int64_t used = lay_out(plan, p, CUFLASH_FORWARD, base, &w);
    attend_forward(plan, p, &block, &w, base + used, packed, part_begin(plan, p, part), part_begin(plan, p, part + 1), ticket);
    if (cuflash_interrupted(ticket)) return;
    if (plan->key_parts > 1)
        keep_part(p, &block, &w, partial);
    else
        store_output(plan, p, &block, &w);
}

/* The parts of a row block together, in their order. */
static void forward_finish(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t number, float *base,
                           const float *partials) {
    row_block block = forward_block(plan, p, number);
    scratch w;
    lay_out(plan, p, CUFLASH_FORWARD, base, &w);
    int64_t rows = block.rows, parts = 0;
    while (parts < plan->key_parts && part_begin(plan, p, parts) < block.keys) parts++; /* which have keys that a row sees */
    partials += number * plan->key_parts * plan->partial_floats;
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

/* ---- Backward ----------------------------------------------------------------------------------- */

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
        attend(p, block, w, 0, 0, p->seq_k, ticket);
    }
    for (int64_t r = 0; r < block->lanes; r++) {
        if (r < block->rows && !(given && is_fine(lse[r], block->limit[r]))) {
            w->shift[r] = sees_nothing(w, r) ? -INFINITY : -log2f(w->sum[r]);
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

/* Are the rows of the tile's operands such that a weight of 0 hides them? */
typedef struct {
    int q, d_o;
} finite_rows;

static void backward_tile(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, int64_t first,
                          int64_t count, finite_rows finite, int add, const scratch *w, float *dk, float *dv) {
    key_tile k = load_keys(block, &p->k, first, count, p->head_dim, w->k_buffer);
    key_tile v = load_keys(block, &p->v, first, count, p->head_dim_v, w->v_buffer);
    int masked = first + count > block->shared;
    score_tile(p, block, first, count, k, w);
    gemm(count, block->lanes, p->head_dim_v, v.data, v.stride, 1, w->d_o_lanes, BLOCK_M, w->ds, BLOCK_M, 0);
    gradient_tile(block, count, exponent_scale(p), w);
    if (masked) { /* P is 0 where dP may be anything */
        mask_tile(block, first, count, 0, w->s);
        mask_tile(block, first, count, 0, w->ds);
    }
    dk += first * plan->pad_d;
    dv += first * plan->pad_dv;
    if (p->dv.data) {
        if (masked && !finite.d_o)
            visible_to_keys(block, first, count, w->d_o_rows, plan->pad_dv, w->s, dv, add);
        else
            gemm(count, plan->pad_dv, block->rows, w->s, BLOCK_M, 1, w->d_o_rows, plan->pad_dv, dv, plan->pad_dv, add);
    }
    if (p->dk.data) {
        if (masked && !finite.q)
            visible_to_keys(block, first, count, w->q_rows, plan->pad_d, w->ds, dk, add);
        else
            gemm(count, plan->pad_d, block->rows, w->ds, BLOCK_M, 1, w->q_rows, plan->pad_d, dk, plan->pad_d, add);
    }
    if (p->dq.data) {
        if (masked && !all_finite(k.data, k.stride, count, p->head_dim))
            visible_to_lanes(block, first, count, k, p->head_dim, w->ds, w->dq_lanes, 1);
        else
            gemm(p->head_dim, block->lanes, count, k.data, 1, k.stride, w->ds, BLOCK_M, w->dq_lanes, BLOCK_M, 1);
    }
}

/* The tiles of a block from key `begin` to `end`: adds to dq_lanes, and to dk and dv of the split, or begins these. */
static void backward_block(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const scratch *w,
                           float *more, const void *packed, int64_t begin, int64_t end, int add, float *dk, float *dv,
                           unsigned ticket) {
#ifdef __AVX512BF16__
    if (plan->packed_bytes > 0) {
        bf16_scratch x;
        bf16_lay_out(plan, p, more, &x);
        int64_t pair = block->batch * p->heads_kv + block->head_kv;
        bf16_backward_block(plan, p, block, w, &x, (const char *)packed + pair * plan->packed_bytes, begin, end, add, dk, dv,
                            ticket);
        return;
    }
#else
    (void)more, (void)packed;
#endif
    load_rows_and_lanes(plan, block, &p->q, p->head_dim, plan->pad_d, query_factor(p), w->q_rows, w->q_lanes);
    load_rows_and_lanes(plan, block, &p->d_o, p->head_dim_v, plan->pad_dv, 1, w->d_o_rows, w->d_o_lanes);
    finite_rows finite = {all_finite(w->q_rows, plan->pad_d, block->rows, plan->pad_d),
                          all_finite(w->d_o_rows, plan->pad_dv, block->rows, plan->pad_dv)};
    for (int64_t first = begin; first < end && !cuflash_interrupted(ticket); first += BLOCK_N)
        backward_tile(plan, p, block, first, tile_size(block, first), finite, add, w, dk, dv);
}

/* dq of a block, from lanes of it. */
static void store_dq(const cuflash_cpu_plan *plan, const cuflash_problem *p, const row_block *block, const float *lanes) {
    float scale[BLOCK_M];
    for (int64_t r = 0; r < BLOCK_M; r++) scale[r] = (float)p->scale;
    store_lanes(plan, block, &p->dq, p->head_dim, lanes, scale);
}

static void backward_begin(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t number, float *base, float *rows,
                           unsigned ticket) {
    row_block block = block_at(plan, p, number / plan->row_blocks, number % plan->row_blocks);
    scratch w;
    lay_out(plan, p, CUFLASH_BACKWARD, base, &w);
    find_rows(rows, number, &w);
    load_rows(plan, &block, &p->d_o, p->head_dim_v, plan->pad_dv, w.d_o_rows);
    load_delta(plan, p, &block, &w);
    load_softmax(plan, p, &block, &w, ticket);
}

/* One split of a pair's rows by one part of its keys: row blocks one after the other, the last first, as it sees all keys that
 * others see. dk and dv of these keys are summed in the split's partial; dq is the unit's alone where the keys are one part, else
 * it is summed where the part keeps it. Units of the first keys, which the most rows see, come first. */
static void backward(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t unit, float *base, const void *packed,
                     float *rows, float *partials, float *dq_parts, unsigned ticket) {
    int64_t split = unit % plan->splits, pair = unit / plan->splits % plan->pairs, part = unit / plan->splits / plan->pairs;
    int64_t begin = part_begin(plan, p, part), end = part_begin(plan, p, part + 1);
    float *dk = partials + (pair * plan->splits + split) * plan->partial_floats, *dv = dk + plan->pad_k * plan->pad_d;
    float *dq = dq_parts + (pair * plan->key_parts + part) * plan->dq_floats;
    scratch w;
    int64_t used = lay_out(plan, p, CUFLASH_BACKWARD, base, &w);
    int64_t begun = begin; /* keys up to here have a sum */
    for (int64_t index = (plan->row_blocks - 1 - split) / plan->splits * plan->splits + split; index >= 0;
         index -= plan->splits) {
        row_block block = block_at(plan, p, pair, index);
        int64_t seen = end < block.keys ? end : block.keys;
        if (plan->key_parts > 1 && begin >= seen) break;
        find_rows(rows, pair * plan->row_blocks + index, &w);
        if (plan->key_parts > 1) w.dq_lanes = dq + index * dq_block_floats(p);
        memset(w.dq_lanes, 0, (size_t)dq_block_floats(p) * sizeof *w.dq_lanes);
        backward_block(plan, p, &block, &w, base + used, packed, begin, seen, begun > begin, dk, dv, ticket);
        if (cuflash_interrupted(ticket)) return;
        if (seen > begun) begun = seen;
        if (!p->dq.data) continue;
        for (int64_t r = 0; r < block.rows; r++)
            if (w.shift[r] == -INFINITY) clear_lane(w.dq_lanes, p->head_dim, r);
        if (plan->key_parts == 1) store_dq(plan, p, &block, w.dq_lanes);
    }
    memset(dk + begun * plan->pad_d, 0, (size_t)((end - begun) * plan->pad_d) * sizeof *dk);
    memset(dv + begun * plan->pad_dv, 0, (size_t)((end - begun) * plan->pad_dv) * sizeof *dv);
}

static void backward_finish_rows(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t number, float *base,
                                 const float *dq_parts) {
    int64_t pair = number / plan->row_blocks, index = number % plan->row_blocks, floats = dq_block_floats(p);
    row_block block = block_at(plan, p, pair, index);
    scratch w;
    lay_out(plan, p, CUFLASH_BACKWARD, base, &w);
    memset(w.dq_lanes, 0, (size_t)floats * sizeof *w.dq_lanes);
    for (int64_t part = 0; part < plan->key_parts && part_begin(plan, p, part) < block.keys; part++) {
        const float *dq = dq_parts + (pair * plan->key_parts + part) * plan->dq_floats + index * floats;
        for (int64_t i = 0; i < floats; i += VL) v_store(w.dq_lanes + i, v_load(w.dq_lanes + i) + v_load(dq + i));
    }
    store_dq(plan, p, &block, w.dq_lanes);
}

/* x[key] = factor * the sum of the splits' partial rows. */
static void sum_splits(const cuflash_cpu_plan *plan, const cuflash_operand *x, int64_t b, int64_t h, int64_t key, int64_t dim,
                       const float *row, float factor) {
    if (!x->data) return;
    float sum[CUFLASH_MAX_HEAD_DIM];
    memcpy(sum, row, (size_t)dim * sizeof *sum);
    for (int64_t split = 1; split < plan->splits; split++)
        for (int64_t d = 0; d < dim; d++) sum[d] += row[split * plan->partial_floats + d];
    for (int64_t d = 0; d < dim; d++) sum[d] *= factor;
    store_row(x->dtype, cuflash_row(x, b, h, key), dim, sum);
}

static void backward_finish_keys(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t pair, int64_t first,
                                 int64_t keys, const float *partials) {
    int64_t b = pair / p->heads_kv, h = pair % p->heads_kv;
    const float *dk = partials + pair * plan->splits * plan->partial_floats, *dv = dk + plan->pad_k * plan->pad_d;
    for (int64_t key = first; key < first + keys; key++) {
        sum_splits(plan, &p->dk, b, h, key, p->head_dim, dk + key * plan->pad_d, (float)p->scale);
        sum_splits(plan, &p->dv, b, h, key, p->head_dim_v, dv + key * plan->pad_dv, 1);
    }
}

/* ---- Sizes -------------------------------------------------------------------------------------- */

static int64_t scratch_floats(const cuflash_cpu_plan *plan, const cuflash_problem *p, cuflash_pass pass) {
    scratch w;
    int64_t used = lay_out(plan, p, pass, (float *)(uintptr_t)ALIGNMENT, &w); /* only the sizes count */
#ifdef __AVX512BF16__
    bf16_scratch x;
    if (plan->packed_bytes > 0) used += bf16_lay_out(plan, p, (float *)(uintptr_t)ALIGNMENT, &x);
#endif
    return used;
}

/* ---- The row of the table in cpu.c -------------------------------------------------------------- */

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

const cuflash_cpu_kernels PASTE(cuflash_cpu_, CUFLASH_ISA) = {
    .name = TEXT(CUFLASH_ISA),
    .vector = VL,
    .block_m = BLOCK_M,
    .block_n = BLOCK_N,
    .scratch_floats = scratch_floats,
    .forward = forward,
    .forward_finish = forward_finish,
    .backward_begin = backward_begin,
    .backward = backward,
    .backward_finish_keys = backward_finish_keys,
    .backward_finish_rows = backward_finish_rows,
#ifdef __AVX512BF16__
    .on_pairs = BF16_WORDS,
    .packed_bytes = bf16_packed_bytes,
    .pack = bf16_pack,
    .pack_n = BF16_BLOCK_N,
#endif
};
