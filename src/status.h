/* Statuses and the thread's last error message. */
#ifndef CUFLASH_STATUS_H
#define CUFLASH_STATUS_H

#include "cuflash.h"

/* Leaves a formatted sentence as this thread's last error and returns status. */
cuflash_status cuflash_fail(cuflash_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Returns from the calling function unless expr is CUFLASH_SUCCESS. */
#define CUFLASH_TRY(expr)                                                                                                      \
    do {                                                                                                                       \
        cuflash_status try_status_ = (expr);                                                                                   \
        if (try_status_ != CUFLASH_SUCCESS) return try_status_;                                                                \
    } while (0)

#endif
