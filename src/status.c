#include "status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[512];

cuflash_status cuflash_fail(cuflash_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}

const char *cuflash_last_error(void) {
    return last_error;
}

const char *cuflash_status_name(int status) {
    switch (status) {
#define NAME_CASE(name, code, text)                                                                                            \
    case code: return #name;
        CUFLASH_STATUS_MAP(NAME_CASE)
#undef NAME_CASE
    }
    return "UNKNOWN_STATUS";
}

const char *cuflash_status_string(int status) {
    switch (status) {
#define TEXT_CASE(name, code, text)                                                                                            \
    case code: return text;
        CUFLASH_STATUS_MAP(TEXT_CASE)
#undef TEXT_CASE
    }
    return "unknown status";
}

#define TEXT_OF(x) #x
#define VERSION_TEXT(major, minor, patch) TEXT_OF(major) "." TEXT_OF(minor) "." TEXT_OF(patch)

const char *cuflash_version(void) {
    return VERSION_TEXT(CUFLASH_VERSION_MAJOR, CUFLASH_VERSION_MINOR, CUFLASH_VERSION_PATCH);
}

int cuflash_abi_version(void) {
    return CUFLASH_ABI_VERSION;
}
