/* What the stand-in for the CUDA driver (fake_libcuda.c) tells a test program. */
#ifndef CUFLASH_SPEC_FAKE_CUDA_H
#define CUFLASH_SPEC_FAKE_CUDA_H

#include <dlfcn.h>

#include "check.h"

static struct {
    long (*launches)(void);
    long (*allocations)(void);
    const char *(*last_launch)(void); /* "name blocks threads shared_bytes" */
    void (*fault)(int);               /* what every call fails with from now on; 0: none */
    cudaStream_t (*freed_on)(void);   /* the stream of the last free */
} fake;

/* Loads the stand-in, which main's one argument is the path of, with two devices. False, having said why, if it cannot. */
static bool fake_load(int argc, char **argv) {
    if (argc != 2) return fprintf(stderr, "usage: %s path-of-the-stand-in-driver\n", argv[0]), false;
    setenv("FAKE_CUDA_DEVICES", "2", 1);
    void *driver = dlopen(argv[1], RTLD_NOW);
    if (!driver) return fprintf(stderr, "%s\n", dlerror()), false;
    *(void **)&fake.launches = dlsym(driver, "fake_launches");
    *(void **)&fake.allocations = dlsym(driver, "fake_allocations");
    *(void **)&fake.last_launch = dlsym(driver, "fake_last_launch");
    *(void **)&fake.fault = dlsym(driver, "fake_fault");
    *(void **)&fake.freed_on = dlsym(driver, "fake_freed_on");
    return true;
}

#endif
