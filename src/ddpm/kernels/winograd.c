/* GroupNorm, swish, dropout and convolution in one pass, in float32 or float64 (DOUBLE) on any x86-64 with AVX2.
 *
 *     y   = dropout(swish(groupnorm(x)))      each of the three may be absent
 *     out = conv(y, w) + bias + add + residual
 *
 * Images are [B, H, W, C] with C a multiple of 32; convolutions are 3x3 (padding 1) or 1x1, of stride 1.
 *
 * A 3x3 is done by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016): 4x4 outputs from 6x6 inputs d, with a
 * quarter of the multiplications,
 *
 *     A^T [(G g G^T) * (B^T d B)] A      * by element, a sum over the input channels: 36 matrix products.
 *
 * Its points are 0, +-3/4, +-3/2 and infinity: with those the result is within twice the rounding error of the plain
 * sum, where the usual 0, +-1, +-2 lose four times as much. A 1x1 is the same with tiles of one pixel: one product.
 * Where weights are new in every call and few tiles use one, its G g G^T, four times as long, would be written to memory
 * and read once: it is made on the way.
 *
 * Sums run in one order, whatever the batch and the number of threads: an image's result depends on nothing else. What is
 * not finite spreads over its tile.
 */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t ints __attribute__((vector_size(32)));
enum { TERMS = 13, MANTISSA = 52, LARGE = 700 }; /* of exp */
#define MIN _mm256_min_pd
#define MAX _mm256_max_pd
#else
typedef float real;
typedef int32_t ints __attribute__((vector_size(32)));
enum { TERMS = 7, MANTISSA = 23, LARGE = 87 };
#define MIN _mm256_min_ps
#define MAX _mm256_max_ps
#endif
#include "common.h"

enum { LANES = 32 / sizeof(real), BLOCK = 2 * LANES, ROWS = 6, SIDE = 6, OUT = 4 };
typedef real vec __attribute__((vector_size(32)));
typedef real loose __attribute__((vector_size(32), aligned(sizeof(real)), may_alias));

INLINE vec load(const real *p) { return *(const loose *)p; }
INLINE void store(real *p, vec v) { *(loose *)p = v; }
INLINE vec all(real x) { return x - (vec){0}; }

int ready(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

/* -- norm, swish, dropout ------------------------------------------------------------------------------------------ */

/* 1 / (1 + exp(-u)); exp by 2^n and the Taylor series of what is left, below 0.35. */
INLINE vec sigmoid(vec u) {
    static const double inverse[] = {1, 1, 1 / 2., 1 / 6., 1 / 24., 1 / 120., 1 / 720., 1 / 5040., 1 / 40320.,
                                     1 / 362880., 1 / 3628800., 1 / 39916800., 1 / 479001600., 1 / 6227020800.};
    const real integer = 1.5 * (1L << MANTISSA); /* what is added to it is rounded, and lies in its low bits */
    vec x = MIN(MAX(-u, all(-LARGE)), all(LARGE)), n = x * (real)1.4426950408889634 + integer, p = all(inverse[TERMS]);
    ints two = ((ints)n << MANTISSA) + (ints)all(1); /* 2^n */
    n -= integer;
    vec r = x - n * (real)0.693359375 + n * (real)2.121944400546905827679e-4; /* the sum of both is ln 2 */
#pragma GCC unroll 16
    for (int k = TERMS - 1; k >= 0; k--) p = p * r + (real)inverse[k];
    return 1 / (p * (vec)two + 1);
}

/* Which of the channels from c at `position` (counted over the batch) dropout keeps: all bits, or none. */
INLINE ints kept(const before *f, long position, long c) {
    typedef uint32_t uints __attribute__((vector_size(4 * LANES)));
    typedef int32_t mask __attribute__((vector_size(4 * LANES)));
    uint64_t h = (f->seed + (uint64_t)position) * 0x9E3779B97F4A7C15u;
    h ^= h >> 32;
    uints lane, x;
    for (int k = 0; k < LANES; k++) lane[k] = k + c;
    x = (uint32_t)h + lane * 0x9E3779B9u;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    return __builtin_convertvector((mask)(x < (uint32_t)(f->keep * 4294967040.0)), ints);
}

#define OVER(c, C, step) for (long c = 0; c < (C); c += (step))
enum { PART = 64, PARTS = PLANE / LANES }; /* so many positions are summed as they are, and those sums in double */

/* Sums over the n positions of PLANE channels of an image, [n] rows of C: of x, and of x^2. */
static void sums(const real *x, long n, long C, double *sum, double *square) {
    for (long from = 0; from < n; from += PART) {
        vec s[PARTS] = {{0}}, q[PARTS] = {{0}}, pivot[PARTS]; /* near the mean, so that few digits cancel */
        long to = from + PART < n ? from + PART : n;
        for (int k = 0; k < PARTS; k++) pivot[k] = load(x + from * C + LANES * k);
        for (long p = from; p < to; p++)
            for (int k = 0; k < PARTS; k++) {
                vec v = load(x + p * C + LANES * k) - pivot[k];
                s[k] += v;
                q[k] += v * v;
            }
        for (int k = 0; k < PLANE; k++) {
            double a = ((real *)pivot)[k], part = ((real *)s)[k], count = to - from;
            sum[k] += part + count * a;
            square[k] += ((real *)q)[k] + 2 * a * part + count * a * a;
        }
    }
}

/* mean and 1 / standard deviation of each group of each image x [B, n, C]. */
static void measure(const real *x, long B, long n, long C, const before *f) {
    double *sum = memset(needed(0, 16 * B * C), 0, 16 * B * C), *square = sum + B * C;
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        OVER(c, C, PLANE) sums(x + b * n * C + c, n, C, sum + b * C + c, square + b * C + c);
    long each = C / f->groups;
    for (long g = 0; g < B * f->groups; g++) {
        double s = 0, q = 0, count = (double)n * each;
        for (long c = g * each; c < (g + 1) * each; c++) s += sum[c], q += square[c];
        double mean = s / count, variance = q / count - mean * mean;
        f->mean[g] = mean;
        f->rstd[g] = 1 / __builtin_sqrt((variance > 0 ? variance : 0) + f->eps);
    }
}

/* y of PLANE channels of image b. */
INLINE void act(const real *x, real *y, long n, long C, const before *f, long b, long c, int swish, int drop) {
    real scale[PLANE], shift[PLANE];
    affine(f, b, c, C, scale, shift);
    for (long p = 0; p < n; p++)
        for (int k = 0; k < PLANE; k += LANES) {
            vec u = load(x + p * C + k) * load(scale + k) + load(shift + k);
            if (swish) u *= sigmoid(u);
            if (drop) u = (vec)((ints)(u / (real)f->keep) & kept(f, b * n + p, c + k));
            store(y + p * C + k, u);
        }
}

/* y of x [B, n, C], in room of this thread, NULL where there is none; x itself where nothing comes before. */
static const real *activated(const real *x, long B, long n, long C, const before *f) {
    if (!f->gamma) return x;
    real *y = room(1, sizeof(real) * B * n * C);
    if (!y) return NULL;
    measure(x, B, n, C, f);
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        OVER(c, C, PLANE) {
            const real *from = x + b * n * C + c;
            real *to = y + b * n * C + c;
            if (!f->swish) act(from, to, n, C, f, b, c, 0, 0);
            else if (f->keep == 1) act(from, to, n, C, f, b, c, 1, 0);
            else act(from, to, n, C, f, b, c, 1, 1);
        }
    return y;
}

/* -- the transforms ------------------------------------------------------------------------------------------------ */

#define A (real)0.75
#define B_ (real)1.5
#define AA (A * A)
#define BB (B_ * B_)

/* One dimension of B^T d, A^T m, A y, G g and G^T u; `s` from one element of what is read to the next. */
INLINE void of_input(const vec *d, vec *v, long s) {
    vec e = d[4 * s] - BB * d[2 * s], o = A * (d[3 * s] - BB * d[s]);
    vec E = d[4 * s] - AA * d[2 * s], O = B_ * (d[3 * s] - AA * d[s]);
    v[0] = d[4 * s] - (AA + BB) * d[2 * s] + AA * BB * d[0];
    v[1] = e + o, v[2] = e - o, v[3] = E + O, v[4] = E - O;
    v[5] = d[5 * s] - (AA + BB) * d[3 * s] + AA * BB * d[s];
}

INLINE void of_output(const vec *m, vec *y, long s) {
    vec a = m[s] + m[2 * s], b = m[3 * s] + m[4 * s], c = A * (m[s] - m[2 * s]), d = B_ * (m[3 * s] - m[4 * s]);
    y[0] = m[0] + a + b, y[1] = c + d, y[2] = AA * a + BB * b, y[3] = AA * c + BB * d + m[5 * s];
}

INLINE void of_gradient(const vec *y, vec *m, long s) {
    vec a = y[0] + AA * y[2 * s], b = y[0] + BB * y[2 * s];
    vec c = A * (y[s] + AA * y[3 * s]), d = B_ * (y[s] + BB * y[3 * s]);
    m[0] = y[0], m[1] = a + c, m[2] = a - c, m[3] = b + d, m[4] = b - d, m[5] = y[3 * s];
}

#define NA (1 / (2 * AA * (AA - BB)))
#define NB (1 / (2 * BB * (BB - AA)))

INLINE void of_weight(const vec *g, vec *u, long s) {
    vec a = NA * (g[0] + AA * g[2 * s]), b = NB * (g[0] + BB * g[2 * s]), c = NA * A * g[s], d = NB * B_ * g[s];
    u[0] = 1 / (AA * BB) * g[0], u[1] = a + c, u[2] = a - c, u[3] = b + d, u[4] = b - d, u[5] = g[2 * s];
}

INLINE void of_weight_gradient(const vec *u, vec *g, long s) {
    vec a = NA * (u[s] + u[2 * s]), b = NB * (u[3 * s] + u[4 * s]);
    g[0] = 1 / (AA * BB) * u[0] + a + b;
    g[1] = NA * A * (u[s] - u[2 * s]) + NB * B_ * (u[3 * s] - u[4 * s]);
    g[2] = AA * a + BB * b + u[5 * s];
}

/* How images are cut into tiles. */
typedef struct {
    long H, W, side, points, down, across, tiles; /* outputs to a tile's side; products; tiles of an image, and of all */
} geometry;

static geometry arrange(long B, long H, long W, long taps) {
    long side = taps == 1 ? 1 : OUT, down = (H + side - 1) / side, across = (W + side - 1) / side;
    return (geometry){H, W, side, taps == 1 ? 1 : SIDE * SIDE, down, across, B * down * across};
}

/* First row and column of tile t, and the pixels of the images before its own. */
INLINE void place(const geometry *g, long t, long *i, long *j, long *image) {
    *image = t / (g->down * g->across) * g->H * g->W;
    *i = t / g->across % g->down * g->side, *j = t % g->across * g->side;
}

static const real zeros[MOST]; /* as many channels as there may be */

/* Where the n x n pixels lie that begin at row i, column j of x [H, W, C]; outside it they are zeros. */
INLINE void look(const real *x, long C, const geometry *g, long i, long j, long n, const real **at) {
    for (long a = 0; a < n; a++)
        for (long b = 0; b < n; b++) {
            int inside = (unsigned long)(i + a) < (unsigned long)g->H && (unsigned long)(j + b) < (unsigned long)g->W;
            at[a * n + b] = inside ? x + ((i + a) * g->W + j + b) * C : zeros;
        }
}

/* B^T d B of tiles from..to of y [., C] to v [points][C/PLANE][rows][PLANE]; with `gradient`, A y A^T of 4x4 of it. */
static void spread(const real *y, long C, const geometry *g, long from, long to, real *v, long rows, int gradient) {
    for (long t = from; t < to; t++, v += PLANE) {
        long i, j, image;
        place(g, t, &i, &j, &image);
        const real *x = y + image * C, *at[SIDE * SIDE];
        if (g->points > 1) look(x, C, g, gradient ? i : i - 1, gradient ? j : j - 1, gradient ? OUT : SIDE, at);
        OVER(c, C, LANES) {
            real *out = v + c / PLANE * rows * PLANE + c % PLANE;
            vec d[SIDE * SIDE], half[SIDE * SIDE], done[SIDE];
            if (g->points == 1) {
                store(out, load(x + (i * g->W + j) * C + c));
                continue;
            }
            if (gradient) {
                for (int k = 0; k < OUT * OUT; k++) d[k] = load(at[k] + c);
                for (int k = 0; k < OUT; k++) of_gradient(d + OUT * k, half + SIDE * k, 1);
            } else {
                for (int k = 0; k < SIDE * SIDE; k++) d[k] = load(at[k] + c);
                for (int k = 0; k < SIDE; k++) of_input(d + SIDE * k, half + SIDE * k, 1);
            }
            for (int k = 0; k < SIDE; k++) {
                if (gradient) of_gradient(half + k, done, SIDE);
                else of_input(half + k, done, SIDE);
                for (int l = 0; l < SIDE; l++) store(out + (l * SIDE + k) * rows * C, done[l]);
            }
        }
    }
}

/* Where an output goes, and what is added to it; each but `out` may be NULL. */
typedef struct {
    const real *bias, *add, *residual; /* [O], [B, O], and as out */
    real *out;                         /* [B, H, W, O] */
    long O;
} target;

/* A^T m A of BLOCK channels from o of tiles from..to, m [points][rows][BLOCK]. */
static void gather(const real *m, long rows, const geometry *g, long from, long to, const target *f, long o) {
    for (long t = from; t < to; t++, m += BLOCK) {
        long i, j, image;
        place(g, t, &i, &j, &image);
        for (long c = 0; c < BLOCK; c += LANES) {
            vec y[OUT * OUT], half[SIDE * OUT], in[SIDE * SIDE], more = {0};
            if (g->points == 1) y[0] = load(m + c);
            else {
                for (int k = 0; k < SIDE * SIDE; k++) in[k] = load(m + k * rows * BLOCK + c);
                for (int k = 0; k < SIDE; k++) of_output(in + SIDE * k, half + OUT * k, 1);
                for (int k = 0; k < OUT; k++) {
                    vec done[OUT];
                    of_output(half + k, done, OUT);
                    for (int l = 0; l < OUT; l++) y[l * OUT + k] = done[l];
                }
            }
            if (f->bias) more += load(f->bias + o + c);
            if (f->add) more += load(f->add + image / (g->H * g->W) * f->O + o + c);
            for (long a = 0; a < g->side && i + a < g->H; a++)
                for (long b = 0; b < g->side && j + b < g->W; b++) {
                    long at = (image + (i + a) * g->W + j + b) * f->O + o + c;
                    vec sum = y[a * g->side + b] + more;
                    store(f->out + at, f->residual ? sum + load(f->residual + at) : sum);
                }
        }
    }
}

/* -- the products -------------------------------------------------------------------------------------------------- */

/* m [rows][BLOCK] (+)= v u, of v rows, `row` apart, of C channels, planes of them `plane` apart; u [C][BLOCK]. With
 * `first` m is written only. */
INLINE void multiply(const real *v, long row, long plane, const real *u, long C, real *m, int first, int rows) {
    vec sum[ROWS][2] = {{{0}}};
    for (int r = 0; r < rows && !first; r++) sum[r][0] = load(m + BLOCK * r), sum[r][1] = load(m + BLOCK * r + LANES);
    for (const real *end = u + BLOCK * C; u < end; v += plane)
        for (long c = 0; c < PLANE; c++, u += BLOCK) {
            vec low = load(u), high = load(u + LANES);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                sum[r][0] += all(v[r * row + c]) * low;
                sum[r][1] += all(v[r * row + c]) * high;
            }
        }
    for (int r = 0; r < rows; r++) store(m + BLOCK * r, sum[r][0]), store(m + BLOCK * r + LANES, sum[r][1]);
}

/* The same of any number of rows. */
static void product(const real *v, long row, long plane, const real *u, long C, real *m, int first, long rows) {
    for (; rows >= ROWS; rows -= ROWS, v += ROWS * row, m += ROWS * BLOCK)
        multiply(v, row, plane, u, C, m, first, ROWS);
    switch (rows) {
    case 5: multiply(v, row, plane, u, C, m, first, 5); break;
    case 4: multiply(v, row, plane, u, C, m, first, 4); break;
    case 3: multiply(v, row, plane, u, C, m, first, 3); break;
    case 2: multiply(v, row, plane, u, C, m, first, 2); break;
    case 1: multiply(v, row, plane, u, C, m, first, 1); break;
    }
}

/* u [36], `to` apart, of LANES times PLANE weights g [9], `from` apart: both [PLANE][BLOCK]. In one place, so that it is
 * one arithmetic. */
static __attribute__((noinline)) void transform(const real *g, long from, real *u, long to) {
    for (long c = 0; c < PLANE * BLOCK; c += LANES) {
        vec in[9], half[3 * SIDE], done[SIDE];
        for (int t = 0; t < 9; t++) in[t] = load(g + t * from + c);
        for (int k = 0; k < 3; k++) of_weight(in + 3 * k, half + SIDE * k, 1);
        for (int k = 0; k < SIDE; k++) {
            of_weight(half + k, done, SIDE);
            for (int r = 0; r < SIDE; r++) store(u + (r * SIDE + k) * to + c, done[r]);
        }
    }
}

/* Tiles for which the weights are read once. */
INLINE long chunk_of(long points) { return points == 1 ? 40 * ROWS : 4 * ROWS; }

/* How many numbers `pack` best makes of a weight for such images: its taps, or, where it is `kept` for further calls or
 * read for many tiles, all that is multiplied with. */
long packed(long B, long H, long W, long taps, long kept) {
    geometry g = arrange(B, H, W, taps);
    return kept || g.tiles > chunk_of(g.points) ? g.points : taps;
}

/* Weights in the order that `convolve` reads them in, [C/BLOCK of lanes][numbers][C][BLOCK]. A weight is at
 * w[lane, tap, c] by these steps; `lanes` and `channels` there are, what is missing to a multiple of PLANE is 0. */
static void order(const real *w, real *out, long lanes, long channels, long lane, long tap, long channel, long taps,
                  long numbers) {
    long blocks = (lanes + PLANE - 1) / PLANE * (PLANE / BLOCK), C = (channels + PLANE - 1) / PLANE * PLANE;
#pragma omp parallel for collapse(2)
    for (long o = 0; o < blocks; o++)
        OVER(start, C, PLANE) {
            real g[9 * PLANE * BLOCK], *to = out + (o * numbers * C + start) * BLOCK;
            real *at = numbers == taps ? to : g;
            long step = numbers == taps ? C * BLOCK : PLANE * BLOCK;
            for (long t = 0; t < taps; t++)
                for (long c = 0; c < PLANE; c++)
                    for (long k = 0; k < BLOCK; k++) {
                        long l = o * BLOCK + k, there = l < lanes && start + c < channels;
                        at[t * step + c * BLOCK + k] = there ? w[l * lane + t * tap + (start + c) * channel] : 0;
                    }
            if (numbers > taps) transform(g, step, to, C * BLOCK);
        }
}

/* Of weights w[o, tap, i]; `numbers` by `packed`. */
void pack(const real *w, real *out, long O, long I, long taps, long numbers) {
    order(w, out, O, I, taps * I, I, 1, taps, numbers);
}

/* The same with o and i exchanged and the taps backwards, for the gradient of the input. */
void pack_transposed(const real *w, real *out, long O, long I, long taps, long numbers) {
    order(w + (taps - 1) * I, out, I, O, 1, -I, taps * I, taps, numbers);
}

/* conv(y, w) and what is added to it; I channels of y, w as `pack` leaves it. */
static void convolve(const real *y, const real *w, long numbers, const geometry *g, long I, const target *f) {
    long points = g->points, rows = chunk_of(points), blocks = f->O / BLOCK;
    long group = points == 1 ? 1 : 4; /* blocks of channels for which the tiles are read once */
    long chunks = (g->tiles + rows - 1) / rows, threads = omp_get_max_threads(), parts = (threads + chunks - 1) / chunks;
    long late = numbers < points;
    if (parts > blocks) parts = blocks;
#pragma omp parallel
    {
        real *own = needed(2, sizeof(real) * points * (rows * I + late * PLANE * BLOCK));
        real *m = needed(3, sizeof(real) * points * rows * group * BLOCK), *u = own + points * rows * I;
#pragma omp for collapse(2) schedule(dynamic)
        for (long chunk = 0; chunk < chunks; chunk++)
            for (long part = 0; part < parts; part++) { /* more threads than chunks: they share the channels */
                long from = chunk * rows, to = from + rows < g->tiles ? from + rows : g->tiles, used = to - from;
                long last = blocks * (part + 1) / parts;
                const real *v = points == 1 ? y + from * I : own; /* a 1x1 reads y as it lies */
                long row = points == 1 ? I : PLANE, plane = points == 1 ? PLANE : used * PLANE;
                if (points > 1) spread(y, I, g, from, to, own, used, 0);
                for (long o = blocks * part / parts; o < last; o += group) {
                    long end = o + group < last ? o + group : last;
#define AT(k, q) m + (((q) - o) * points + (k)) * used * BLOCK
                    if (late)
                        for (long q = o; q < end; q++)
                            OVER(c, I, PLANE) {
                                transform(w + (q * numbers * I + c) * BLOCK, I * BLOCK, u, PLANE * BLOCK);
                                for (long k = 0; k < points; k++)
                                    product(v + (k * I + c) * used, row, plane, u + k * PLANE * BLOCK, PLANE, AT(k, q), !c, used);
                            }
                    else
                        for (long k = 0; k < points; k++)
                            for (long q = o; q < end; q++)
                                product(v + k * I * used, row, plane, w + (q * numbers + k) * I * BLOCK, I, AT(k, q), 1, used);
                    for (long q = o; q < end; q++) gather(AT(0, q), used, g, from, to, f, q * BLOCK);
                }
            }
    }
}

/* out = conv(y, w) + bias + add + residual; w as `pack` leaves it. */
int forward(const real *x, real *out, const real *w, const real *bias, const real *add, const real *residual, long B,
            long H, long W, long I, long O, long taps, long numbers, before *f) {
    geometry g = arrange(B, H, W, taps);
    target to = {bias, add, residual, out, O};
    const real *y = activated(x, B, H * W, I, f);
    if (!y) return FULL;
    convolve(y, w, numbers, &g, I, &to);
    return 0;
}

/* -- the way back -------------------------------------------------------------------------------------------------- */

/* PLANE channels of dy to du, u = norm(x), in place, with the sums s1 of du and s2 of du x; and y once more. */
INLINE void unact(real *dy, const real *x, real *y, long n, long C, const before *f, long b, long c, double *s1,
                  double *s2, int swish, int drop) {
    real scale[PLANE], shift[PLANE];
    affine(f, b, c, C, scale, shift);
    for (long from = 0; from < n; from += PART) {
        vec a1[PARTS] = {{0}}, a2[PARTS] = {{0}};
        long to = from + PART < n ? from + PART : n;
        for (long p = from; p < to; p++)
            for (int k = 0; k < PARTS; k++) {
                long at = p * C + LANES * k;
                vec v = load(x + at), u = v * load(scale + LANES * k) + load(shift + LANES * k), du = load(dy + at);
                if (swish) { /* swish' = s + u s (1 - s) */
                    vec s = sigmoid(u);
                    u *= s;
                    du *= u * (1 - s) + s;
                }
                if (drop) {
                    ints mask = kept(f, b * n + p, c + LANES * k);
                    du = (vec)((ints)(du / (real)f->keep) & mask);
                    u = (vec)((ints)(u / (real)f->keep) & mask);
                }
                a1[k] += du;
                a2[k] += du * v;
                store(dy + at, du);
                store(y + at, u);
            }
        for (int k = 0; k < PLANE; k++) s1[k] += ((real *)a1)[k], s2[k] += ((real *)a2)[k];
    }
}

/* From dy [B, n, C], the gradient of y, and x: dx in its place, y, and each image's part of dgamma and dbeta [B, C]. */
static void unnorm(real *dy, const real *x, real *y, long B, long n, long C, const before *f, real *dgamma, real *dbeta) {
    long each = C / f->groups;
    double *s1 = memset(needed(0, 16 * B * C), 0, 16 * B * C), *s2 = s1 + B * C; /* sums of du and of du x */
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        OVER(c, C, PLANE) {
            long at = b * n * C + c, sum = b * C + c;
            if (!f->swish) unact(dy + at, x + at, y + at, n, C, f, b, c, s1 + sum, s2 + sum, 0, 0);
            else if (f->keep == 1) unact(dy + at, x + at, y + at, n, C, f, b, c, s1 + sum, s2 + sum, 1, 0);
            else unact(dy + at, x + at, y + at, n, C, f, b, c, s1 + sum, s2 + sum, 1, 1);
        }
    for (long b = 0; b < B; b++) { /* now s1 and s2 of the first channel of a group: means of dxhat and dxhat xhat */
        for (long c = 0; c < C; c++) {
            long at = b * C + c, g = b * f->groups + c / each;
            dbeta[at] = s1[at];
            dgamma[at] = (s2[at] - f->mean[g] * s1[at]) * f->rstd[g];
        }
        for (long c = 0; c < C; c += each) {
            double m1 = 0, m2 = 0, count = (double)n * each;
            for (long k = c; k < c + each; k++) m1 += f->gamma[k] * dbeta[b * C + k], m2 += f->gamma[k] * dgamma[b * C + k];
            s1[b * C + c] = m1 / count, s2[b * C + c] = m2 / count;
        }
    }
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        OVER(c, C, PLANE) { /* dx = rstd (gamma du - m1 - xhat m2) */
            real by_du[PLANE], by_x[PLANE], plus[PLANE];
            for (int k = 0; k < PLANE; k++) {
                long first = (c + k) / each * each + b * C, g = b * f->groups + (c + k) / each;
                by_du[k] = f->rstd[g] * f->gamma[c + k];
                by_x[k] = -f->rstd[g] * f->rstd[g] * s2[first];
                plus[k] = -f->rstd[g] * s1[first] - by_x[k] * f->mean[g];
            }
            for (long p = 0; p < n; p++)
                for (int k = 0; k < PLANE; k += LANES) {
                    long at = (b * n + p) * C + c + k;
                    store(dy + at, load(dy + at) * load(by_du + k) + (load(x + at) * load(by_x + k) + load(plus + k)));
                }
        }
}

/* dx, y [B, H, W, I] for the gradient of the weights, per image dgamma and dbeta [B, I] and the sums of dout, dadd
 * [B, O]. Without a norm y is x and not written, and dx NULL is not wanted.
 * w: `pack` of the weights with o and i exchanged and the taps flipped. */
int backward_data(const real *dout, const real *x, real *dx, real *y, const real *w, real *dgamma, real *dbeta,
                  real *dadd, long B, long H, long W, long I, long O, long taps, long numbers, before *f) {
    geometry g = arrange(B, H, W, taps);
    long n = H * W;
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        OVER(o, O, PLANE)
            for (long from = 0; from < n; from += PART) {
                vec s[PARTS] = {{0}};
                for (long p = from; p < from + PART && p < n; p++)
                    for (int k = 0; k < PARTS; k++) s[k] += load(dout + (b * n + p) * O + o + LANES * k);
                real *to = dadd + b * O + o;
                for (int k = 0; k < PARTS; k++) store(to + LANES * k, load(to + LANES * k) + s[k]);
            }
    target to = {NULL, NULL, NULL, dx, I};
    if (dx) convolve(dout, w, numbers, &g, O, &to);
    if (f->gamma) unnorm(dx, x, y, B, n, I, f, dgamma, dbeta);
    return 0;
}

/* s [count][BLOCK] += v^T d over n tiles, rows of PLANE; rows of s are O long. With `first` s is written only. */
INLINE void accumulate(const real *v, const real *d, long n, real *s, long O, int first, int count) {
    vec sum[ROWS][2] = {{{0}}};
    for (int r = 0; r < count && !first; r++) sum[r][0] = load(s + r * O), sum[r][1] = load(s + r * O + LANES);
    for (long t = 0; t < n; t++) {
        vec low = load(d + t * PLANE), high = load(d + t * PLANE + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            sum[r][0] += all(v[t * PLANE + r]) * low;
            sum[r][1] += all(v[t * PLANE + r]) * high;
        }
    }
    for (int r = 0; r < count; r++) store(s + r * O, sum[r][0]), store(s + r * O + LANES, sum[r][1]);
}

/* dw[o, tap, i] = sum over positions p of dout[p, o] y[p + offset(tap), i]: by tiles G^T [(A dout A^T) (B^T y B)] G. */
int backward_weight(const real *dout, const real *y, real *dw, long B, long H, long W, long I, long O, long taps) {
    geometry g = arrange(B, H, W, taps);
    long points = g.points, rows = points == 1 ? 256 : 64;
    real *v = room(0, sizeof(real) * points * rows * (I + O)), *d = v + points * rows * I;
    real *s = room(1, sizeof(real) * points * I * O); /* [points][I][O] */
    if (!v || !s) return FULL;
#pragma omp parallel
    {
        for (long from = 0; from < g.tiles; from += rows) {
            long to = from + rows < g.tiles ? from + rows : g.tiles, used = to - from;
#pragma omp for schedule(dynamic)
            for (long t = from; t < to; t++) {
                spread(y, I, &g, t, t + 1, v + (t - from) * PLANE, used, 0);
                spread(dout, O, &g, t, t + 1, d + (t - from) * PLANE, used, 1);
            }
#pragma omp for collapse(2) schedule(dynamic)
            for (long k = 0; k < points; k++)
                OVER(i, I, PLANE)
                    OVER(o, O, BLOCK) {
                        const real *a = v + k * used * I + i * used, *b = d + k * used * O + o / PLANE * used * PLANE + o % PLANE;
                        real *sum = s + (k * I + i) * O + o;
                        long r = 0;
                        for (; r + ROWS <= PLANE; r += ROWS) accumulate(a + r, b, used, sum + r * O, O, !from, ROWS);
                        accumulate(a + r, b, used, sum + r * O, O, !from, PLANE % ROWS);
                    }
        }
#pragma omp for collapse(2)
        OVER(start, I, BLOCK)
            OVER(o, O, LANES)
                for (long i = start; i < start + BLOCK; i++) {
                    vec u[SIDE * SIDE], half[3 * SIDE], done[9];
                    for (long k = 0; k < points; k++) u[k] = load(s + (k * I + i) * O + o);
                    if (points == 1) done[0] = u[0];
                    else {
                        for (int k = 0; k < SIDE; k++) of_weight_gradient(u + SIDE * k, half + 3 * k, 1);
                        for (int k = 0; k < 3; k++) {
                            vec column[3];
                            of_weight_gradient(half + k, column, 3);
                            for (int l = 0; l < 3; l++) done[3 * l + k] = column[l];
                        }
                    }
                    for (long t = 0; t < taps; t++)
                        for (int l = 0; l < LANES; l++) dw[((o + l) * taps + t) * I + i] = done[t][l];
                }
    }
    return 0;
}
