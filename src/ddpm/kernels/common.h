/* Shared by amx.c and winograd.c. Each of them defines `real`, the type of sums, weights and the norm's parameters.
 * __init__.py defines PLANE (numbers of channels are multiples of it), MOST (the largest number of channels) and
 * MOST_GROUPS (the largest number of groups in a norm). */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define INLINE static inline __attribute__((always_inline)) /* constant arguments are then known to the compiler */

#define KEPT ((size_t)1 << 26) /* bytes of the largest buffer that a thread keeps */

/* Each thread has four buffers. It keeps small ones for its next call, and frees them when it ends. */
typedef struct { void *at; size_t bytes; } buffers[4];
static pthread_key_t key;

static void free_buffers(void *of_thread) {
    for (int k = 0; k < 4; k++) free((*(buffers *)of_thread)[k].at);
    free(of_thread);
}

static __attribute__((constructor)) void create_key(void) { pthread_key_create(&key, free_buffers); }

/* Buffer `which` (0 to 3) of this thread, with at least this many bytes; NULL if the memory is full. */
static void *thread_buffer(int which, size_t bytes) {
    buffers *own = pthread_getspecific(key);
    if (!own && (own = calloc(1, sizeof(buffers)))) pthread_setspecific(key, own);
    if (!own) return NULL;
    if ((*own)[which].bytes < bytes) {
        free((*own)[which].at);
        size_t page = bytes > KEPT ? 1 << 21 : 4096, whole = (bytes + page - 1) & ~(page - 1);
        (*own)[which].at = aligned_alloc(page, whole);
        if (bytes > KEPT && (*own)[which].at) madvise((*own)[which].at, whole, MADV_HUGEPAGE); /* new in each call */
        (*own)[which].bytes = (*own)[which].at ? bytes : 0;
    }
    return (*own)[which].at;
}

/* `thread_buffer` for use inside a parallel region, which cannot return early: it aborts if the memory is full. */
static void *buffer_or_abort(int which, size_t bytes) {
    void *at = thread_buffer(which, bytes);
    if (!at) fputs("ddpm: the memory is full\n", stderr), abort();
    return at;
}

/* Free this thread's large buffers at the end of a call, as PyTorch frees its tensors; returns its argument. */
static int give_back(int result) {
    buffers *own = pthread_getspecific(key);
    for (int k = 0; own && k < 4; k++)
        if ((*own)[k].bytes > KEPT) free((*own)[k].at), (*own)[k].at = NULL, (*own)[k].bytes = 0;
    return result;
}

enum { OUT_OF_MEMORY = 1 }; /* functions return it if the memory is full, and 0 otherwise */

/* Norm, swish and dropout before the convolution. If gamma is NULL, there are none and y = x. */
typedef struct {
    const real *gamma, *beta;
    real *mean, *rstd; /* mean and 1 / standard deviation of each group, [B, groups] */
    double eps, keep;  /* keep is 1 - the dropout probability */
    long groups, swish;
    uint64_t seed;
} before;

/* Write the norm of PLANE channels from c of image b as scale x + shift. */
static void affine(const before *f, long b, long c, long C, real *scale, real *shift) {
    for (int k = 0; k < PLANE; k++) {
        long g = b * f->groups + (c + k) / (C / f->groups);
        scale[k] = f->gamma[c + k] * f->rstd[g];
        shift[k] = f->beta[c + k] - f->mean[g] * scale[k];
    }
}
