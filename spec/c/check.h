/* The checks of the test programs: they count, print what failed, and make main's result. C11 and C++17. */
#ifndef CUFLASH_SPEC_CHECK_H
#define CUFLASH_SPEC_CHECK_H

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuflash.h"

enum { CHECK_SKIPPED = 77 }; /* the exit code that ctest takes for a skipped test */

#define COUNT_OF(array) ((int)(sizeof(array) / sizeof *(array)))

static long check_count, check_failures;
static char check_case[256]; /* what is being checked, printed before every failure; set by the main thread alone */

__attribute__((format(printf, 1, 2), unused)) static void check_in(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(check_case, sizeof check_case, format, args);
    va_end(args);
}

/* Returns whether ok, so that what depends on it can be left out. */
__attribute__((format(printf, 4, 5), unused)) static bool check_that(bool ok, const char *file, int line, const char *format,
                                                                     ...) {
    __atomic_add_fetch(&check_count, 1, __ATOMIC_RELAXED);
    if (ok) return true;
    if (__atomic_add_fetch(&check_failures, 1, __ATOMIC_RELAXED) > 50) return false; /* enough to read */
    const char *base = strrchr(file, '/');
    fprintf(stderr, "%s:%d: %s%s", base ? base + 1 : file, line, check_case, *check_case ? ": " : "");
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return false;
}

/* Does text contain every one of the words, which are separated by '|'? */
__attribute__((unused)) static bool check_contains(const char *text, const char *words) {
    while (*words) {
        size_t length = strcspn(words, "|");
        char word[128];
        snprintf(word, sizeof word, "%.*s", (int)length, words);
        if (!strstr(text, word)) return false;
        words += length + (words[length] == '|');
    }
    return true;
}

__attribute__((unused)) static bool check_status(int got, int expected, const char *words, const char *file, int line,
                                                 const char *call) {
    const char *message = cuflash_last_error();
    if (!check_that(got == expected, file, line, "%s: expected %s, got %s (%s)", call, cuflash_status_name(expected),
                    cuflash_status_name(got), got ? message : "no error"))
        return false;
    return !words || check_that(check_contains(message, words), file, line, "%s: expected a message with '%s', got '%s'", call,
                                words, message);
}

#define CHECK(condition) check_that((condition) ? true : false, __FILE__, __LINE__, "expected %s", #condition)

/* With a message of its own. */
#define CHECK_F(condition, ...) check_that((condition) ? true : false, __FILE__, __LINE__, __VA_ARGS__)

#define CHECK_OK(call) check_status((call), CUFLASH_SUCCESS, NULL, __FILE__, __LINE__, #call)

/* The call fails with this status, and its message contains every one of the words, separated by '|'. */
#define CHECK_FAILS(status, words, call) check_status((call), status, words, __FILE__, __LINE__, #call)

/* |got - expected| <= bound; NaN fails. */
#define CHECK_NEAR(got, expected, bound)                                                                                       \
    do {                                                                                                                       \
        double got_ = (got), expected_ = (expected), bound_ = (bound);                                                         \
        check_that(fabs(got_ - expected_) <= bound_, __FILE__, __LINE__, "%s: expected %.17g within %.3g, got %.17g", #got,    \
                   expected_, bound_, got_);                                                                                   \
    } while (0)

/* What nothing can go on without. */
#define REQUIRE_OK(call)                                                                                                       \
    do {                                                                                                                       \
        if (!CHECK_OK(call)) exit(1);                                                                                          \
    } while (0)

/* Bytes that storages hold now. */
__attribute__((unused)) static int64_t check_live_bytes(void) {
    cuflash_memory_stats stats;
    REQUIRE_OK(cuflash_memory_get_stats(CUFLASH_CPU, &stats));
    return stats.live_bytes;
}

/* main returns this: a program that checked nothing failed. */
__attribute__((unused)) static int check_result(void) {
    printf("%ld checks, %ld failed\n", check_count, check_failures);
    return check_failures > 0 || check_count == 0;
}

#endif
