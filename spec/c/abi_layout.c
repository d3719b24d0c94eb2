/* Prints where the C compiler put every field of every public struct, "struct field offset size" a line, and each
 * struct's own size as "struct - - size". A spec compares it with what LuaJIT's FFI makes of the same declarations. */
#include <stddef.h>
#include <stdio.h>

#include "cuflash.h"

#define STRUCT(type) printf(#type " - - %zu\n", sizeof(type))
#define FIELD(type, field) printf(#type " " #field " %zu %zu\n", offsetof(type, field), sizeof(((type *)0)->field))

int main(void) {
    STRUCT(cuflash_memory_stats);
    FIELD(cuflash_memory_stats, live_bytes);
    FIELD(cuflash_memory_stats, peak_bytes);
    FIELD(cuflash_memory_stats, live_storages);
    FIELD(cuflash_memory_stats, total_storages);
    FIELD(cuflash_memory_stats, limit_bytes);

    STRUCT(cuflash_tensor);
    FIELD(cuflash_tensor, storage);
    FIELD(cuflash_tensor, data);
    FIELD(cuflash_tensor, dtype);
    FIELD(cuflash_tensor, device);
    FIELD(cuflash_tensor, ndim);
    FIELD(cuflash_tensor, shape);
    FIELD(cuflash_tensor, stride);

    STRUCT(cuflash_close_report);
    FIELD(cuflash_close_report, numel);
    FIELD(cuflash_close_report, n_bad);
    FIELD(cuflash_close_report, max_abs);
    FIELD(cuflash_close_report, max_rel);
    FIELD(cuflash_close_report, rel_norm);
    FIELD(cuflash_close_report, worst_index);
    FIELD(cuflash_close_report, worst_actual);
    FIELD(cuflash_close_report, worst_expected);

    STRUCT(cuflash_generator);
    FIELD(cuflash_generator, seed);
    FIELD(cuflash_generator, offset);

    STRUCT(cuflash_attention);
    FIELD(cuflash_attention, struct_size);
    FIELD(cuflash_attention, q);
    FIELD(cuflash_attention, k);
    FIELD(cuflash_attention, v);
    FIELD(cuflash_attention, o);
    FIELD(cuflash_attention, lse);
    FIELD(cuflash_attention, d_o);
    FIELD(cuflash_attention, dq);
    FIELD(cuflash_attention, dk);
    FIELD(cuflash_attention, dv);
    FIELD(cuflash_attention, flags);
    FIELD(cuflash_attention, scale);
    FIELD(cuflash_attention, stream);
    FIELD(cuflash_attention, workspace);
    FIELD(cuflash_attention, workspace_bytes);
    return 0;
}
