/* What the kernels share; `real` is the type of their sums and of the norm's weights. */
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline)) /* so that what is constant at the call costs nothing */
enum { PLANE = 32 }; /* channels come in multiples of it */

/* Room of this thread, kept for the next call. */
static void *room(int which, size_t bytes) {
    static __thread struct { void *at; size_t bytes; } rooms[4];
    if (rooms[which].bytes < bytes) {
        free(rooms[which].at);
        rooms[which].at = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
        rooms[which].bytes = bytes;
    }
    return rooms[which].at;
}

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
