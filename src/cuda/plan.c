/* Which kernels serve a problem, and how its tiles are dealt out to blocks. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/family.h"
#include "kernels/fma/table.h"
#include "kernels/hopper/table.h"
#include "kernels/mma/table.h"
#include "kernels/tf32/table.h"

/* ---- Families ----------------------------------------------------------------------------------- */

#define HOPPER_ROW(...) {__VA_ARGS__},
#define ROW(dim, block_m, block_n, stages, threads, blocks, smem_bytes)                                                        \
    {dim, block_m, block_n, stages, threads, blocks, smem_bytes, CUFLASH_ANY_KEYS, CUFLASH_ANY_KEYS, 1},
static const cuflash_kernel_row hopper_forward[] = {CUFLASH_HOPPER_FORWARD(HOPPER_ROW){0}};
static const cuflash_kernel_row hopper_backward[] = {CUFLASH_HOPPER_BACKWARD(HOPPER_ROW){0}};
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
#undef HOPPER_ROW

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
static cuflash_status choose(const cuflash_problem *p, cuflash_pass pass, const cuflash_cuda_family **family,
                             cuflash_kernel_row *row) {
    const cuflash_cuda_properties *device = cuflash_cuda_get_properties(p->device);
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
static cuflash_status choose_statistics(const cuflash_problem *p, const cuflash_cuda_family *own,
                                        const cuflash_cuda_family **family, cuflash_kernel_row *row) {
    const cuflash_cuda_properties *device = cuflash_cuda_get_properties(p->device);
    int largest = 0;
    for (*family = own->statistics ? own : families; *family < families + FAMILIES; ++*family) {
        const cuflash_kernel_row *rows = (*family)->statistics;
        const cuflash_kernel_row *found = rows && is_for(*family, p, device) ? find_row(rows, p, device, &largest) : NULL;
        if (found) return *row = *found, CUFLASH_SUCCESS;
    }
    return unsupported(p, device, largest);
}

/* ---- Plan --------------------------------------------------------------------------------------- */

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

/* Lays out a backward's workspace; says how many bytes it has. */
static size_t lay_out(cuflash_cuda_plan *plan, const cuflash_problem *p) {
    size_t rows = (size_t)(p->batch * p->heads * plan->rows), at = 0;
    size_t keys = (size_t)((plan->walks - plan->whole) * plan->parts * plan->row.block_n);
#define PART(name, size) plan->at.name = at, at += ((size) + 255) / 256 * 256
    PART(row_max, rows * sizeof(float));
    PART(row_log, rows * sizeof(float));
    PART(row_offset, rows * sizeof(float));
    PART(row_delta, rows * sizeof(float));
    PART(dq_sum, rows * (size_t)plan->row.dim * sizeof(float));
    PART(dk_parts, keys * (size_t)plan->row.dim * sizeof(float));
    PART(dv_parts, keys * (size_t)plan->row.dim * sizeof(float));
    PART(ticket, 2 * sizeof(int32_t));
    PART(turn, plan->turns ? rows / (size_t)plan->row.block_m * sizeof(int32_t) : 0);
#undef PART
    return at;
}

/* On a multiprocessor. */
static int64_t blocks_each(const cuflash_kernel_row *row) {
    return row->blocks ? row->blocks : 1;
}

/* Multiprocessors; or how many times as many as a cluster of blocks takes. */
static int64_t places_of(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    return cuflash_cuda_get_properties(p->device)->multiprocessors / plan->row.cluster;
}

/* Of how many blocks, or clusters of them, there is room at the same time, as far as the table tells. */
static int64_t slots_of(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    return places_of(plan, p) * blocks_each(&plan->row);
}

/* A block walks the queries of all heads of a group, and writes dk and dv of its keys. But heads are dealt out to more blocks
 * where that leaves too few for all multiprocessors to end at about the same time, and where a walk would be long enough that
 * partial sums cost nothing: the fewer heads are read at the same time, the more of them stays in the L2 cache. Causal walks that
 * take turns are of one head then: they can begin in the order in which none waits. */
static int64_t parts_by_heads(const cuflash_cuda_plan *plan, const cuflash_problem *p, int64_t slots) {
    enum { LONG = 512, ALONE = 64, SHORT = 2048 }; /* steps of a walk; of one of a head alone; queries of one */
    int64_t group = p->heads / p->heads_kv, all = plan->rows / plan->row.block_m;
    int64_t steps = p->causal ? cuflash_divide_up(all, 2) : all;                   /* of a head */
    int64_t heads = plan->walks * group, waves = p->causal ? 5 : 3;                /* measured: docs/kernels/mma.md */
    int64_t few = SHORT / plan->row.block_m;                                       /* steps */
    int64_t each = heads / (waves * slots), most = cuflash_divide_up(LONG, steps); /* heads to a block */
    if (each > most) each = most;
    if (p->causal)
        while (each > 1 && group % each) each--;
    if (!p->causal || each * steps < few) each = cuflash_divide_up(heads, waves * slots);
    if (each > most) each = most;
    if (each < 1) each = 1;
    bool alone = steps >= ALONE || (each < group && steps >= few);
    return p->causal && p->deterministic && alone ? group : cuflash_divide_up(group, each);
}

/* The parts of `walks` walks, the longest of so many steps, in which all of them take the least time. Causal walks are of any
 * length up to that, the longest first. Fewer blocks on a multiprocessor are faster each: time is in units of 1 / (each + 1) of
 * a step with `each` blocks. */
static int64_t parts_by_time(int64_t walks, int64_t steps, bool causal, int64_t multiprocessors, int64_t each) {
    enum { MOST = 16, START = 5, SUM = 3 }; /* steps in whose time a block starts and ends, and a sum over parts is made */
    int64_t best = 1, least = INT64_MAX, slots = multiprocessors * each;
    for (int64_t parts = 1; parts <= MOST && parts <= steps; parts++) {
        int64_t blocks = walks * parts, full = blocks / slots * (each + 1),
                left = cuflash_divide_up(blocks % slots, multiprocessors);
        int64_t waves = left ? full + left + 1 : full, work = waves * cuflash_divide_up(steps, parts);
        if (causal) {
            int64_t longest =
                (full ? (each + 3) / 2 : waves) * cuflash_divide_up(steps, parts); /* it is left alone in the end */
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
    int64_t places = places_of(plan, p), each = blocks_each(row), slots = places * each, steps = plan->rows / row->block_m,
            group = p->heads / p->heads_kv;
    plan->walks = cuflash_divide_up(p->seq_k, row->block_n) * p->heads_kv * p->batch;
    int64_t by_heads = parts_by_heads(plan, p, slots);
    int64_t blocks = plan->walks * by_heads, last = p->causal ? blocks : blocks % slots;
    bool enough = by_heads > 1 && blocks >= slots;
    plan->parts = by_heads;
    if (!enough) plan->parts *= parts_by_time(last, steps * group / by_heads, p->causal, places, each);
    plan->whole = plan->parts == 1 ? plan->walks : by_heads > 1 ? 0 : plan->walks - last;
    plan->tiles = plan->whole + (plan->walks - plan->whole) * plan->parts;
}

/* Blocks of families that take tensors by maps stay, and go from tile to tile. */
static int64_t blocks_for(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    int64_t most = slots_of(plan, p);
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
    return cuflash_divide_up(p->seq_q * packed, plan->row.block_m) * (p->heads / packed) * p->batch;
}

/* How many heads of a group a forward's tile holds, which are its neighbouring rows: all of them where that takes fewer rounds
 * of all blocks, else one. */
static int32_t heads_packed(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    enum { ROWS = 64 }; /* in a box of the map of q */
    int64_t group = p->heads / p->heads_kv, slots = slots_of(plan, p);
    if (!plan->family->maps || ROWS % group || p->seq_q > INT32_MAX / ROWS) return 1;
    int64_t rounds = cuflash_divide_up(tiles_of_queries(plan, p, 1), slots);
    return cuflash_divide_up(tiles_of_queries(plan, p, group), slots) < rounds ? (int32_t)group : 1;
}

/* Do the blocks of a forward draw their tiles of queries? Causal ones of a head take longer or shorter. */
static bool draws(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    return plan->family->maps && p->causal && plan->blocks < plan->tiles && plan->tiles > p->batch * p->heads / plan->packed;
}

/* Of how many heads, or groups of packed ones, tiles are drawn before those of others, from the longest to the shortest: of so
 * many that all blocks draw twice, three times where tiles are large. That is a long one and a short one, and what is read at a
 * time stays in the L2 cache. All times it is of as many heads: the last ones should not be few. */
static int32_t heads_together(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    int64_t heads = p->batch * p->heads / plan->packed, rounds = plan->row.block_m > 128 ? 3 : 2;
    int64_t most = rounds * plan->blocks / (plan->tiles / heads);
    return most < 1 ? 1 : (int32_t)cuflash_divide_up(heads, cuflash_divide_up(heads, most));
}

/* Do a backward's blocks make dq themselves? One warp of each does, beside those that multiply: the more keys there are to a
 * query, the more time it has. It makes no zeros for queries that see no key. Measured: docs/kernels/hopper-backward.md. */
static bool finishes(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    return p->dq.data && plan->family->maps && CUFLASH_HOPPER_FINISHES(plan->row.dim) &&
           is_mappable(&p->dq, p->batch, p->heads, p->seq_q) && !(p->causal && p->seq_q > p->seq_k) &&
           (p->causal ? p->seq_k / 2 : p->seq_k) >= 4 * plan->row.dim;
}

/* Of how many heads the walks of a unit are; 0: of a piece of one. */
static int64_t unit_heads(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    int64_t group = p->heads / p->heads_kv;
    return group % plan->parts ? 0 : group / plan->parts;
}

/* As many causal units as one may go through at the same time, 16 or fewer: so that what they read, and their sums of dq, stays
 * in the L2 cache. That saves energy, not clocks, and so time where a GPU is slowed down by the power it draws. Where they take no
 * turns, it is two at least (D 256, 32768 tokens: 492, with one 473). */
static int32_t cached_units(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    enum { CACHED = 40 << 20 }; /* of the 50 MB of an H200 */
    int64_t each = plan->rows * plan->row.dim * 8;
    int32_t units = CUFLASH_UNITS_TOGETHER;
    int32_t fewest = p->deterministic ? 1 : 2;
    bool alone = p->deterministic || p->heads == p->heads_kv;
    while (plan->family->maps && alone && units > fewest && units * each > CACHED) units /= 2;
    return units;
}

/* How many units of a deterministic causal backward are gone through at the same time where all but the last of them begin with
 * their last keys, so that walks wait for nobody; 0: where they should not. The walks of a group of heads are far apart, and read
 * again from memory what they share: where tiles have few queries that is too much. */
static int64_t units_descending(const cuflash_cuda_plan *plan, const cuflash_problem *p) {
    enum { GROUPED = 4, FEW_QUERIES = 64 };
    int64_t units = p->batch * p->heads_kv * plan->parts, heads = unit_heads(plan, p);
    bool grouped = heads > 1;
    if (heads == 0 || units < 2 || (grouped && (plan->parts > 1 || plan->row.block_m <= FEW_QUERIES))) return 0;
    int64_t rounds = cuflash_divide_up(units, grouped ? GROUPED : cached_units(plan, p));
    return cuflash_divide_up(units, rounds < 2 ? 2 : rounds);
}

/* Blocks that take turns at dq wait for those of their unit that began before them, so these should begin a step or two
 * earlier: the shorter walks are, the more units must be gone through at the same time for that. Causal walks are of all
 * lengths, and begin apart already where they take no turns. Measured: docs/kernels/hopper-backward.md. */
static void choose_order(cuflash_cuda_plan *plan, const cuflash_problem *p) {
    plan->together = 1;
    if (p->causal && p->deterministic) {
        int64_t units = p->batch * p->heads_kv * plan->parts, together = units_descending(plan, p);
        plan->together = together ? (int32_t)together : 4096 / plan->row.dim;
        plan->descending = together ? (int32_t)((units - 1) / together * together) : 0;
    } else if (p->causal) {
        plan->together = cached_units(plan, p);
    } else if (plan->turns) {
        int64_t begin = places_of(plan, p), steps = plan->rows / plan->row.block_m; /* walks begin, in a step */
        int64_t units = begin * (p->deterministic ? 2 : 1) / steps;
        if (units > 1) plan->together = (int32_t)units;
    }
}

static cuflash_status plan_forward(cuflash_cuda_plan *plan, const cuflash_problem *p, size_t *workspace_bytes) {
    plan->packed = heads_packed(plan, p);
    plan->tiles = tiles_of_queries(plan, p, plan->packed);
    CUFLASH_TRY(check_tiles(plan, "queries"));
    plan->blocks = blocks_for(plan, p);
    plan->draws = draws(plan, p);
    plan->together = plan->draws ? heads_together(plan, p) : 1;
    if (plan->draws) *workspace_bytes = sizeof(int32_t);
    return CUFLASH_SUCCESS;
}

static cuflash_status plan_backward(cuflash_cuda_plan *plan, const cuflash_problem *p, size_t *workspace_bytes) {
    CUFLASH_TRY(choose_statistics(p, plan->family, &plan->stats_family, &plan->stats));
    plan->packed = 1;
    plan->stats_blocks = cuflash_divide_up(p->seq_q, plan->stats.block_m) * p->heads * p->batch;
    plan->rows = cuflash_divide_up(p->seq_q, plan->row.block_m) * plan->row.block_m;
    deal_out(plan, p);
    CUFLASH_TRY(check_tiles(plan, "keys"));
    plan->blocks = blocks_for(plan, p);
    plan->turns = p->dq.data && (p->deterministic || plan->family->maps);
    plan->finishes = finishes(plan, p);
    choose_order(plan, p);
    *workspace_bytes = lay_out(plan, p);
    return CUFLASH_SUCCESS;
}

cuflash_status cuflash_cuda_plan_make(cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass,
                                      size_t *workspace_bytes) {
    memset(plan, 0, sizeof *plan);
    *workspace_bytes = 0;
    CUFLASH_TRY(check_sizes(p));
    CUFLASH_TRY(choose(p, pass, &plan->family, &plan->row));
    plan->vector = is_vector(p);
    return (pass == CUFLASH_FORWARD ? plan_forward : plan_backward)(plan, p, workspace_bytes);
}

/* ---- Description -------------------------------------------------------------------------------- */

const char *cuflash_cuda_dtype_suffix(cuflash_dtype dtype) {
    return dtype == CUFLASH_FLOAT32 ? "f32" : dtype == CUFLASH_FLOAT16 ? "f16" : "bf16";
}

const char *cuflash_cuda_entry_name(char text[CUFLASH_ENTRY_TEXT], const cuflash_cuda_family *family, const char *kind,
                                    cuflash_dtype dtype, const cuflash_kernel_row *row) {
    snprintf(text, CUFLASH_ENTRY_TEXT, "cuflash_%s_%s_%s_d%d_%dx%d", family->name, kind, cuflash_cuda_dtype_suffix(dtype),
             row->dim, row->block_m, row->block_n);
    return text;
}

void cuflash_cuda_plan_describe(const cuflash_cuda_plan *plan, const cuflash_problem *p, cuflash_pass pass, char *text,
                                size_t size) {
    const cuflash_cuda_properties *device = cuflash_cuda_get_properties(p->device);
    const cuflash_kernel_row *row = &plan->row;
    char entry[CUFLASH_ENTRY_TEXT], clusters[32] = "", tiles[64] = "", parts[96] = "", heads[32] = "";
    int64_t dealt_out = plan->walks - plan->whole;
    if (plan->packed > 1) snprintf(heads, sizeof heads, " of %d heads", plan->packed);
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
             cuflash_cuda_entry_name(entry, plan->family, pass == CUFLASH_FORWARD ? "forward" : "backward", p->dtype, row),
             plan->family->what, row->block_m / plan->packed, heads, row->block_n, row->dim, row->stages, row->threads,
             row->smem_bytes, (long long)plan->blocks, clusters, tiles, parts,
             pass == CUFLASH_FORWARD ? ""
             : plan->descending > 0  ? ", which add to dq in a fixed order, of most heads the last keys first"
             : p->deterministic      ? ", which add to dq in a fixed order"
                                     : ", which add to dq in any order");
}
