/* What the kernels share; `real` is the type of their sums and of the norm's weights. Channels come in multiples of PLANE,
 * MOST and MOST_GROUPS of a norm: __init__.py defines them. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline)) /* so that what is constant at the call costs nothing */

/* Room of this thread, kept for its next call and given back when it ends; NULL where the memory is full. */
typedef struct { void *at; size_t bytes; } rooms[4];
static pthread_key_t key;

static void leave(void *of) {
    for (int k = 0; k < 4; k++) free((*(rooms *)of)[k].at);
    free(of);
}

static __attribute__((constructor)) void enter(void) { pthread_key_create(&key, leave); }

static void *room(int which, size_t bytes) {
    rooms *all = pthread_getspecific(key);
    if (!all && (all = calloc(1, sizeof(rooms)))) pthread_setspecific(key, all);
    if (!all) return NULL;
    if ((*all)[which].bytes < bytes) {
        free((*all)[which].at);
        (*all)[which].at = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
        (*all)[which].bytes = (*all)[which].at ? bytes : 0;
    }
    return (*all)[which].at;
}

/* The same for a thread among others, which cannot turn back. */
static void *needed(int which, size_t bytes) {
    void *at = room(which, bytes);
    if (!at) fputs("ddpm: the memory is full\n", stderr), abort();
    return at;
}

enum { FULL = 1 }; /* what functions return where the memory is full, else 0 */

/* What comes before the convolution. gamma NULL: nothing does, and y = x. */
typedef struct {
    const real *gamma, *beta;
    real *mean, *rstd; /* [B, groups] */
    double eps, keep;   /* keep: 1 - the dropout probability */
    long groups, swish;
    uint64_t seed;
} before;

/* The norm as one factor and one term a channel: scale x + shift. */
static void affine(const before *f, long b, long c, long C, real *scale, real *shift) {
    for (int k = 0; k < PLANE; k++) {
        long g = b * f->groups + (c + k) / (C / f->groups);
        scale[k] = f->gamma[c + k] * f->rstd[g];
        shift[k] = f->beta[c + k] - f->mean[g] * scale[k];
    }
}
