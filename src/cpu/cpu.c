#include "cpu/cpu.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef CUFLASH_BF16_VARIANTS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "interrupt.h"
#include "parallel.h"

/* ---- Instruction sets --------------------------------------------------------------------------- */

extern const cuflash_cpu_kernels cuflash_cpu_baseline, cuflash_cpu_avx2, cuflash_cpu_avx512, cuflash_cpu_avx512bf16,
    cuflash_cpu_amx;

static bool always(void) {
    return true;
}

#ifdef CUFLASH_X86_VARIANTS
static bool has_avx2(void) {
    /* All of them have F16C, which not every compiler can ask for. */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#ifdef CUFLASH_BF16_VARIANTS
static bool has_avx512bf16(void) {
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

/* The tiles' registers are the kernel's to allow, once a process. */
static bool has_amx(void) {
#if defined(CUFLASH_AMX_TILES) /* spec/amx_test.sh: functions stand in for them */
    return has_avx512bf16();
#elif defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d;
    if (!has_avx512bf16()) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false; /* AMX-BF16, AMX-TILE */
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif
#endif

/* Best first. The compiler flags of each are in CMakeLists.txt. */
static const struct {
    const cuflash_cpu_kernels *kernels;
    bool (*supported)(void);
} variants[] = {
#ifdef CUFLASH_X86_VARIANTS
#ifdef CUFLASH_BF16_VARIANTS
    {&cuflash_cpu_amx, has_amx},       {&cuflash_cpu_avx512bf16, has_avx512bf16},
#endif
    {&cuflash_cpu_avx512, has_avx512}, {&cuflash_cpu_avx2, has_avx2},
#endif
    {&cuflash_cpu_baseline, always},
};
enum { VARIANTS = sizeof variants / sizeof *variants };

static pthread_once_t choose_once = PTHREAD_ONCE_INIT;
static const cuflash_cpu_kernels *chosen; /* NULL: CUFLASH_CPU_ISA names one that cannot run; why is in refusal */
static char refusal[256];

static void choose(void) {
    const char *wanted = getenv("CUFLASH_CPU_ISA");
    char names[64] = "";
    for (int i = 0; i < VARIANTS; i++) {
        const char *name = variants[i].kernels->name;
        if (!variants[i].supported()) continue;
        if (!wanted || !*wanted || strcmp(wanted, name) == 0) {
            chosen = variants[i].kernels;
            return;
        }
        strcat(strcat(names, *names ? ", " : ""), name);
    }
    snprintf(refusal, sizeof refusal,
             "the environment variable CUFLASH_CPU_ISA: expected one that this machine runs (%s), got '%.64s'", names, wanted);
}

const char *cuflash_cpu_isa(void) {
    pthread_once(&choose_once, choose);
    return chosen ? chosen->name : "none";
}

/* ---- Plan --------------------------------------------------------------------------------------- */

/* A forward's rows of a pair are cut into parts of the keys where there are fewer blocks of them; a part has some keys at least.
 * Only the pair counts: a row's result is then the same whatever other rows the batch has. */
enum { PAIR_UNITS = 16, PART_KEYS = 1024 };

/* Of a pass, for each query and key that it sees. */
static double multiply_adds(const cuflash_problem *p, cuflash_pass pass) {
    return (double)(pass == CUFLASH_BACKWARD ? 3 * p->head_dim + 2 * p->head_dim_v : p->head_dim + p->head_dim_v);
}

/* How many of the keys from `key` on queries see, all of them together. */
static double seen_from(const cuflash_problem *p, double key) {
    double left = (double)p->seq_k - key, rows = (double)p->seq_q;
    if (!p->causal) return rows * left;
    if (rows > left) rows = left;
    return rows * left - rows * (rows - 1) / 2; /* the last query sees all that are left, the one before one less */
}

static double mean_visible_keys(const cuflash_problem *p) {
    return seen_from(p, 0) / (double)p->seq_q;
}

/* What the last so many units of a backward have of its work; more than all of it where there are not so many. */
static double share_of_last(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t units) {
    double parts = (double)units / (double)(plan->pairs * plan->splits);
    if (parts >= (double)plan->key_parts) return parts / (double)plan->key_parts;
    int64_t last = plan->key_parts - (int64_t)parts; /* this one and those behind it, and of the one before a share */
    double behind = seen_from(p, (double)cuflash_part_begin(plan, p, last));
    double before = seen_from(p, (double)cuflash_part_begin(plan, p, last - 1)) - behind;
    return (behind + (parts - floor(parts)) * before) / seen_from(p, 0);
}

/* Are there tiles enough for so many parts of a backward? */
static bool can_cut(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t parts) {
    enum { FEWEST_TILES = 4 };
    int64_t tiles = cuflash_key_blocks(p, plan->kernels->block_n);
    return cuflash_parts_shrink(plan, p) ? parts * parts <= tiles : parts * FEWEST_TILES <= tiles;
}

/* How a backward's keys are cut into parts and its row blocks dealt out to splits: so that units are done soonest by 16 threads
 * that are not equally fast, which in the end wait for about two thirds of what the last 16 units have. Parts cost sums of dq, and
 * rows that are laid out again for each; splits cost sums of dk and dv, which are filled and read. The problem alone decides, so
 * that results do not depend on the number of threads. */
static void cut_backward(cuflash_cpu_plan *plan, const cuflash_problem *p) {
    enum { THREADS = 16, MOST = 8 * THREADS }; /* MOST: units */
    bool on_pairs = plan->packed_bytes > 0;
    const double WORK[] = {0.016e-9, 0.004e-9, 0.008e-9}; /* seconds: of a multiply-add on one thread, by planes, */
    const double LAY_OUT = on_pairs ? 0.5e-9 : 1.5e-9;    /* of a number of Q's that is laid out, with dO's, */
    const double MOVE = 0.5e-9;                           /* and of a float32 that is moved */
    const double MEMORY = 0.03;                           /* as much as all tensors have is worth so much of the time */
    double seen = seen_from(p, 0), least = -1;
    double work = (double)plan->group * seen * multiply_adds(p, CUFLASH_BACKWARD) * WORK[plan->planes];
    double dq = (double)plan->rows * (double)plan->pad_d, dk_dv = 0;
    if (!cuflash_keys_at_once(plan)) dk_dv = (double)plan->pad_k * (double)(plan->pad_d + plan->pad_dv);
    double tensors = 2 * (double)(plan->rows + plan->pad_k) * (double)(plan->pad_d + plan->pad_dv);
    if (seen == 0) return;
    cuflash_cpu_plan cut = *plan;
    for (cut.key_parts = 1; cut.key_parts == 1 || (plan->pairs * cut.key_parts <= MOST && can_cut(plan, p, cut.key_parts));
         cut.key_parts++)
        for (cut.splits = 1;
             cut.splits == 1 || (plan->pairs * cut.key_parts * cut.splits <= MOST && cut.splits <= plan->row_blocks);
             cut.splits++) {
            double parts = (double)cut.key_parts, splits = (double)cut.splits;
            double extra = parts * dq * (LAY_OUT + (parts > 1 ? 2 * MOVE : 0)) + splits * dk_dv * 3 * MOVE;
            double memory = ((parts > 1 ? parts * dq : 0) + splits * dk_dv) / tensors;
            double time = (work + extra) * (1 + share_of_last(&cut, p, THREADS) * 2 / 3) * (1 + MEMORY * memory);
            if (least >= 0 && time >= least) continue;
            plan->key_parts = cut.key_parts, plan->splits = cut.splits, least = time;
        }
}

/* Keys of a part, if they are to be converted once for all row blocks of a unit: there are some, and they leave most of them in
 * the cache. */
static int64_t keys_to_convert(const cuflash_cpu_plan *plan, const cuflash_problem *p) {
    enum { MOST_KEYS = 4096 };
    if (p->dtype == CUFLASH_FLOAT32 || plan->packed_bytes > 0 || plan->row_blocks <= plan->splits) return 0;
    int64_t keys = 0;
    for (int64_t part = 0; part < plan->key_parts; part++) {
        int64_t size = cuflash_part_begin(plan, p, part + 1) - cuflash_part_begin(plan, p, part);
        if (size > keys) keys = size;
    }
    return keys <= MOST_KEYS ? keys : 0;
}

/* A thread that gets less work than this, in multiply-adds, costs more to tell than it saves, or to wake: 4 and 16 us in float32.
 * Threads that sleep begin after 30 us, in virtual machines after up to 500. */
static const double WORK_PER_THREAD = 5e5, WORK_PER_WOKEN_THREAD = 2e6;

/* Few rows of a pair take as long as 16: reading its keys. */
static const double FEWEST_ROWS = 16;

/* In multiply-adds. */
static double work_of(const cuflash_cpu_plan *plan, const cuflash_problem *p) {
    double rows = (double)plan->rows < FEWEST_ROWS ? FEWEST_ROWS : (double)plan->rows;
    return (double)plan->pairs * rows * mean_visible_keys(p) * multiply_adds(p, plan->pass);
}

/* Of so many at most, those that get at least so much of the work each, and a unit. */
static int worthwhile_threads(const cuflash_cpu_plan *plan, double work, int threads, double least) {
    if (threads > work / least) threads = (int)(work / least);
    if (threads > plan->units) threads = (int)plan->units;
    return threads > 1 ? threads : 1;
}

/* Should row blocks of a pair go through its keys together? Keys of 16 bits are converted once for all of them, and packed ones
 * that no L2 cache keeps are read once. */
static bool gain_together(const cuflash_cpu_plan *plan, const cuflash_problem *p) {
    const double KEPT_BYTES = 1.5 * 1024 * 1024;
    if (plan->pass == CUFLASH_BACKWARD || plan->key_parts > 1) return false;
    if (plan->packed_bytes == 0) return p->dtype != CUFLASH_FLOAT32;
    return 2. * (double)(plan->planes * p->seq_k * (p->head_dim + p->head_dim_v)) > KEPT_BYTES;
}

cuflash_status cuflash_cpu_plan_make(cuflash_cpu_plan *plan, const cuflash_problem *p, cuflash_pass pass, int threads,
                                     size_t *workspace_bytes) {
    pthread_once(&choose_once, choose);
    if (!chosen) return cuflash_fail(CUFLASH_INVALID_ARGUMENT, "%s", refusal);
    const cuflash_cpu_kernels *kernels = chosen;
    *plan = (cuflash_cpu_plan){.kernels = kernels, .pass = pass};
    plan->group = p->heads / p->heads_kv;
    plan->pairs = p->batch * p->heads_kv;
    plan->rows = plan->group * p->seq_q;
    plan->row_blocks = (plan->rows + kernels->block_m - 1) / kernels->block_m;
    plan->pad_d = cuflash_round_up(p->head_dim, kernels->vector);
    plan->pad_dv = cuflash_round_up(p->head_dim_v, kernels->vector);
    plan->pad_k = cuflash_round_up(p->seq_k, 16);
    /* A pair of few rows is not worth packing for. */
    enum { ENOUGH_ROWS = 32 };
    if (plan->rows >= ENOUGH_ROWS) plan->planes = kernels->planes[p->dtype];
    if (plan->planes > 0) plan->packed_bytes = kernels->packed_bytes(plan, p);
    plan->key_parts = plan->splits = 1;
    if (pass == CUFLASH_BACKWARD && plan->pairs > 0 && plan->rows > 0) {
        cut_backward(plan, p);
        plan->part_keys = keys_to_convert(plan, p);
    }
    if (pass == CUFLASH_FORWARD && plan->row_blocks < PAIR_UNITS && plan->packed_bytes == 0 && p->seq_k >= 2 * PART_KEYS) {
        int64_t parts = (PAIR_UNITS + plan->row_blocks - 1) / plan->row_blocks, most = p->seq_k / PART_KEYS;
        plan->key_parts = parts < most ? parts : most;
        plan->partial_floats = (2 + p->head_dim_v) * (plan->rows < kernels->block_m ? plan->rows : kernels->block_m);
    }
    plan->halves = pass == CUFLASH_FORWARD && plan->key_parts == 1 && plan->rows > kernels->block_m / 2 ? 2 : 1;
    plan->units = plan->pairs * plan->key_parts * (pass == CUFLASH_FORWARD ? plan->row_blocks * plan->halves : plan->splits);
    double work = work_of(plan, p);
    plan->threads = worthwhile_threads(plan, work, threads, WORK_PER_THREAD);
    plan->woken = worthwhile_threads(plan, work, plan->threads, WORK_PER_WOKEN_THREAD);
    plan->together = pass == CUFLASH_BACKWARD && plan->packed_bytes > 0 && plan->row_blocks > plan->splits ? 2 : 1;
    if (gain_together(plan, p)) /* up to so many: results do not depend on it */
        plan->together = plan->row_blocks < CUFLASH_MOST_TOGETHER ? plan->row_blocks : CUFLASH_MOST_TOGETHER;
    plan->scratch_floats = cuflash_round_up(kernels->scratch_floats(plan, p, pass), 16);
    int64_t floats = 0, partials = 0, dq_parts = 0, packed = 0, rows = 0;
    bool backward = pass == CUFLASH_BACKWARD;
    if ((backward && !cuflash_keys_at_once(plan) &&
         __builtin_mul_overflow(plan->pad_k, plan->pad_d + plan->pad_dv, &plan->partial_floats)) ||
        (backward && __builtin_mul_overflow(plan->pairs * plan->row_blocks, CUFLASH_ROW_NUMBERS * kernels->block_m, &rows)) ||
        (backward && plan->key_parts > 1 &&
         __builtin_mul_overflow(plan->row_blocks * kernels->block_m, cuflash_round_up(p->head_dim, 16), &plan->dq_floats)) ||
        __builtin_mul_overflow(plan->threads, plan->scratch_floats, &floats) ||
        __builtin_mul_overflow(backward ? plan->pairs * plan->splits : plan->units, plan->partial_floats, &partials) ||
        __builtin_add_overflow(floats, partials, &floats) ||
        __builtin_mul_overflow(plan->pairs * plan->key_parts, plan->dq_floats, &dq_parts) ||
        __builtin_add_overflow(floats, dq_parts, &floats) || __builtin_add_overflow(floats, rows, &floats) ||
        __builtin_mul_overflow(plan->pairs, plan->packed_bytes / 4, &packed) ||
        __builtin_add_overflow(floats, packed, &floats) || floats > INT64_MAX / 4)
        return cuflash_fail(CUFLASH_OUT_OF_MEMORY, "attention: the workspace of this problem does not fit 64 bits");
    *workspace_bytes = (size_t)floats * sizeof(float);
    return CUFLASH_SUCCESS;
}

void cuflash_cpu_plan_describe(const cuflash_cpu_plan *plan, const cuflash_problem *p, char *text, size_t size) {
    bool split = plan->pass == CUFLASH_BACKWARD, on_pairs = plan->packed_bytes > 0;
    const cuflash_cpu_kernels *kernels = plan->kernels;
    bool few = !split && cuflash_cpu_is_few(plan->rows, p->dtype, kernels->vector);
    bool few_by_pairs = few && kernels->on_pairs && cuflash_cpu_few_by_pairs(plan->rows, p->dtype);
    int64_t each = split ? plan->splits : plan->row_blocks, units = plan->units / plan->halves;
    char what[96], parts[48] = "", together[48] = "";
    const char *halves = plan->halves > 1 && plan->threads > 1 ? ", the last ones by halves" : "";
    if (plan->key_parts > 1) snprintf(parts, sizeof parts, ", keys in %lld parts", (long long)plan->key_parts);
    if (plan->together > 1)
        snprintf(together, sizeof together, split ? ", %lld row blocks at a time" : ", up to %lld at a time",
                 (long long)plan->together);
    if (on_pairs)
        snprintf(what, sizeof what, "%s%s", kernels->on_pairs, plan->planes > 1 ? ", numbers as sums of two" : "");
    else if (few_by_pairs)
        snprintf(what, sizeof what, "%s", kernels->few_on_pairs);
    else
        snprintf(what, sizeof what, "vectors of %d float32%s%s", kernels->vector, few ? " over the head dimension" : "",
                 p->dtype == CUFLASH_FLOAT32 ? "" : ", operands converted as they are read");
    snprintf(text, size,
             "kernel: cpu %s, %s\n"
             "tile: %d query rows x %d keys%s\n"
             "work: %lld unit%s (%lld batch x KV head, %lld %s%s each%s%s%s) on %d thread%s\n",
             kernels->name, what, kernels->block_m, (int)cuflash_tile_keys(plan),
             plan->group > 1 ? ", query heads of a KV head together" : "", (long long)units, units == 1 ? "" : "s",
             (long long)plan->pairs, (long long)each, split ? "split" : "row block", each == 1 ? "" : "s", halves, parts,
             together, plan->threads, plan->threads == 1 ? "" : "s");
}

/* ---- Run ---------------------------------------------------------------------------------------- */

typedef struct {
    const cuflash_cpu_work *work;
    cuflash_cpu_stage *stage;
} units;

/* The stages of a run. */
typedef struct {
    units units[CUFLASH_MOST_STAGES];
    cuflash_stage stages[CUFLASH_MOST_STAGES];
    int count;
} run;

static void run_units(void *context, int64_t begin, int64_t end, int thread) {
    const units *all = context;
    const cuflash_cpu_work *w = all->work;
    for (int64_t unit = begin; unit < end && !cuflash_interrupted(w->ticket); unit++)
        all->stage(w, unit, w->scratch + thread * w->plan->scratch_floats);
}

static void run_forward(void *context, int64_t begin, int64_t end, int thread) {
    const cuflash_cpu_work *w = context;
    const cuflash_cpu_plan *plan = w->plan;
    int64_t of_pair = plan->units / plan->pairs, count;
    for (int64_t unit = begin; unit < end && !cuflash_interrupted(w->ticket); unit += count) {
        count = plan->together * plan->halves - unit % plan->halves;
        if (count > of_pair - unit % of_pair) count = of_pair - unit % of_pair;
        if (count > end - unit) count = end - unit;
        plan->kernels->forward(w, unit, count, w->scratch + thread * plan->scratch_floats);
    }
}

/* Units of all stages are in the order of pairs. */
static cuflash_stage *add_stage(run *r, const cuflash_cpu_work *w, cuflash_cpu_stage *stage, int64_t count) {
    units *all = &r->units[r->count];
    cuflash_stage *s = &r->stages[r->count++];
    *all = (units){w, stage};
    *s = (cuflash_stage){.count = count, .grain = 1, .fn = run_units, .context = all, .runs = w->plan->pairs};
    return s;
}

static void add_forward(run *r, cuflash_cpu_work *w) {
    const cuflash_cpu_plan *plan = w->plan;
    r->stages[r->count++] = (cuflash_stage){.count = plan->units,
                                            .grain = plan->together * plan->halves,
                                            .fn = run_forward,
                                            .context = w,
                                            .whole = plan->halves,
                                            .runs = plan->pairs};
}

void cuflash_cpu_run(const cuflash_cpu_plan *plan, const cuflash_problem *p, cuflash_pass pass, void *workspace,
                     unsigned ticket) {
    const cuflash_cpu_kernels *kernels = plan->kernels;
    cuflash_cpu_work w = {.plan = plan, .p = p, .scratch = workspace, .ticket = ticket};
    w.packed = (char *)(w.scratch + plan->threads * plan->scratch_floats);
    w.partials = (float *)(void *)(w.packed + plan->pairs * plan->packed_bytes);
    w.dq_parts = w.partials + plan->pairs * plan->splits * plan->partial_floats;
    w.rows = w.dq_parts + plan->pairs * plan->key_parts * plan->dq_floats;
    int64_t row_blocks = plan->pairs * plan->row_blocks;
    run r = {.count = 0};
    if (plan->packed_bytes > 0) add_stage(&r, &w, kernels->pack, plan->pairs * cuflash_key_blocks(p, kernels->pack_n));
    if (pass == CUFLASH_FORWARD) {
        add_forward(&r, &w);
        if (plan->key_parts > 1) add_stage(&r, &w, kernels->forward_finish, row_blocks);
    } else {
        add_stage(&r, &w, kernels->backward_begin, row_blocks);
        add_stage(&r, &w, kernels->backward, plan->units)->shrink = true;
        if (p->dq.data && plan->key_parts > 1) add_stage(&r, &w, kernels->backward_finish_rows, row_blocks);
        if (!cuflash_keys_at_once(plan) && (p->dk.data || p->dv.data))
            add_stage(&r, &w, kernels->backward_finish_keys, plan->pairs * cuflash_key_blocks(p, kernels->block_n));
    }
    cuflash_parallel_stages(plan->threads, plan->woken, r.stages, r.count);
}
