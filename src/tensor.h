/* Tensors: checks and helpers that the other subsystems share. */
#ifndef CUFLASH_TENSOR_H
#define CUFLASH_TENSOR_H

#include "status.h"

/* Is this a live, well-formed tensor? fn and arg name the function and its argument in the message. */
cuflash_status cuflash_check_tensor(const char *fn, const char *arg, const cuflash_tensor *tensor);

/* And a fit output: no two of its elements share memory. */
cuflash_status cuflash_check_output(const char *fn, const char *arg, const cuflash_tensor *tensor);

/* A live tensor whose shape broadcasts to out's? */
cuflash_status cuflash_check_input(const char *fn, const char *arg, const cuflash_tensor *out, const cuflash_tensor *in);

cuflash_status cuflash_check_device(const char *fn, const char *arg, const cuflash_tensor *tensor, int device);

/* cuflash_tensor_borrow for an argument of another function, which messages then name. */
cuflash_status cuflash_borrow_argument(const char *fn, const char *arg, cuflash_tensor *out, void *data, cuflash_dtype dtype,
                                       int device, int ndim, const int64_t *shape, const int64_t *strides);

bool cuflash_same_shape(const cuflash_tensor *a, const cuflash_tensor *b);

/* "[2 x 8 x 128 x 64]"; returns buffer. */
enum { CUFLASH_SHAPE_TEXT = 192 };
const char *cuflash_shape_text(char buffer[CUFLASH_SHAPE_TEXT], int ndim, const int64_t *shape);

/* "cpu" or "cuda:0"; returns buffer. */
enum { CUFLASH_DEVICE_TEXT = 24 };
const char *cuflash_device_text(char buffer[CUFLASH_DEVICE_TEXT], int device);

/* Bytes from a tensor's first element to the end of its last one. */
int64_t cuflash_tensor_extent(const cuflash_tensor *tensor);

/* Do the spans of memory of the two overlap? */
bool cuflash_spans_overlap(const cuflash_tensor *a, const cuflash_tensor *b);

#endif
