/* Versions, status codes, messages, dtypes, devices, threads. */
#include <pthread.h>

#include "check.h"

static void test_versions(void) {
    char expected[32];
    snprintf(expected, sizeof expected, "%d.%d.%d", CUFLASH_VERSION_MAJOR, CUFLASH_VERSION_MINOR, CUFLASH_VERSION_PATCH);
    CHECK(strcmp(cuflash_version(), expected) == 0);
    CHECK(cuflash_abi_version() == CUFLASH_ABI_VERSION);
}

/* The codes that callers of the earlier API know, and the ones after them. */
static void test_codes(void) {
    static const struct {
        int code;
        const char *name;
    } codes[] = {{0, "SUCCESS"},          {1, "INVALID_DIMENSION"}, {2, "DIMENSION_MISMATCH"},   {3, "NULL_POINTER"},
                 {4, "CUDA_ERROR"},       {5, "OUT_OF_MEMORY"},     {6, "UNSUPPORTED_HEAD_DIM"}, {7, "UNSUPPORTED_DTYPE"},
                 {8, "INVALID_ARGUMENT"}, {9, "INTERRUPTED"}};
    for (int i = 0; i < COUNT_OF(codes); i++) {
        check_in("status %d", codes[i].code);
        CHECK(strcmp(cuflash_status_name(codes[i].code), codes[i].name) == 0);
        CHECK(strlen(cuflash_status_string(codes[i].code)) > 0);
        for (int j = 0; j < i; j++)
            CHECK(strcmp(cuflash_status_string(codes[i].code), cuflash_status_string(codes[j].code)) != 0);
    }
#define CHECK_CODE(name, code, text)                                                                                           \
    CHECK(CUFLASH_##name == (code));                                                                                           \
    CHECK(strcmp(cuflash_status_string(CUFLASH_##name), text) == 0);
    check_in("the map");
    CUFLASH_STATUS_MAP(CHECK_CODE)
#undef CHECK_CODE
    static const int none[] = {-1, COUNT_OF(codes), 1000, INT32_MAX, INT32_MIN};
    for (int i = 0; i < COUNT_OF(none); i++) {
        check_in("status %d", none[i]);
        CHECK(strcmp(cuflash_status_name(none[i]), "UNKNOWN_STATUS") == 0);
        CHECK(strlen(cuflash_status_string(none[i])) > 0);
    }
    check_in("%s", "");
}

static void *other_thread(void *messages) {
    char(*said)[512] = messages;
    snprintf(said[0], sizeof said[0], "%s", cuflash_last_error());
    cuflash_set_num_threads(-5);
    snprintf(said[1], sizeof said[1], "%s", cuflash_last_error());
    return NULL;
}

static void test_messages(void) {
    CHECK(strcmp(cuflash_last_error(), "") == 0); /* nothing has failed yet: this test runs first */
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "set_num_threads|threads|-3", cuflash_set_num_threads(-3));
    char mine[512], said[2][512] = {"unset", "unset"};
    snprintf(mine, sizeof mine, "%s", cuflash_last_error());
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, other_thread, said) == 0);
    pthread_join(thread, NULL);
    CHECK(strcmp(said[0], "") == 0); /* another thread's failures are its own */
    CHECK(strstr(said[1], "-5") != NULL);
    CHECK(strcmp(cuflash_last_error(), mine) == 0);
    CHECK_OK(cuflash_device_check(CUFLASH_CPU));
    CHECK(strcmp(cuflash_last_error(), mine) == 0); /* success says nothing */
}

static void test_dtypes(void) {
    static const struct {
        int dtype;
        const char *name;
        size_t size;
    } dtypes[] = {{CUFLASH_FLOAT32, "float32", 4},
                  {CUFLASH_FLOAT16, "float16", 2},
                  {CUFLASH_BFLOAT16, "bfloat16", 2},
                  {CUFLASH_FLOAT64, "float64", 8},
                  {-1, "unknown", 0},
                  {4, "unknown", 0},
                  {1 << 20, "unknown", 0}};
    for (int i = 0; i < COUNT_OF(dtypes); i++) {
        check_in("dtype %d", dtypes[i].dtype);
        CHECK(strcmp(cuflash_dtype_name(dtypes[i].dtype), dtypes[i].name) == 0);
        CHECK(cuflash_dtype_size(dtypes[i].dtype) == dtypes[i].size);
    }
    check_in("%s", "");
}

static void test_devices(void) {
    CHECK_OK(cuflash_device_check(CUFLASH_CPU));
    CHECK_OK(cuflash_synchronize(CUFLASH_CPU));
    int beyond = cuflash_cuda_device_count();
    CHECK(beyond >= 0);
    char name[32];
    snprintf(name, sizeof name, "cuda:%d", beyond);
    CHECK_FAILS(CUFLASH_CUDA_ERROR, name, cuflash_device_check(beyond));
    CHECK_FAILS(CUFLASH_CUDA_ERROR, name, cuflash_synchronize(beyond));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "-2", cuflash_device_check(-2));
    CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "-2", cuflash_synchronize(-2));
}

static void test_threads(void) {
    int before = cuflash_get_num_threads();
    CHECK(before >= 1);
    CHECK_OK(cuflash_set_num_threads(3));
    CHECK(cuflash_get_num_threads() == 3);
    static const int wrong[] = {0, -1, INT32_MIN, 65537, INT32_MAX};
    for (int i = 0; i < COUNT_OF(wrong); i++) {
        CHECK_FAILS(CUFLASH_INVALID_ARGUMENT, "threads", cuflash_set_num_threads(wrong[i]));
        CHECK(cuflash_get_num_threads() == 3);
    }
    CHECK_OK(cuflash_set_num_threads(before));
}

/* The declarations for LuaJIT: all functions, and nothing that its parser does not know. */
static void test_cdef(void) {
    const char *cdef = cuflash_ffi_cdef();
    CHECK(strchr(cdef, '#') == NULL);
    CHECK(strstr(cdef, "__attribute__") == NULL);
    CHECK(strstr(cdef, "cuflash_attention_backward_f16") != NULL);
    CHECK(strstr(cdef, "cuflash_catch_sigint") != NULL);
    CHECK(strstr(cdef, "CUFLASH_INTERRUPTED = 9") != NULL);
}

int main(void) {
    test_messages();
    test_versions();
    test_codes();
    test_dtypes();
    test_devices();
    test_threads();
    test_cdef();
    return check_result();
}
