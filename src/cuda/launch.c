#include "cuda/launch.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/fma/table.h"
#include "kernels/hopper/table.h"
#include "kernels/mma/table.h"
#include "kernels/rows/table.h"
#include "kernels/tf32/table.h"

/* ---- Families ----------------------------------------------------------------------------------- */

/* The kernels of one construction. Their entry points are cuflash_<family>_<pass>_<dtype>_d<dim>_<block_m>x<block_n>, and "_late"
 * of rows that are so. */
struct cuflash_cuda_family {
    const char *name, *what;
    int oldest, newest; /* compute capability, 10 * major + minor; 0: any later one */
    bool float32, half;
    bool maps;                                    /* takes q, k and v by tensor maps, and gradients */
    const cuflash_kernel_row *forward, *backward; /* rows by head dimension, then by preference; dim 0 ends them; or NULL */
    const cuflash_kernel_row *statistics;         /* rows of forward kernels that compute statistics alone; or NULL */
    const cuflash_fatbin *forward_fatbin, *backward_fatbin;
    int finish_threads; /* of the kernel after a backward; 0: as many as that has */
};

#define HOPPER_FORWARD_ROW(...) {__VA_ARGS__, 0},
#define HOPPER_BACKWARD_ROW(...) {__VA_ARGS__},
#define ROW(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                        \
    {dim, block_m, block_n, stages, threads, blocks, smem_bytes, CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 1, 0},
static const cuflash_kernel_row hopper_forward[] = {CUFLASH_HOPPER_FORWARD(HOPPER_FORWARD_ROW){0}};
static const cuflash_kernel_row hopper_backward[] = {CUFLASH_HOPPER_BACKWARD(HOPPER_BACKWARD_ROW){0}};
static const cuflash_kernel_row mma_forward[] = {CUFLASH_MMA_FORWARD(ROW){0}};
static const cuflash_kernel_row mma_statistics[] = {CUFLASH_MMA_STATISTICS(ROW){0}};
static const cuflash_kernel_row mma_backward[] = {CUFLASH_MMA_BACKWARD(ROW){0}};
static const cuflash_kernel_row tf32_forward[] = {CUFLASH_TF32_FORWARD(ROW){0}};
static const cuflash_kernel_row fma_forward[] = {CUFLASH_FMA_FORWARD(ROW){0}};
static const cuflash_kernel_row fma_statistics[] = {CUFLASH_FMA_STATISTICS(ROW){0}};
static const cuflash_kernel_row fma_backward[] = {CUFLASH_FMA_BACKWARD(ROW){0}};
static const cuflash_kernel_row fma_half_forward[] = {CUFLASH_FMA_HALF_FORWARD(ROW){0}};
static const cuflash_kernel_row fma_half_backward[] = {CUFLASH_FMA_HALF_BACKWARD(ROW){0}};
#undef ROW
#undef HOPPER_FORWARD_ROW
#undef HOPPER_BACKWARD_ROW

/* By preference. */
static const cuflash_cuda_family families[] = {
    {.name = "hopper",
     .what = "16-bit tensor cores, wgmma",
     .oldest = 90,
     .newest = 90,
     .half = true,
     .maps = true,
     .forward = hopper_forward,
     .backward = hopper_backward,
     .forward_fatbin = &cuflash_fatbin_hopper_forward,
     .backward_fatbin = &cuflash_fatbin_hopper_backward,
     .finish_threads = CUFLASH_HOPPER_FINISH_THREADS},
    {.name = "mma",
     .what = "16-bit tensor cores, mma.sync",
     .oldest = 80,
     .half = true,
     .forward = mma_forward,
     .backward = mma_backward,
     .statistics = mma_statistics,
     .forward_fatbin = &cuflash_fatbin_mma_forward,
     .backward_fatbin = &cuflash_fatbin_mma_backward},
    {.name = "tf32",
     .what = "float32 as sums of TF32 products, tensor cores, mma.sync",
     .oldest = 80,
     .float32 = true,
     .forward = tf32_forward,
     .forward_fatbin = &cuflash_fatbin_tf32_forward},
    {.name = "fma",
     .what = "float32 multiply-adds",
     .oldest = 70,
     .float32 = true,
     .forward = fma_forward,
     .backward = fma_backward,
     .statistics = fma_statistics,
     .forward_fatbin = &cuflash_fatbin_fma_forward,
     .backward_fatbin = &cuflash_fatbin_fma_backward},
    {.name = "fma",
     .what = "float32 multiply-adds on 16-bit tensors",
     .oldest = 70,
     .half = true,
     .forward = fma_half_forward,
     .backward = fma_half_backward,
     .statistics = fma_half_forward,
     .forward_fatbin = &cuflash_fatbin_fma_half_forward,
     .backward_fatbin = &cuflash_fatbin_fma_half_backward},
};
enum { FAMILIES = sizeof families / sizeof *families };

/* CUFLASH_CUDA_FAMILY, names by commas, read at the first use. */
static const char *forced;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void read_environment(void) {
    const char *value = getenv("CUFLASH_CUDA_FAMILY");
    if (value && *value) forced = value;
}

/* Is it one of the names in a list by commas? */
static bool is_listed(const char *name, const char *list) {
    for (size_t length; *list; list += length + (list[length] == ','))
        if ((length = strcspn(list, ",")) == strlen(name) && strncmp(list, name, length) == 0) return true;
    return false;
}

/* Do all rows begin at multiples of 16 bytes and hold whole 16 bytes? */
static bool is_vector(const cuflash_problem *p) {
    const cuflash_operand *const all[] = {&p->q, &p->k, &p->v, &p->o, &p->d_o, &p->dq, &p->dk, &p->dv};
    int64_t each = 16 / (int64_t)cuflash_dtype_size(p->dtype);
    if (p->head_dim % each || p->head_dim_v % each) return false;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const cuflash_operand *x = all[i];
        if (x->data && ((uintptr_t)x->data % 16 || x->batch % each || x->head % each || x->seq % each)) return false;
    }
    return true;
}

/* Can tensor maps tell how a [batch, heads, seq, dim] tensor lies, where it is given? It has rows that is_vector takes. */
static bool is_mappable(const cuflash_operand *x, int64_t batch, int64_t heads, int64_t seq) {
    enum { LIMIT = 1 << 30 }; /* 16-bit elements from one to the next; maps have 2^40 bytes */
    const struct { int64_t size, stride; } all[] = {{batch, x->batch}, {heads, x->head}, {seq, x->seq}};
    if (!x->data) return true;
    for (int i = 0; i < 3; i++)
        if (all[i].size > 1 && (all[i].stride <= 0 || all[i].stride / 8 > LIMIT)) return false;
    return true;
}

static bool is_for(const cuflash_cuda_family *f, const cuflash_problem *p, const cuflash_cuda_properties *device) {
    int compute = 10 * device->major + device->minor;
    return (p->dtype == CUFLASH_FLOAT32 ? f->float32 : f->half) && compute >= f->oldest && (!f->newest || compute <= f->newest);
}

static bool takes(const cuflash_cuda_family *f, const cuflash_problem *p, const cuflash_cuda_properties *device) {
    if (!is_for(f, p, device) || (forced && !is_listed(f->name, forced))) return false;
    if (!f->maps) return true;
    return f->forward_fatbin->data && cuflash_cuda_get_driver(NULL)->cuTensorMapEncodeTiled && is_vector(p) &&
           is_mappable(&p->q, p->batch, p->heads, p->seq_q) && is_mappable(&p->k, p->batch, p->heads_kv, p->seq_k) &&
           is_mappable(&p->v, p->batch, p->heads_kv, p->seq_k) && is_mappable(&p->d_o, p->batch, p->heads, p->seq_q) &&
           is_mappable(&p->dk, p->batch, p->heads_kv, p->seq_k) && is_mappable(&p->dv, p->batch, p->heads_kv, p->seq_k);
}

static int64_t larger_dim(const cuflash_problem *p) {
    return p->head_dim > p->head_dim_v ? p->head_dim : p->head_dim_v;
}

/* The first row of the smallest sufficient head dimension that fits into shared memory, or NULL; the largest that fits. */
static const cuflash_kernel_row *find_row(const cuflash_kernel_row *rows, const cuflash_problem *p,
                                          const cuflash_cuda_properties *device, int *largest) {
    int64_t dim = larger_dim(p);
    int compiled = CUFLASH_SHARED_LIMIT(10 * device->major + device->minor);
    int most = device->shared_bytes < compiled ? device->shared_bytes : compiled;
    for (; rows->dim; rows++) {
        if (rows->smem_bytes > most) continue;
        if (p->seq_k > (p->causal ? rows->keys_causal : rows->keys)) continue;
        if (rows->dim >= dim) return rows;
        if (rows->dim > *largest) *largest = rows->dim;
    }
    return NULL;
}

static cuflash_status unsupported(const cuflash_problem *p, const cuflash_cuda_properties *device, int largest) {
    bool q = p->head_dim >= p->head_dim_v;
    return cuflash_fail(CUFLASH_UNSUPPORTED_HEAD_DIM,
                        "attention: argument '%s': expected a head dimension of 1 to %d on this device (sm_%d%d), got %lld",
                        q ? "q" : "v", largest, device->major, device->minor, (long long)(q ? p->head_dim : p->head_dim_v));
}

/* The first family that has a row for the problem, and the row. */
static cuflash_status choose(const cuflash_problem *p, const cuflash_cuda_properties *device, cuflash_pass pass,
                             const cuflash_cuda_family **family, cuflash_kernel_row *row) {
    pthread_once(&once, read_environment);
    int largest = 0;
    for (*family = families; *family < families + FAMILIES; ++*family) {
        const cuflash_kernel_row *rows = pass == CUFLASH_FORWARD ? (*family)->forward : (*family)->backward;
        const cuflash_kernel_row *found = rows && takes(*family, p, device) ? find_row(rows, p, device, &largest) : NULL;
        if (found) return *row = *found, CUFLASH_SUCCESS;
    }
    if (largest) return unsupported(p, device, largest);
    if (forced)
        return cuflash_fail(CUFLASH_INVALID_ARGUMENT,
                            "attention: the environment variable CUFLASH_CUDA_FAMILY is '%s', which has no kernel for a %s in "
                            "%s on sm_%d%d",
                            forced, pass == CUFLASH_FORWARD ? "forward" : "backward", cuflash_dtype_name(p->dtype),
                            device->major, device->minor);
    return cuflash_fail(CUFLASH_CUDA_ERROR, "attention: there is no kernel for %s on %s (sm_%d%d; sm_70 is the oldest)",
                        cuflash_dtype_name(p->dtype), device->name, device->major, device->minor);
}

/* The family itself, or the first of the others that computes statistics; forced or not, as results are the same. */
static cuflash_status choose_statistics(const cuflash_problem *p, const cuflash_cuda_properties *device,
                                        const cuflash_cuda_family *own, const cuflash_cuda_family **family,
                                        cuflash_kernel_row *row) {
    int largest = 0;
    for (*family = own->statistics ? own : families; *family < families + FAMILIES; ++*family) {
        const cuflash_kernel_row *rows = (*family)->statistics;
        const cuflash_kernel_row *found = rows && is_for(*family, p, device) ? find_row(rows, p, device, &largest) : NULL;
        if (found) return *row = *found, CUFLASH_SUCCESS;
    }
    return unsupported(p, device, largest);
}

/* ---- Plan --------------------------------------------------------------------------------------- */

static int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static cuflash_status check_sizes(const cuflash_problem *p) {
    const struct {
        const char *what;
        int64_t value;
    } sizes[] = {{"'q': batch", p->batch}, {"'q': heads", p->heads}, {"'q': queries", p->seq_q}, {"'k': keys", p->seq_k}};
    enum { LIMIT = INT32_MAX - 1024 }; /* kernels count them in 32 bits */
    for (int i = 0; i < 4; i++)
        if (sizes[i].value > LIMIT)
            return cuflash_fail(CUFLASH_INVALID_DIMENSION,
                                "attention: argument %s: expected at most %d on a CUDA device, got %lld", sizes[i].what, LIMIT,
                                (long long)sizes[i].value);
    return CUFLASH_SUCCESS;
}

/* The parts of a backward's workspace, each 256-byte aligned. */
typedef struct {
    size_t row_max, row_log, row_offset, row_delta, dq_sum, dk_parts, dv_parts, ticket, turn, bytes;
} layout;

/* Do a backward's blocks wait for each other where they add to dq? */
static bool takes_turns(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    return p->dq.data && (p->deterministic || plan->family->maps);
}

static layout lay_out(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    size_t rows = (size_t)(p->batch * p->heads * plan->rows), at = 0;
    size_t keys = (size_t)((plan->walks - plan->whole) * plan->parts * plan->row.block_n);
    layout l;
#define PART(name, size) l.name = at, at += ((size) + 255) / 256 * 256
    PART(row_max, rows * sizeof(float));
    PART(row_log, rows * sizeof(float));
    PART(row_offset, rows * sizeof(float));
    PART(row_delta, rows * sizeof(float));
    PART(dq_sum, rows * (size_t)plan->row.dim * sizeof(float));
    PART(dk_parts, keys * (size_t)plan->row.dim * sizeof(float));
    PART(dv_parts, keys * (size_t)plan->row.dim * sizeof(float));
    PART(ticket, 2 * sizeof(int32_t));
    PART(turn, takes_turns(plan, p) ? rows / (size_t)plan->row.block_m * sizeof(int32_t) : 0);
#undef PART
    l.bytes = at;
    return l;
}

/* A block walks the queries of all heads of a group, and writes dk and dv of its keys. But heads are dealt out to more blocks
 * where that leaves too few for all multiprocessors to end at about the same time, and where a walk would be long enough that
 * partial sums cost nothing: the fewer heads are read at the same time, the more of them stays in the L2 cache. */
static int64_t parts_by_heads(int64_t walks, int64_t group, int64_t steps, bool causal, int64_t slots) {
    enum { LONG = 512 };                                    /* steps of a walk */
    int64_t waves = causal ? 5 : 3;                         /* measured: docs/kernels/mma.md */
    int64_t each = divide_up(walks * group, waves * slots); /* heads to a block */
    if (each * steps > LONG) each = divide_up(LONG, steps);
    return divide_up(group, each ? each : 1);
}

/* The parts of `walks` walks, the longest of so many steps, in which all of them take the least time. Causal walks are of any
 * length up to that, the longest first. Fewer blocks on a multiprocessor are faster each: time is in units of 1 / (each + 1) of
 * a step with `each` blocks. */
static int64_t parts_by_time(int64_t walks, int64_t steps, bool causal, int64_t multiprocessors, int64_t each) {
    enum { MOST = 16, START = 5, SUM = 3 }; /* steps in whose time a block starts and ends, and a sum over parts is made */
    int64_t best = 1, least = INT64_MAX, slots = multiprocessors * each;
    for (int64_t parts = 1; parts <= MOST && parts <= steps; parts++) {
        int64_t blocks = walks * parts, full = blocks / slots * (each + 1), left = divide_up(blocks % slots, multiprocessors);
        int64_t waves = left ? full + left + 1 : full, work = waves * divide_up(steps, parts);
        if (causal) {
            int64_t longest = (full ? (each + 3) / 2 : waves) * divide_up(steps, parts); /* it is left alone in the end */
            int64_t average = walks * steps * (each + 1) / (2 * slots);
            work = longest > average ? longest : average;
        }
        int64_t time = work + waves * START + (parts > 1 ? (each + 1) * SUM : 0);
        if (time < least) best = parts, least = time;
    }
    return best;
}

/* Which walks are dealt out to how many blocks. Of equal walks it is those that are left for the last wave of blocks. */
static void deal_out(cuflash_cuda_plan *plan, const cuflash_problem *p) {
    const cuflash_kernel_row *row = &plan->row;
    int64_t multiprocessors = cuflash_cuda_get_properties(p->device)->multiprocessors / row->cluster;
    int64_t each = row->blocks ? row->blocks : 1;
    int64_t slots = multiprocessors * each, steps = plan->rows / row->block_m, group = p->heads / p->heads_kv;
    plan->walks = divide_up(p->seq_k, row->block_n) * p->heads_kv * p->batch;
    int64_t by_heads = parts_by_heads(plan->walks, group, p->causal ? divide_up(steps, 2) : steps, p->causal, slots);
    int64_t blocks = plan->walks * by_heads, last = p->causal ? blocks : blocks % slots;
    bool enough = by_heads > 1 && blocks >= slots;
    plan->parts = by_heads;
    if (!enough) plan->parts *= parts_by_time(last, steps * group / by_heads, p->causal, multiprocessors, each);
    plan->whole = plan->parts == 1 ? plan->walks : by_heads > 1 ? 0 : plan->walks - last;
    plan->tiles = plan->whole + (plan->walks - plan->whole) * plan->parts;
}

/* Of how many blocks, or clusters of them, there is room at the same time, as far as the table tells. */
static int64_t slots_of(const cuflash_cuda_plan *plan, const cuflash_cuda_properties *device) {
    const cuflash_kernel_row *row = &plan->row;
    return (int64_t)(device->multiprocessors / row->cluster) * (row->blocks ? row->blocks : 1);
}

/* Blocks of families that take tensors by maps stay, and go from tile to tile. */
static int64_t blocks_for(const cuflash_cuda_plan *plan, const cuflash_cuda_properties *device) {
    int64_t most = slots_of(plan, device);
    return (plan->family->maps && plan->tiles > most ? most : plan->tiles) * plan->row.cluster;
}

/* Blocks that go from tile to tile count them in 32 bits. */
static cuflash_status check_tiles(const cuflash_cuda_plan *plan, const char *what) {
    enum { LIMIT = INT32_MAX - 1024 };
    if (!plan->family->maps || plan->tiles <= LIMIT) return CUFLASH_SUCCESS;
    return cuflash_fail(CUFLASH_INVALID_DIMENSION, "attention: the problem has %lld tiles of %s, and a kernel takes at most %d",
                        (long long)plan->tiles, what, LIMIT);
}

/* With so many heads of a group in a tile. */
static int64_t tiles_of_queries(const cuflash_cuda_plan *plan, const cuflash_problem *p, int64_t packed) {
    return divide_up(p->seq_q * packed, plan->row.block_m) * (p->heads / packed) * p->batch;
}

/* How many heads of a group a forward's tile holds, which are its neighbouring rows: all of them where that takes fewer rounds
 * of all blocks, else one. */
static int32_t heads_packed(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    enum { ROWS = 64 }; /* in a box of the map of q */
    int64_t group = p->heads / p->heads_kv, slots = slots_of(plan, cuflash_cuda_get_properties(p->device));
    if (!plan->family->maps || ROWS % group || p->seq_q > INT32_MAX / ROWS) return 1;
    int64_t rounds = divide_up(tiles_of_queries(plan, p, 1), slots);
    return divide_up(tiles_of_queries(plan, p, group), slots) < rounds ? (int32_t)group : 1;
}

/* Do the blocks of a forward draw their tiles of queries? Causal ones take longer or shorter. */
static bool draws(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    return plan->family->maps && p->causal && plan->blocks < plan->tiles;
}

cuflash_status cuflash_cuda_plan_make(cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass,
                                      size_t *workspace_bytes) {
    const cuflash_cuda_properties *device = cuflash_cuda_get_properties(p->device);
    memset(plan, 0, sizeof *plan);
    *workspace_bytes = 0;
    CUFLASH_TRY(check_sizes(p));
    CUFLASH_TRY(choose(p, device, pass, &plan->family, &plan->row));
    if (pass == CUFLASH_FORWARD) {
        plan->packed = heads_packed(plan, p);
        plan->tiles = tiles_of_queries(plan, p, plan->packed);
        CUFLASH_TRY(check_tiles(plan, "queries"));
        plan->blocks = blocks_for(plan, device);
        if (draws(plan, p)) *workspace_bytes = sizeof(int32_t);
        return CUFLASH_SUCCESS;
    }
    CUFLASH_TRY(choose_statistics(p, device, plan->family, &plan->stats_family, &plan->stats));
    plan->stats_blocks = divide_up(p->seq_q, plan->stats.block_m) * p->heads * p->batch;
    plan->rows = divide_up(p->seq_q, plan->row.block_m) * plan->row.block_m;
    deal_out(plan, p);
    CUFLASH_TRY(check_tiles(plan, "keys"));
    plan->blocks = blocks_for(plan, device);
    *workspace_bytes = lay_out(plan, p).bytes;
    return CUFLASH_SUCCESS;
}

/* Do a backward's blocks make dq themselves? One warp of each does, beside those that multiply: the more keys there are to a
 * query, the more time it has. It makes no zeros for queries that see no key. Measured: docs/kernels/hopper-backward.md. */
static bool finishes(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    return p->dq.data && plan->family->maps && CUFLASH_HOPPER_FINISHES(plan->row.dim) &&
           is_mappable(&p->dq, p->batch, p->heads, p->seq_q) && !(p->causal && p->seq_q > p->seq_k) &&
           (p->causal ? p->seq_k / 2 : p->seq_k) >= 4 * plan->row.dim;
}

/* As many causal units as one may go through at the same time, 16 or fewer: so that what they read, and their sums of dq, stays
 * in the L2 cache. That saves energy, not clocks, and so time where a GPU is slowed down by the power it draws. */
static int32_t causal_units_together(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    enum { CACHED = 40 << 20 }; /* of the 50 MB of an H200 */
    int64_t each = plan->rows * plan->row.dim * 8;
    int32_t units = CUFLASH_UNITS_TOGETHER;
    while (p->heads == p->heads_kv && units > 2 && units * each > CACHED) units /= 2;
    return units;
}

/* Blocks that take turns at dq wait for those of their unit that began before them, so these should begin a step or two
 * earlier: the shorter walks are, the more units must be gone through at the same time for that. Causal walks are of all
 * lengths, and begin apart already where they take no turns. Measured: docs/kernels/hopper-backward.md. */
static int32_t units_together(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    if (p->causal) return p->deterministic ? 4096 / plan->row.dim : causal_units_together(plan, p);
    if (!takes_turns(plan, p)) return 1;
    int64_t begin = cuflash_cuda_get_properties(p->device)->multiprocessors / plan->row.cluster; /* at the same time */
    int64_t steps = plan->rows / plan->row.block_m, units = begin * (p->deterministic ? 2 : 1) / steps;
    return units > 1 ? (int32_t)units : 1;
}

static const char *dtype_suffix(cuflash_dtype dtype) {
    return dtype == CUFLASH_FLOAT32 ? "f32" : dtype == CUFLASH_FLOAT16 ? "f16" : "bf16";
}

enum { ENTRY_TEXT = 96 };

static const char *entry_name(char text[ENTRY_TEXT], const cuflash_cuda_family *family, const char *kind, cuflash_dtype dtype,
                              const cuflash_kernel_row *row) {
    snprintf(text, ENTRY_TEXT, "cuflash_%s_%s_%s_d%d_%dx%d%s", family->name, kind, dtype_suffix(dtype), row->dim, row->block_m,
             row->block_n, row->late ? "_late" : "");
    return text;
}

void cuflash_cuda_plan_describe(const cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass, char *text,
                                size_t size) {
    const cuflash_cuda_properties *device = cuflash_cuda_get_properties(p->device);
    const cuflash_kernel_row *row = &plan->row;
    char entry[ENTRY_TEXT], clusters[32] = "", tiles[64] = "", parts[96] = "", heads[32] = "";
    int64_t dealt_out = plan->walks - plan->whole;
    int packed = pass == CUFLASH_FORWARD ? plan->packed : 1;
    if (packed > 1) snprintf(heads, sizeof heads, " of %d heads", packed);
    if (row->cluster > 1) snprintf(clusters, sizeof clusters, ", in clusters of %d", row->cluster);
    if (plan->blocks / row->cluster < plan->tiles)
        snprintf(tiles, sizeof tiles, ", for %lld tiles of %s",
                 (long long)(pass == CUFLASH_FORWARD ? plan->tiles : plan->walks),
                 pass == CUFLASH_FORWARD ? "queries" : "keys");
    if (dealt_out > 0 && plan->whole == 0)
        snprintf(parts, sizeof parts, ", %lld to a tile of keys", (long long)plan->parts);
    else if (dealt_out == 1)
        snprintf(parts, sizeof parts, ", %lld to the last tile of keys", (long long)plan->parts);
    else if (dealt_out > 1)
        snprintf(parts, sizeof parts, ", %lld to each of the last %lld tiles of keys", (long long)plan->parts,
                 (long long)dealt_out);
    snprintf(text, size,
             "device: cuda:%d, %s (sm_%d%d, %d multiprocessors)\n"
             "kernel: %s (%s)\n"
             "tile: %d queries%s x %d keys, head dim %d\n"
             "stages: %d\n"
             "threads: %d\n"
             "shared memory: %d bytes\n"
             "grid: %lld blocks%s%s%s%s\n",
             p->device, device->name, device->major, device->minor, device->multiprocessors,
             entry_name(entry, plan->family, pass == CUFLASH_FORWARD ? "forward" : "backward", p->dtype, row),
             plan->family->what, row->block_m / packed, heads, row->block_n, row->dim, row->stages, row->threads,
             row->smem_bytes, (long long)plan->blocks, clusters, tiles, parts,
             pass == CUFLASH_FORWARD ? ""
             : p->deterministic      ? ", which add to dq in a fixed order"
                                     : ", which add to dq in any order");
}

/* ---- Run ---------------------------------------------------------------------------------------- */

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

static cuflash_attention_args make_args(const cuflash_problem *p) {
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
        .seq_q = (int32_t)p->seq_q,
        .seq_k = (int32_t)p->seq_k,
        .head_dim = (int32_t)p->head_dim,
        .head_dim_v = (int32_t)p->head_dim_v,
        .causal = p->causal,
        .negative = p->scale < 0,
        .lse_half = p->lse.dtype == CUFLASH_FLOAT16,
        .vector = is_vector(p),
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
    int64_t each = together ? together : 1, batch = c->p->batch;
    uint64_t sizes[] = {(uint64_t)dim, (uint64_t)each, (uint64_t)seq, (uint64_t)(heads / each), (uint64_t)batch};
    /* A dimension of one element may have any stride, and maps take multiples of 16 bytes. */
    uint64_t strides[] = {each > 1 ? (uint64_t)x->head * 2 : 16, seq > 1 ? (uint64_t)x->seq * 2 : 16,
                          heads > each ? (uint64_t)(x->head * each) * 2 : 16, batch > 1 ? (uint64_t)x->batch * 2 : 16};
    uint32_t box[] = {64, (uint32_t)each, (uint32_t)(rows / each), 1, 1}, steps[] = {1, 1, 1, 1, 1};
    unsigned rank = 5;
    if (!together) { /* one dimension less */
        rank = 4;
        memmove(sizes + 1, sizes + 2, 3 * sizeof *sizes), memmove(strides, strides + 1, 3 * sizeof *strides);
        memmove(box + 1, box + 2, 3 * sizeof *box);
    }
    int type = c->p->dtype == CUFLASH_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUresult result = cuflash_cuda_get_driver(NULL)->cuTensorMapEncodeTiled(map, type, rank, x->data, sizes, strides, box,
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
    if (c->args.finishes)
        CUFLASH_TRY(make_map(c, &c->maps.dq, &p->dq, p->heads, p->seq_q, p->head_dim, CUFLASH_HOPPER_DQ_ROWS));
    if (p->dk.data) CUFLASH_TRY(make_map(c, &c->maps.dk, &p->dk, p->heads_kv, p->seq_k, p->head_dim, CUFLASH_HOPPER_DK_ROWS));
    if (p->dv.data) CUFLASH_TRY(make_map(c, &c->maps.dv, &p->dv, p->heads_kv, p->seq_k, p->head_dim_v, CUFLASH_HOPPER_DK_ROWS));
    int keys = row->block_n / row->cluster;
    CUFLASH_TRY(make_map(c, &c->maps.k, &p->k, p->heads_kv, p->seq_k, p->head_dim, keys));
    return make_map(c, &c->maps.v, &p->v, p->heads_kv, p->seq_k, p->head_dim_v, keys);
}

/* Of how many heads, or groups of packed ones, causal tiles are drawn before those of others, from the longest to the shortest:
 * of so many that all blocks draw twice, three times where tiles are large. That is a long one and a short one, and what is
 * read at a time stays in the L2 cache. All times it is of as many heads: the last ones should not be few. */
static int32_t heads_together(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    if (!draws(plan, p)) return 1;
    int64_t heads = p->batch * p->heads / plan->packed, rounds = plan->row.block_m > 128 ? 3 : 2;
    int64_t most = rounds * plan->blocks / (plan->tiles / heads);
    return most < 1 ? 1 : (int32_t)divide_up(heads, divide_up(heads, most));
}

static cuflash_status run_forward(call *c, char *workspace) {
    const cuflash_cuda_plan *plan = c->plan;
    const cuflash_kernel_row *row = &plan->row;
    char entry[ENTRY_TEXT];
    bool drawn = draws(plan, c->p);
    c->args.together = heads_together(plan, c->p);
    while (1 << c->args.packed < plan->packed) c->args.packed++;
    if (drawn) c->args.ticket = (int32_t *)workspace;
    if (plan->family->maps) CUFLASH_TRY(make_maps(c, 64, plan->packed));
    if (drawn) CUFLASH_TRY(launch(c, &cuflash_fatbin_rows, "cuflash_rows_ticket", 1, 1, 0));
    entry_name(entry, plan->family, "forward", c->p->dtype, row);
    return launch_kernel(c, plan->family->forward_fatbin, entry, plan->blocks, row->threads, row->smem_bytes, drawn);
}

/* The launches of a backward are told in kernels/attention.h. */
static cuflash_status run_backward(call *c, char *workspace) {
    const cuflash_cuda_plan *plan = c->plan;
    const cuflash_problem *p = c->p;
    const cuflash_cuda_family *family = plan->family;
    const cuflash_kernel_row *row = &plan->row;
    char entry[ENTRY_TEXT];
    layout l = lay_out(plan, p);
    c->args.rows = (int32_t)plan->rows;
    c->args.dim_padded = row->dim;
    c->args.parts = (int32_t)plan->parts;
    c->args.whole = (int32_t)plan->whole;
    c->args.block_m = row->block_m;
    c->args.block_n = row->block_n;
    c->args.walks = (int32_t)plan->tiles;
    c->args.ticket = (int32_t *)(workspace + l.ticket);
    c->args.row_max = (float *)(workspace + l.row_max);
    c->args.row_log = (float *)(workspace + l.row_log);
    c->args.row_offset = (float *)(workspace + l.row_offset);
    c->args.row_delta = (float *)(workspace + l.row_delta);
    if (p->dq.data) c->args.dq_sum = (float *)(workspace + l.dq_sum);
    c->args.dk_parts = (float *)(workspace + l.dk_parts);
    c->args.dv_parts = (float *)(workspace + l.dv_parts);
    if (takes_turns(plan, p)) c->args.turn = (int32_t *)(workspace + l.turn);
    c->args.ordered = p->deterministic;
    c->args.together = units_together(plan, p);
    c->args.stored = family->maps;
    c->args.finishes = finishes(plan, p);
    if (family->maps) CUFLASH_TRY(make_maps(c, row->block_m, 0));

    snprintf(entry, sizeof entry, "cuflash_rows_begin_%s", dtype_suffix(p->dtype));
    int64_t groups = p->batch * p->heads * divide_up(plan->rows, CUFLASH_ROWS_PER_BLOCK);
    CUFLASH_TRY(launch(c, &cuflash_fatbin_rows, entry, groups, CUFLASH_ROWS_THREADS, 0));

    if (p->dtype == CUFLASH_FLOAT32 || !p->lse.data || p->lse.dtype == CUFLASH_FLOAT16) {
        const cuflash_kernel_row *stats = &plan->stats;
        entry_name(entry, plan->stats_family, "statistics", p->dtype, stats);
        CUFLASH_TRY(
            launch(c, plan->stats_family->forward_fatbin, entry, plan->stats_blocks, stats->threads, stats->smem_bytes));
    }

    entry_name(entry, family, "backward", p->dtype, row);
    bool early = family->maps; /* such kernels wait for the one before where they need it */
    CUFLASH_TRY(launch_kernel(c, family->backward_fatbin, entry, plan->blocks, row->threads, row->smem_bytes, early));

    if (plan->whole < plan->walks && (p->dk.data || p->dv.data)) {
        snprintf(entry, sizeof entry, "cuflash_rows_sum_%s", dtype_suffix(p->dtype));
        int64_t keys = (plan->walks - plan->whole) * row->block_n;
        CUFLASH_TRY(
            launch(c, &cuflash_fatbin_rows, entry, divide_up(keys, CUFLASH_ROWS_THREADS / 32), CUFLASH_ROWS_THREADS, 0));
    }
    if (!p->dq.data || (c->args.finishes && !p->causal)) return CUFLASH_SUCCESS;
    entry_name(entry, family, "finish", p->dtype, row);
    int64_t tiles = p->batch * p->heads * (plan->rows / row->block_m);
    if (c->args.finishes) tiles = divide_up(tiles, CUFLASH_HOPPER_FINISHED_TILES);
    int threads = family->finish_threads ? family->finish_threads : row->threads;
    return launch(c, family->backward_fatbin, entry, tiles, threads, 0);
}

cuflash_status cuflash_cuda_run(const cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass, void *workspace) {
    const char *fn = pass == CUFLASH_FORWARD ? "attention_forward" : "attention_backward";
    call c = {.fn = fn, .plan = plan, .p = p, .args = make_args(p)};
    cuflash_cuda_scope scope;
    CUFLASH_TRY(cuflash_cuda_enter(fn, p->device, &scope));
    cuflash_status status = pass == CUFLASH_FORWARD ? run_forward(&c, workspace) : run_backward(&c, workspace);
    cuflash_cuda_leave(&scope);
    return status;
}
