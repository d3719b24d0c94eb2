/* The CPU backend: one kernel source, compiled once per instruction set, chosen at run time. */
#ifndef CUFLASH_CPU_H
#define CUFLASH_CPU_H

#include "problem.h"

static inline int64_t cuflash_round_up(int64_t x, int64_t to) {
    return (x + to - 1) / to * to;
}

/* Blocks of so many keys. */
static inline int64_t cuflash_key_blocks(const cuflash_problem *p, int64_t size) {
    return (p->seq_k + size - 1) / size;
}

/* How a problem is cut up. The rows of a (batch, KV head) pair are the query rows of all its query heads, position
 * by position: row r is position r / group of query head r % group. They share K and V, so a block of rows does. */
typedef struct {
    const struct cuflash_cpu_kernels *kernels;
    cuflash_pass pass;
    int threads;            /* at most */
    int woken;              /* of them, where they sleep */
    int64_t group;          /* query heads per KV head */
    int64_t pairs;          /* batch * heads_kv */
    int64_t rows;           /* per pair: group * seq_q */
    int64_t row_blocks;     /* per pair */
    int64_t key_parts;      /* that the keys are cut into: of a forward's row block, of a backward's pair */
    int64_t splits;         /* backward: that a pair's row blocks are dealt out to, each with its own dk and dv */
    int64_t together;       /* row blocks that go through keys together: of a backward's split, of a forward up to so many */
    int64_t part_keys;      /* backward: of a part at most, where a unit converts all of its keys before its row blocks, or 0 */
    int64_t halves;         /* forward: 2 where units are halves of row blocks, or 1 */
    int64_t units;          /* what threads take: a forward's row blocks by parts or halves, a backward's splits by parts */
    int64_t pad_d, pad_dv;  /* head dimensions rounded up to whole vectors */
    int64_t pad_k;          /* seq_k rounded up to 16 */
    int64_t scratch_floats; /* per thread */
    int64_t packed_bytes;   /* per pair: keys as products of pairs take them (bf16.h), or 0 */
    int64_t planes;         /* that numbers are the sum of there, or 0 */
    int64_t partial_floats; /* forward: per unit, max, sum and output of each row, or 0 where keys are one part; backward: per
                             * split of a pair, dk [pad_k][pad_d], then dv [pad_k][pad_dv], or 0 where rows are one block */
    int64_t dq_floats;      /* backward: per part of a pair's keys, [row_blocks][head_dim, rounded up to 16][block_m], or 0
                             * where keys are one part */
} cuflash_cpu_plan;

enum {
    CUFLASH_MOST_TOGETHER = 4,
    CUFLASH_ROW_NUMBERS = 3, /* maximum, shift and delta */
};

/* A run of a plan: what its stages share. */
typedef struct {
    const cuflash_cpu_plan *plan;
    const cuflash_problem *p;
    float *scratch;  /* [threads][scratch_floats] */
    char *packed;    /* [pairs][packed_bytes] */
    float *partials; /* forward: [units][partial_floats]; backward: [pairs][splits][partial_floats] */
    float *dq_parts; /* backward: [pairs][key_parts][dq_floats] */
    float *rows;     /* backward: [pairs * row_blocks][CUFLASH_ROW_NUMBERS][block_m] */
    unsigned ticket;
} cuflash_cpu_work;

/* One unit of a stage, in scratch of the thread's own. */
typedef void cuflash_cpu_stage(const cuflash_cpu_work *work, int64_t unit, float *scratch);

/* So many units, one behind the other, of one pair, and of `together` row blocks at most. */
typedef void cuflash_cpu_forward(const cuflash_cpu_work *work, int64_t unit, int64_t count, float *scratch);

/* Are there so few rows that vectors of so many floats run over d? Vectors of them were mostly empty, and keys of 16 bits are
 * not converted to a buffer. */
static inline bool cuflash_cpu_is_few(int64_t rows, cuflash_dtype dtype, int vector) {
    return rows <= (dtype == CUFLASH_FLOAT32 ? vector / 2 : vector);
}

/* Are scores of few rows products of pairs, where there are instructions for them? */
static inline bool cuflash_cpu_few_by_pairs(int64_t rows, cuflash_dtype dtype) {
    return rows > 2 && dtype == CUFLASH_BFLOAT16;
}

/* What an instruction set provides: its row of the table in cpu.c. Row blocks, and blocks of keys, are those of all pairs. */
typedef struct cuflash_cpu_kernels {
    const char *name;
    int vector;  /* floats */
    int block_m; /* query rows to a tile */
    int block_n; /* keys to a tile */
    /* Floats of scratch a thread needs. */
    int64_t (*scratch_floats)(const cuflash_cpu_plan *plan, const cuflash_problem *p, cuflash_pass pass);
    /* Products of pairs of bfloat16 by instructions of its own, or NULL: in words; by dtype, planes of numbers, or 0 where it is not
     * worth it; and the bytes that a pair takes packed. */
    const char *on_pairs;
    const char *few_on_pairs; /* the same, of few rows */
    int planes[CUFLASH_FLOAT64];
    int64_t (*packed_bytes)(const cuflash_cpu_plan *plan, const cuflash_problem *p);
    int pack_n;
    cuflash_cpu_stage *pack;                 /* of pack_n keys */
    cuflash_cpu_forward *forward;            /* of the plan's units */
    cuflash_cpu_stage *forward_finish;       /* of a row block: adds up its parts, and writes its output */
    cuflash_cpu_stage *backward_begin;       /* of a row block: what is needed of each row */
    cuflash_cpu_stage *backward;             /* of the plan's units */
    cuflash_cpu_stage *backward_finish_rows; /* of a row block: adds up dq of the parts, and writes it */
    cuflash_cpu_stage *backward_finish_keys; /* of block_n keys: adds up dk and dv of the splits, and writes them */
} cuflash_cpu_kernels;

/* Are a pair's rows one block? A backward's dk and dv of a tile of keys are complete then, and written at once. */
static inline bool cuflash_keys_at_once(const cuflash_cpu_plan *plan) {
    return plan->row_blocks == 1;
}

/* Keys of a tile. */
static inline int64_t cuflash_tile_keys(const cuflash_cpu_plan *plan) {
    return plan->packed_bytes > 0 ? plan->kernels->pack_n : plan->kernels->block_n;
}

/* Do later parts of the keys have fewer of them? The last units of a backward are to be small, so that threads end together.
 * Where it is causal they are so of equal parts, as fewer rows see the later ones. */
static inline bool cuflash_parts_shrink(const cuflash_cpu_plan *plan, const cuflash_problem *p) {
    return plan->pass == CUFLASH_BACKWARD && !p->causal;
}

/* Where a part of the keys begins: at a tile. */
static inline int64_t cuflash_part_begin(const cuflash_cpu_plan *plan, const cuflash_problem *p, int64_t part) {
    int64_t size = cuflash_tile_keys(plan), tiles = cuflash_key_blocks(p, size);
    int64_t parts = plan->key_parts, left = parts - part, first = tiles * part / parts;
    if (cuflash_parts_shrink(plan, p)) { /* of parts^2 pieces left^2 are left */
        int64_t pieces = parts * parts, some = tiles / pieces, others = tiles % pieces;
        first = tiles - some * left * left - (others * left * left + pieces - 1) / pieces;
    }
    return first * size < p->seq_k ? first * size : p->seq_k;
}

cuflash_status cuflash_cpu_plan_make(cuflash_cpu_plan *plan, const cuflash_problem *p, cuflash_pass pass, int threads,
                                     size_t *workspace_bytes);
void cuflash_cpu_plan_describe(const cuflash_cpu_plan *plan, const cuflash_problem *p, char *text, size_t size);
void cuflash_cpu_run(const cuflash_cpu_plan *plan, const cuflash_problem *p, cuflash_pass pass, void *workspace,
                     unsigned ticket);

#endif
