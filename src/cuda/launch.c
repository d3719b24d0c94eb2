/* The launches of a plan. */
#include "cuda/launch.h"

#include <float.h>
#include <math.h>
#include <stdio.h>

#include "cuda/family.h"
#include "kernels/hopper/table.h"
#include "kernels/rows/table.h"

/* Everything a launch needs besides the kernel. */
typedef struct {
    const char *fn;
    const cuflash_cuda_plan *plan;
    const cuflash_problem *p;
    cuflash_hopper_args maps; /* for families that take tensors by them */
    cuflash_attention_args args;
} call;

static cuflash_status launch_kernel(const call *c, const cuflash_fatbin *fatbin, const char *entry, int64_t blocks, int threads,
                                    int smem_bytes, bool early) {
    CUfunction function;
    CUFLASH_TRY(cuflash_cuda_kernel(c->fn, c->p->device, fatbin, entry, smem_bytes, &function));
    const void *args = c->plan->family->maps ? (const void *)&c->maps : &c->args; /* which begin alike */
    return cuflash_cuda_launch(c->fn, function, blocks, threads, smem_bytes, args, early, c->p->stream);
}

static cuflash_status launch(const call *c, const cuflash_fatbin *fatbin, const char *entry, int64_t blocks, int threads,
                             int smem_bytes) {
    return launch_kernel(c, fatbin, entry, blocks, threads, smem_bytes, false);
}

static cuflash_kernel_strides strides(const cuflash_operand *x) {
    return (cuflash_kernel_strides){x->batch, x->head, x->seq};
}

static cuflash_attention_args make_args(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    cuflash_attention_args a = {
        .q = p->q.data,
        .k = p->k.data,
        .v = p->v.data,
        .o = p->o.data,
        .lse = p->lse.data,
        .d_o = p->d_o.data,
        .dq = p->dq.data,
        .dk = p->dk.data,
        .dv = p->dv.data,
        .q_stride = strides(&p->q),
        .k_stride = strides(&p->k),
        .v_stride = strides(&p->v),
        .o_stride = strides(&p->o),
        .lse_stride = strides(&p->lse),
        .d_o_stride = strides(&p->d_o),
        .dq_stride = strides(&p->dq),
        .dk_stride = strides(&p->dk),
        .dv_stride = strides(&p->dv),
        .batch = (int32_t)p->batch,
        .heads = (int32_t)p->heads,
        .heads_kv = (int32_t)p->heads_kv,
        .group = (int32_t)(p->heads / p->heads_kv),
        .together = plan->together,
        .seq_q = (int32_t)p->seq_q,
        .seq_k = (int32_t)p->seq_k,
        .head_dim = (int32_t)p->head_dim,
        .head_dim_v = (int32_t)p->head_dim_v,
        .causal = p->causal,
        .negative = p->scale < 0,
        .lse_half = p->lse.dtype == CUFLASH_FLOAT16,
        .vector = plan->vector,
        .scale = (float)p->scale,
        /* not 0: a masked score, -infinity, stays so; not infinite: the largest score, whose distance is 0, stays that */
        .scale_log2 = (float)fmin(fmax(fabs(p->scale) * 1.4426950408889634, 1e-37), (double)FLT_MAX),
    };
    return a;
}

/* Boxes of 64 columns and so many rows, of a [batch, heads, seq, dim] tensor of 16 bits. `together`: rows of so many heads are
 * neighbours in a box, [batch, heads / together, seq, together, dim]; 0: there are none but of one head. */
static cuflash_status make_map_of(const call *c, cuflash_tensor_map *map, const cuflash_operand *x, int64_t heads, int64_t seq,
                                  int64_t dim, int rows, int together) {
    int64_t each = together ? together : 1;
    const struct {
        int64_t size, stride, box;
    } all[] = {{dim, 1, 64},
               {each, x->head, each},
               {seq, x->seq, rows / each},
               {heads / each, x->head * each, 1},
               {c->p->batch, x->batch, 1}};
    uint64_t sizes[5], strides[5]; /* bytes from one to the next; maps leave out the first, which is an element */
    uint32_t box[5], steps[] = {1, 1, 1, 1, 1};
    unsigned rank = 0;
    for (int i = 0; i < 5; i++) {
        if (i == 1 && !together) continue;
        sizes[rank] = (uint64_t)all[i].size;
        /* A dimension of one element may have any stride, and maps take multiples of 16 bytes. */
        strides[rank] = all[i].size > 1 ? (uint64_t)all[i].stride * 2 : 16;
        box[rank++] = (uint32_t)all[i].box;
    }
    int type = c->p->dtype == CUFLASH_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUresult result = cuflash_cuda_get_driver(NULL)->cuTensorMapEncodeTiled(map, type, rank, x->data, sizes, strides + 1, box,
                                                                            steps, 0, CU_TENSOR_MAP_SWIZZLE_128B,
                                                                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, 0);
    return result == CUDA_SUCCESS ? CUFLASH_SUCCESS : cuflash_cuda_fail(c->fn, "making a tensor map", result);
}

static cuflash_status make_map(const call *c, cuflash_tensor_map *map, const cuflash_operand *x, int64_t heads, int64_t seq,
                               int64_t dim, int rows) {
    return make_map_of(c, map, x, heads, seq, dim, rows, 0);
}

/* The arguments of a kernel that takes tensors by maps; q_rows: of Q, and of dO, in a box. Clusters share out keys. */
static cuflash_status make_maps(call *c, int q_rows, int q_heads) {
    const cuflash_problem *p = c->p;
    const cuflash_kernel_row *row = &c->plan->row;
    c->maps.attention = c->args;
    CUFLASH_TRY(make_map_of(c, &c->maps.q, &p->q, p->heads, p->seq_q, p->head_dim, q_rows, q_heads));
    if (p->d_o.data) CUFLASH_TRY(make_map(c, &c->maps.d_o, &p->d_o, p->heads, p->seq_q, p->head_dim_v, q_rows));
    if (c->plan->finishes)
        CUFLASH_TRY(make_map(c, &c->maps.dq, &p->dq, p->heads, p->seq_q, p->head_dim, CUFLASH_HOPPER_DQ_ROWS));
    if (p->dk.data) CUFLASH_TRY(make_map(c, &c->maps.dk, &p->dk, p->heads_kv, p->seq_k, p->head_dim, CUFLASH_HOPPER_DK_ROWS));
    if (p->dv.data) CUFLASH_TRY(make_map(c, &c->maps.dv, &p->dv, p->heads_kv, p->seq_k, p->head_dim_v, CUFLASH_HOPPER_DK_ROWS));
    int keys = row->block_n / row->cluster;
    CUFLASH_TRY(make_map(c, &c->maps.k, &p->k, p->heads_kv, p->seq_k, p->head_dim, keys));
    return make_map(c, &c->maps.v, &p->v, p->heads_kv, p->seq_k, p->head_dim_v, keys);
}

static cuflash_status run_forward(call *c, char *workspace) {
    const cuflash_cuda_plan *plan = c->plan;
    const cuflash_kernel_row *row = &plan->row;
    char entry[CUFLASH_ENTRY_TEXT];
    while (1 << c->args.packed < plan->packed) c->args.packed++;
    if (plan->draws) c->args.ticket = (int32_t *)workspace;
    if (plan->family->maps) CUFLASH_TRY(make_maps(c, 64, plan->packed));
    if (plan->draws) CUFLASH_TRY(launch(c, &cuflash_fatbin_rows, "cuflash_rows_ticket", 1, 1, 0));
    cuflash_cuda_entry_name(entry, plan->family, "forward", c->p->dtype, row);
    return launch_kernel(c, plan->family->forward_fatbin, entry, plan->blocks, row->threads, row->smem_bytes, plan->draws);
}

/* The launches of a backward are told in kernels/attention.h. */
static cuflash_status run_backward(call *c, char *workspace) {
    const cuflash_cuda_plan *plan = c->plan;
    const cuflash_problem *p = c->p;
    const cuflash_cuda_family *family = plan->family;
    const cuflash_kernel_row *row = &plan->row;
    char entry[CUFLASH_ENTRY_TEXT];
    c->args.rows = (int32_t)plan->rows;
    c->args.dim_padded = row->dim;
    c->args.parts = (int32_t)plan->parts;
    c->args.whole = (int32_t)plan->whole;
    c->args.block_m = row->block_m;
    c->args.block_n = row->block_n;
    c->args.walks = (int32_t)plan->tiles;
    c->args.ticket = (int32_t *)(workspace + plan->at.ticket);
    c->args.row_max = (float *)(workspace + plan->at.row_max);
    c->args.row_log = (float *)(workspace + plan->at.row_log);
    c->args.row_offset = (float *)(workspace + plan->at.row_offset);
    c->args.row_delta = (float *)(workspace + plan->at.row_delta);
    if (p->dq.data) c->args.dq_sum = (float *)(workspace + plan->at.dq_sum);
    c->args.dk_parts = (float *)(workspace + plan->at.dk_parts);
    c->args.dv_parts = (float *)(workspace + plan->at.dv_parts);
    if (plan->turns) c->args.turn = (int32_t *)(workspace + plan->at.turn);
    c->args.descending = plan->descending;
    c->args.ordered = p->deterministic;
    c->args.stored = family->maps;
    c->args.finishes = plan->finishes;
    if (family->maps) CUFLASH_TRY(make_maps(c, row->block_m, 0));

    snprintf(entry, sizeof entry, "cuflash_rows_begin_%s", cuflash_cuda_dtype_suffix(p->dtype));
    int64_t groups = p->batch * p->heads * cuflash_divide_up(plan->rows, CUFLASH_ROWS_PER_BLOCK);
    CUFLASH_TRY(launch(c, &cuflash_fatbin_rows, entry, groups, CUFLASH_ROWS_THREADS, 0));

    if (p->dtype == CUFLASH_FLOAT32 || !p->lse.data || p->lse.dtype == CUFLASH_FLOAT16) {
        const cuflash_kernel_row *stats = &plan->stats;
        cuflash_cuda_entry_name(entry, plan->stats_family, "statistics", p->dtype, stats);
        CUFLASH_TRY(
            launch(c, plan->stats_family->forward_fatbin, entry, plan->stats_blocks, stats->threads, stats->smem_bytes));
    }

    cuflash_cuda_entry_name(entry, family, "backward", p->dtype, row);
    bool early = family->maps; /* such kernels wait for the one before where they need it */
    CUFLASH_TRY(launch_kernel(c, family->backward_fatbin, entry, plan->blocks, row->threads, row->smem_bytes, early));

    if (plan->whole < plan->walks && (p->dk.data || p->dv.data)) {
        snprintf(entry, sizeof entry, "cuflash_rows_sum_%s", cuflash_cuda_dtype_suffix(p->dtype));
        int64_t keys = (plan->walks - plan->whole) * row->block_n;
        CUFLASH_TRY(launch(c, &cuflash_fatbin_rows, entry, cuflash_divide_up(keys, CUFLASH_ROWS_THREADS / 32),
                           CUFLASH_ROWS_THREADS, 0));
    }
    if (!p->dq.data || (plan->finishes && !p->causal)) return CUFLASH_SUCCESS;
    cuflash_cuda_entry_name(entry, family, "finish", p->dtype, row);
    int64_t tiles = p->batch * p->heads * (plan->rows / row->block_m);
    if (plan->finishes) tiles = cuflash_divide_up(tiles, CUFLASH_HOPPER_FINISHED_TILES);
    int threads = family->finish_threads ? family->finish_threads : row->threads;
    return launch(c, family->backward_fatbin, entry, tiles, threads, 0);
}

cuflash_status cuflash_cuda_run(const cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass, void *workspace) {
    const char *fn = pass == CUFLASH_FORWARD ? "attention_forward" : "attention_backward";
    call c = {.fn = fn, .plan = plan, .p = p, .args = make_args(plan, p)};
    cuflash_cuda_scope scope;
    CUFLASH_TRY(cuflash_cuda_enter(fn, p->device, &scope));
    cuflash_status status = pass == CUFLASH_FORWARD ? run_forward(&c, workspace) : run_backward(&c, workspace);
    cuflash_cuda_leave(&scope);
    return status;
}
