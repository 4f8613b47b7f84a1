/* GroupNorm, swish, dropout and convolution in one pass, in float32 or float64 (DOUBLE) on any x86-64 with AVX2.
 *
 *     y   = dropout(swish(groupnorm(x)))      each of the three may be absent
 *     out = conv(y, w) + bias + add + residual
 *
 * Images are [B, H, W, C] with C a multiple of 32; convolutions are 3x3 (padding 1) or 1x1, of stride 1.
 *
 * A 3x3 convolution uses Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016). It computes 4x4 outputs from 6x6
 * inputs d and weights g with a quarter of the multiplications:
 *
 *     A^T [(G g G^T) * (B^T d B)] A
 *
 * Here * multiplies element by element and sums over the input channels, so it is 36 matrix products. The interpolation
 * points are 0, +-3/4, +-3/2 and infinity: the rounding error is then at most twice that of the plain sum. With the
 * usual points 0, +-1, +-2 it would be four times as large. A 1x1 convolution is the same with tiles of one pixel and
 * one product.
 *
 * G g G^T takes four times the memory of g. If the weights change with every call and few tiles use them, writing it to
 * memory would cost more than it saves, so `convolve` computes it where it is used.
 *
 * The order of sums does not depend on the batch or on the number of threads, so the result for an image depends on
 * nothing else. A value that is not finite spreads over its tile.
 */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t ints __attribute__((vector_size(32)));
enum { TERMS = 13, MANTISSA = 52, LARGE = 700 }; /* of exp: its Taylor series, float format, largest argument */
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

/* LANES: numbers in a vector. BLOCK: output channels that are computed together. ROWS: rows that `multiply` holds in
 * registers. SIDE, OUT: sides of a tile of inputs and of outputs. */
enum { LANES = 32 / sizeof(real), BLOCK = 2 * LANES, ROWS = 6, SIDE = 6, OUT = 4 };
typedef real vec __attribute__((vector_size(32)));
typedef real unaligned __attribute__((vector_size(32), aligned(sizeof(real)), may_alias));

INLINE vec load(const real *p) { return *(const unaligned *)p; }
INLINE void store(real *p, vec v) { *(unaligned *)p = v; }
INLINE vec fill(real x) { return x - (vec){0}; }

int ready(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

/* -- norm, swish, dropout ------------------------------------------------------------------------------------------ */

/* 1 / (1 + exp(-u)). exp(x) is 2^n exp(r) with |r| below 0.35, and exp(r) is a Taylor series. */
INLINE vec sigmoid(vec u) {
    static const double inverse[] = {1, 1, 1 / 2., 1 / 6., 1 / 24., 1 / 120., 1 / 720., 1 / 5040., 1 / 40320.,
                                     1 / 362880., 1 / 3628800., 1 / 39916800., 1 / 479001600., 1 / 6227020800.};
    const real integer = 1.5 * (1L << MANTISSA); /* adding it rounds a number and puts it into the low bits */
    vec x = MIN(MAX(-u, fill(-LARGE)), fill(LARGE)), n = x * (real)1.4426950408889634 + integer;
    vec p = fill(inverse[TERMS]);
    ints two = ((ints)n << MANTISSA) + (ints)fill(1); /* 2^n */
    n -= integer;
    vec r = x - n * (real)0.693359375 + n * (real)2.121944400546905827679e-4; /* ln 2 in two parts */
#pragma GCC unroll 16
    for (int k = TERMS - 1; k >= 0; k--) p = p * r + (real)inverse[k];
    return 1 / (p * (vec)two + 1);
}

/* The dropout mask of the channels from c at `position`, counted over the batch: all bits set for kept channels. */
INLINE ints keep_mask(const before *f, long position, long c) {
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
enum { PART = 64, PARTS = PLANE / LANES }; /* positions that are summed in `real`; these sums are added in double */

/* Add the sums of x and of x^2 over the n positions of an image, for PLANE channels; a position has C numbers. */
static void sums(const real *x, long n, long C, double *sum, double *square) {
    for (long from = 0; from < n; from += PART) {
        vec s[PARTS] = {{0}}, q[PARTS] = {{0}}, pivot[PARTS]; /* a value near the mean, so that few digits cancel */
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

/* Set f->mean and f->rstd of each group of each image of x [B, n, C]. */
static void measure(const real *x, long B, long n, long C, const before *f) {
    double *sum = memset(buffer_or_abort(0, 16 * B * C), 0, 16 * B * C), *square = sum + B * C;
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        OVER(c, C, PLANE) sums(x + b * n * C + c, n, C, sum + b * C + c, square + b * C + c);
    long per_group = C / f->groups;
    for (long g = 0; g < B * f->groups; g++) {
        double s = 0, q = 0, count = (double)n * per_group;
        for (long c = g * per_group; c < (g + 1) * per_group; c++) s += sum[c], q += square[c];
        double mean = s / count, variance = q / count - mean * mean;
        f->mean[g] = mean;
        f->rstd[g] = 1 / __builtin_sqrt((variance > 0 ? variance : 0) + f->eps);
    }
}

/* Compute y for PLANE channels of image b. */
INLINE void activate(const real *x, real *y, long n, long C, const before *f, long b, long c, int swish, int drop) {
    real scale[PLANE], shift[PLANE];
    affine(f, b, c, C, scale, shift);
    for (long p = 0; p < n; p++)
        for (int k = 0; k < PLANE; k += LANES) {
            vec u = load(x + p * C + k) * load(scale + k) + load(shift + k);
            if (swish) u *= sigmoid(u);
            if (drop) u = (vec)((ints)(u / (real)f->keep) & keep_mask(f, b * n + p, c + k));
            store(y + p * C + k, u);
        }
}

/* y for x [B, n, C], in a buffer of this thread; x itself without a norm; NULL if the memory is full. */
static const real *activated(const real *x, long B, long n, long C, const before *f) {
    if (!f->gamma) return x;
    real *y = thread_buffer(1, sizeof(real) * B * n * C);
    if (!y) return NULL;
    measure(x, B, n, C, f);
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        OVER(c, C, PLANE) {
            const real *from = x + b * n * C + c;
            real *to = y + b * n * C + c;
            if (!f->swish) activate(from, to, n, C, f, b, c, 0, 0);
            else if (f->keep == 1) activate(from, to, n, C, f, b, c, 1, 0);
            else activate(from, to, n, C, f, b, c, 1, 1);
        }
    return y;
}

/* -- the transforms ------------------------------------------------------------------------------------------------ */

#define A (real)0.75
#define B_ (real)1.5
#define AA (A * A)
#define BB (B_ * B_)

/* One dimension of B^T d, A^T m, A y, G g and G^T u. `s` is the distance between the elements that are read. */
INLINE void transform_input(const vec *d, vec *v, long s) {
    vec e = d[4 * s] - BB * d[2 * s], o = A * (d[3 * s] - BB * d[s]);
    vec E = d[4 * s] - AA * d[2 * s], O = B_ * (d[3 * s] - AA * d[s]);
    v[0] = d[4 * s] - (AA + BB) * d[2 * s] + AA * BB * d[0];
    v[1] = e + o, v[2] = e - o, v[3] = E + O, v[4] = E - O;
    v[5] = d[5 * s] - (AA + BB) * d[3 * s] + AA * BB * d[s];
}

INLINE void transform_output(const vec *m, vec *y, long s) {
    vec a = m[s] + m[2 * s], b = m[3 * s] + m[4 * s], c = A * (m[s] - m[2 * s]), d = B_ * (m[3 * s] - m[4 * s]);
    y[0] = m[0] + a + b, y[1] = c + d, y[2] = AA * a + BB * b, y[3] = AA * c + BB * d + m[5 * s];
}

INLINE void transform_gradient(const vec *y, vec *m, long s) {
    vec a = y[0] + AA * y[2 * s], b = y[0] + BB * y[2 * s];
    vec c = A * (y[s] + AA * y[3 * s]), d = B_ * (y[s] + BB * y[3 * s]);
    m[0] = y[0], m[1] = a + c, m[2] = a - c, m[3] = b + d, m[4] = b - d, m[5] = y[3 * s];
}

#define NA (1 / (2 * AA * (AA - BB)))
#define NB (1 / (2 * BB * (BB - AA)))

INLINE void transform_weight(const vec *g, vec *u, long s) {
    vec a = NA * (g[0] + AA * g[2 * s]), b = NB * (g[0] + BB * g[2 * s]), c = NA * A * g[s], d = NB * B_ * g[s];
    u[0] = 1 / (AA * BB) * g[0], u[1] = a + c, u[2] = a - c, u[3] = b + d, u[4] = b - d, u[5] = g[2 * s];
}

INLINE void transform_weight_gradient(const vec *u, vec *g, long s) {
    vec a = NA * (u[s] + u[2 * s]), b = NB * (u[3 * s] + u[4 * s]);
    g[0] = 1 / (AA * BB) * u[0] + a + b;
    g[1] = NA * A * (u[s] - u[2 * s]) + NB * B_ * (u[3 * s] - u[4 * s]);
    g[2] = AA * a + BB * b + u[5 * s];
}

/* How images are cut into tiles.
 *
 * side          outputs along a side of a tile
 * points        matrix products: 36, or 1 for a 1x1 convolution
 * down, across  tiles in a column and in a row of an image
 * tiles         tiles of all images */
typedef struct {
    long H, W, side, points, down, across, tiles;
} geometry;

static geometry arrange(long B, long H, long W, long taps) {
    long side = taps == 1 ? 1 : OUT, down = (H + side - 1) / side, across = (W + side - 1) / side;
    return (geometry){H, W, side, taps == 1 ? 1 : SIDE * SIDE, down, across, B * down * across};
}

/* The first row i and column j of tile t, and the index of the first pixel of its image. */
INLINE void tile_origin(const geometry *g, long t, long *i, long *j, long *image) {
    *image = t / (g->down * g->across) * g->H * g->W;
    *i = t / g->across % g->down * g->side, *j = t % g->across * g->side;
}

static const real zeros[MOST];

/* Pointers to the n x n pixels from row i, column j of x [H, W, C]; pixels outside the image point to zeros. */
INLINE void pixel_pointers(const real *x, long C, const geometry *g, long i, long j, long n, const real **at) {
    for (long a = 0; a < n; a++)
        for (long b = 0; b < n; b++) {
            int inside = (unsigned long)(i + a) < (unsigned long)g->H && (unsigned long)(j + b) < (unsigned long)g->W;
            at[a * n + b] = inside ? x + ((i + a) * g->W + j + b) * C : zeros;
        }
}

/* Write B^T d B of tiles from..to of y to v [points][C/PLANE][rows][PLANE]; with `gradient`, A y A^T of 4x4 tiles. */
static void transform_tiles(const real *y, long C, const geometry *g, long from, long to, real *v, long rows,
                            int gradient) {
    for (long t = from; t < to; t++, v += PLANE) {
        long i, j, image;
        tile_origin(g, t, &i, &j, &image);
        const real *x = y + image * C, *at[SIDE * SIDE];
        if (g->points > 1)
            pixel_pointers(x, C, g, gradient ? i : i - 1, gradient ? j : j - 1, gradient ? OUT : SIDE, at);
        OVER(c, C, LANES) {
            real *out = v + c / PLANE * rows * PLANE + c % PLANE;
            vec d[SIDE * SIDE], half[SIDE * SIDE], result[SIDE];
            if (g->points == 1) {
                store(out, load(x + (i * g->W + j) * C + c));
                continue;
            }
            if (gradient) {
                for (int k = 0; k < OUT * OUT; k++) d[k] = load(at[k] + c);
                for (int k = 0; k < OUT; k++) transform_gradient(d + OUT * k, half + SIDE * k, 1);
            } else {
                for (int k = 0; k < SIDE * SIDE; k++) d[k] = load(at[k] + c);
                for (int k = 0; k < SIDE; k++) transform_input(d + SIDE * k, half + SIDE * k, 1);
            }
            for (int k = 0; k < SIDE; k++) {
                if (gradient) transform_gradient(half + k, result, SIDE);
                else transform_input(half + k, result, SIDE);
                for (int l = 0; l < SIDE; l++) store(out + (l * SIDE + k) * rows * C, result[l]);
            }
        }
    }
}

/* The output of a convolution and what is added to it. Each pointer but `out` may be NULL. */
typedef struct {
    const real *bias, *add, *residual; /* [O], [B, O], [B, H, W, O] */
    real *out;                         /* [B, H, W, O] */
    long O;
} target;

/* Write A^T m A of tiles from..to to BLOCK output channels from o; m is [points][rows][BLOCK]. */
static void write_tiles(const real *m, long rows, const geometry *g, long from, long to, const target *f, long o) {
    for (long t = from; t < to; t++, m += BLOCK) {
        long i, j, image;
        tile_origin(g, t, &i, &j, &image);
        for (long c = 0; c < BLOCK; c += LANES) {
            vec y[OUT * OUT], half[SIDE * OUT], in[SIDE * SIDE], added = {0};
            if (g->points == 1) y[0] = load(m + c);
            else {
                for (int k = 0; k < SIDE * SIDE; k++) in[k] = load(m + k * rows * BLOCK + c);
                for (int k = 0; k < SIDE; k++) transform_output(in + SIDE * k, half + OUT * k, 1);
                for (int k = 0; k < OUT; k++) {
                    vec result[OUT];
                    transform_output(half + k, result, OUT);
                    for (int l = 0; l < OUT; l++) y[l * OUT + k] = result[l];
                }
            }
            if (f->bias) added += load(f->bias + o + c);
            if (f->add) added += load(f->add + image / (g->H * g->W) * f->O + o + c);
            for (long a = 0; a < g->side && i + a < g->H; a++)
                for (long b = 0; b < g->side && j + b < g->W; b++) {
                    long at = (image + (i + a) * g->W + j + b) * f->O + o + c;
                    vec sum = y[a * g->side + b] + added;
                    store(f->out + at, f->residual ? sum + load(f->residual + at) : sum);
                }
        }
    }
}

/* -- the products -------------------------------------------------------------------------------------------------- */

/* m [rows][BLOCK] += v u, where v has `rows` rows of C channels and u is [C][BLOCK]. With `first`, m = v u. `row` is
 * the distance between two rows of v, and `plane` the distance between two planes of channels. */
INLINE void multiply(const real *v, long row, long plane, const real *u, long C, real *m, int first, int rows) {
    vec sum[ROWS][2] = {{{0}}};
    for (int r = 0; r < rows && !first; r++) sum[r][0] = load(m + BLOCK * r), sum[r][1] = load(m + BLOCK * r + LANES);
    for (const real *end = u + BLOCK * C; u < end; v += plane)
        for (long c = 0; c < PLANE; c++, u += BLOCK) {
            vec low = load(u), high = load(u + LANES);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                sum[r][0] += fill(v[r * row + c]) * low;
                sum[r][1] += fill(v[r * row + c]) * high;
            }
        }
    for (int r = 0; r < rows; r++) store(m + BLOCK * r, sum[r][0]), store(m + BLOCK * r + LANES, sum[r][1]);
}

/* `multiply` for any number of rows. */
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

/* Write u = G g G^T for the weights g of PLANE inputs and BLOCK outputs: 9 arrays [PLANE][BLOCK] with distance `from`
 * become 36 arrays with distance `to`. Not inlined, so that every caller gets the same bits. */
static __attribute__((noinline)) void transform_weights(const real *g, long from, real *u, long to) {
    for (long c = 0; c < PLANE * BLOCK; c += LANES) {
        vec in[9], half[3 * SIDE], result[SIDE];
        for (int t = 0; t < 9; t++) in[t] = load(g + t * from + c);
        for (int k = 0; k < 3; k++) transform_weight(in + 3 * k, half + SIDE * k, 1);
        for (int k = 0; k < SIDE; k++) {
            transform_weight(half + k, result, SIDE);
            for (int r = 0; r < SIDE; r++) store(u + (r * SIDE + k) * to + c, result[r]);
        }
    }
}

/* The number of tiles that are processed together, so that the weights are read once for all of them. */
INLINE long chunk_of(long points) { return points == 1 ? 40 * ROWS : 4 * ROWS; }

/* How many numbers `pack` writes for a weight [3, 3] or [1, 1]. It is the number of points (G g G^T) if the packed
 * weights are `kept` for further calls or are read for many tiles, and otherwise the number of taps (g). */
long packed(long B, long H, long W, long taps, long kept) {
    geometry g = arrange(B, H, W, taps);
    return kept || g.tiles > chunk_of(g.points) ? g.points : taps;
}

/* Write weights in the order in which `convolve` reads them, [outputs/BLOCK][numbers][inputs][BLOCK]. w holds weights
 * for `outputs` x `inputs` channels; `output`, `tap` and `input` are the distances between neighbours in w. Both
 * numbers of channels are filled up with zeros to a multiple of PLANE. */
static void pack_blocks(const real *w, real *out, long outputs, long inputs, long output, long tap, long input,
                        long taps, long numbers) {
    long blocks = (outputs + PLANE - 1) / PLANE * (PLANE / BLOCK), C = (inputs + PLANE - 1) / PLANE * PLANE;
#pragma omp parallel for collapse(2)
    for (long o = 0; o < blocks; o++)
        OVER(first_c, C, PLANE) {
            real g[9 * PLANE * BLOCK], *to = out + (o * numbers * C + first_c) * BLOCK;
            real *at = numbers == taps ? to : g;
            long step = numbers == taps ? C * BLOCK : PLANE * BLOCK;
            for (long t = 0; t < taps; t++)
                for (long c = 0; c < PLANE; c++)
                    for (long k = 0; k < BLOCK; k++) {
                        long l = o * BLOCK + k, exists = l < outputs && first_c + c < inputs;
                        at[t * step + c * BLOCK + k] = exists ? w[l * output + t * tap + (first_c + c) * input] : 0;
                    }
            if (numbers > taps) transform_weights(g, step, to, C * BLOCK);
        }
}

/* Pack weights w[o, tap, i]; `numbers` is the result of `packed`. */
void pack(const real *w, real *out, long O, long I, long taps, long numbers) {
    pack_blocks(w, out, O, I, taps * I, I, 1, taps, numbers);
}

/* Pack the same weights with o and i exchanged and the taps reversed, for the gradient of the input. */
void pack_transposed(const real *w, real *out, long O, long I, long taps, long numbers) {
    pack_blocks(w + (taps - 1) * I, out, I, O, 1, -I, taps * I, taps, numbers);
}

/* Write conv(y, w) and what is added to it. y has I channels, and w is packed by `pack`. */
static void convolve(const real *y, const real *w, long numbers, const geometry *g, long I, const target *f) {
    long points = g->points, rows = chunk_of(points), blocks = f->O / BLOCK;
    long group = points == 1 ? 1 : 4; /* blocks of output channels that share one reading of the tiles */
    long chunks = (g->tiles + rows - 1) / rows, threads = omp_get_max_threads();
    long parts = (threads + chunks - 1) / chunks;
    long transform_here = numbers < points; /* whether w holds g, which is transformed here */
    if (parts > blocks) parts = blocks;
#pragma omp parallel
    {
        real *buffer = buffer_or_abort(2, sizeof(real) * points * (rows * I + transform_here * PLANE * BLOCK));
        real *m = buffer_or_abort(3, sizeof(real) * points * rows * group * BLOCK), *u = buffer + points * rows * I;
#pragma omp for collapse(2) schedule(dynamic)
        for (long chunk = 0; chunk < chunks; chunk++)
            for (long part = 0; part < parts; part++) { /* more threads than chunks share the output channels */
                long from = chunk * rows, to = from + rows < g->tiles ? from + rows : g->tiles, tiles = to - from;
                long last = blocks * (part + 1) / parts;
                const real *v = points == 1 ? y + from * I : buffer; /* a 1x1 convolution reads y directly */
                long row = points == 1 ? I : PLANE, plane = points == 1 ? PLANE : tiles * PLANE;
                if (points > 1) transform_tiles(y, I, g, from, to, buffer, tiles, 0);
                for (long o = blocks * part / parts; o < last; o += group) {
                    long end = o + group < last ? o + group : last;
#define AT(k, q) m + (((q) - o) * points + (k)) * tiles * BLOCK
                    if (transform_here)
                        for (long q = o; q < end; q++)
                            OVER(c, I, PLANE) {
                                transform_weights(w + (q * numbers * I + c) * BLOCK, I * BLOCK, u, PLANE * BLOCK);
                                for (long k = 0; k < points; k++)
                                    product(v + (k * I + c) * tiles, row, plane, u + k * PLANE * BLOCK, PLANE,
                                            AT(k, q), !c, tiles);
                            }
                    else
                        for (long k = 0; k < points; k++)
                            for (long q = o; q < end; q++)
                                product(v + k * I * tiles, row, plane, w + (q * numbers + k) * I * BLOCK, I, AT(k, q),
                                        1, tiles);
                    for (long q = o; q < end; q++) write_tiles(AT(0, q), tiles, g, from, to, f, q * BLOCK);
                }
            }
    }
}

/* out = conv(y, w) + bias + add + residual, where w is packed by `pack`. */
int forward(const real *x, real *out, const real *w, const real *bias, const real *add, const real *residual, long B,
            long H, long W, long I, long O, long taps, long numbers, before *f) {
    geometry g = arrange(B, H, W, taps);
    target to = {bias, add, residual, out, O};
    const real *y = activated(x, B, H * W, I, f);
    if (!y) return give_back(OUT_OF_MEMORY);
    convolve(y, w, numbers, &g, I, &to);
    return give_back(0);
}

/* -- gradients ----------------------------------------------------------------------------------------------------- */

/* Turn the gradient dy of PLANE channels into du in place, where u = norm(x). Add the sums of du to s1 and of du x to
 * s2, and compute y again. */
INLINE void activate_backward(real *dy, const real *x, real *y, long n, long C, const before *f, long b, long c,
                              double *s1, double *s2, int swish, int drop) {
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
                    ints mask = keep_mask(f, b * n + p, c + LANES * k);
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

/* Turn dy [B, n, C], the gradient of y, into dx in place. Also write y, and dgamma and dbeta of each image [B, C]. */
static void norm_backward(real *dy, const real *x, real *y, long B, long n, long C, const before *f, real *dgamma,
                          real *dbeta) {
    long per_group = C / f->groups;
    double *s1 = memset(buffer_or_abort(0, 16 * B * C), 0, 16 * B * C), *s2 = s1 + B * C; /* sums of du and of du x */
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        OVER(c, C, PLANE) {
            long at = b * n * C + c, sum = b * C + c;
            if (!f->swish) activate_backward(dy + at, x + at, y + at, n, C, f, b, c, s1 + sum, s2 + sum, 0, 0);
            else if (f->keep == 1) activate_backward(dy + at, x + at, y + at, n, C, f, b, c, s1 + sum, s2 + sum, 1, 0);
            else activate_backward(dy + at, x + at, y + at, n, C, f, b, c, s1 + sum, s2 + sum, 1, 1);
        }
    for (long b = 0; b < B; b++) { /* s1 and s2 of a group's first channel become means of dxhat and dxhat xhat */
        for (long c = 0; c < C; c++) {
            long at = b * C + c, g = b * f->groups + c / per_group;
            dbeta[at] = s1[at];
            dgamma[at] = (s2[at] - f->mean[g] * s1[at]) * f->rstd[g];
        }
        for (long c = 0; c < C; c += per_group) {
            double m1 = 0, m2 = 0, count = (double)n * per_group;
            for (long k = c; k < c + per_group; k++)
                m1 += f->gamma[k] * dbeta[b * C + k], m2 += f->gamma[k] * dgamma[b * C + k];
            s1[b * C + c] = m1 / count, s2[b * C + c] = m2 / count;
        }
    }
#pragma omp parallel for collapse(2)
    for (long b = 0; b < B; b++)
        OVER(c, C, PLANE) { /* dx = rstd (gamma du - m1 - xhat m2) */
            real factor_du[PLANE], factor_x[PLANE], constant[PLANE];
            for (int k = 0; k < PLANE; k++) {
                long first = (c + k) / per_group * per_group + b * C, g = b * f->groups + (c + k) / per_group;
                factor_du[k] = f->rstd[g] * f->gamma[c + k];
                factor_x[k] = -f->rstd[g] * f->rstd[g] * s2[first];
                constant[k] = -f->rstd[g] * s1[first] - factor_x[k] * f->mean[g];
            }
            for (long p = 0; p < n; p++)
                for (int k = 0; k < PLANE; k += LANES) {
                    long at = (b * n + p) * C + c + k;
                    store(dy + at, load(dy + at) * load(factor_du + k) +
                                       (load(x + at) * load(factor_x + k) + load(constant + k)));
                }
        }
}

/* Write dx; y [B, H, W, I], for the gradient of the weights; dgamma and dbeta of each image [B, I]; and dadd [B, O],
 * the sums of dout over positions. Without a norm y is x and is not written. dx may be NULL if it is not needed. w is
 * packed by `pack_transposed`. */
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
    if (f->gamma) norm_backward(dx, x, y, B, n, I, f, dgamma, dbeta);
    return give_back(0);
}

/* s [count][BLOCK] += v^T d over n tiles, where v and d have PLANE numbers per tile. The distance between two rows of s
 * is O. With `first`, s = v^T d. */
INLINE void accumulate(const real *v, const real *d, long n, real *s, long O, int first, int count) {
    vec sum[ROWS][2] = {{{0}}};
    for (int r = 0; r < count && !first; r++) sum[r][0] = load(s + r * O), sum[r][1] = load(s + r * O + LANES);
    for (long t = 0; t < n; t++) {
        vec low = load(d + t * PLANE), high = load(d + t * PLANE + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            sum[r][0] += fill(v[t * PLANE + r]) * low;
            sum[r][1] += fill(v[t * PLANE + r]) * high;
        }
    }
    for (int r = 0; r < count; r++) store(s + r * O, sum[r][0]), store(s + r * O + LANES, sum[r][1]);
}

/* dw[o, tap, i] = sum over positions p of dout[p, o] y[p + offset(tap), i]. It is the sum over tiles of
 * G^T [(A dout A^T) * (B^T y B)] G. */
int backward_weight(const real *dout, const real *y, real *dw, long B, long H, long W, long I, long O, long taps) {
    geometry g = arrange(B, H, W, taps);
    long points = g.points, rows = points == 1 ? 256 : 64;
    real *v = thread_buffer(0, sizeof(real) * points * rows * (I + O)), *d = v + points * rows * I;
    real *s = thread_buffer(1, sizeof(real) * points * I * O); /* [points][I][O] */
    if (!v || !s) return give_back(OUT_OF_MEMORY);
#pragma omp parallel
    {
        for (long from = 0; from < g.tiles; from += rows) {
            long to = from + rows < g.tiles ? from + rows : g.tiles, tiles = to - from;
#pragma omp for schedule(dynamic)
            for (long t = from; t < to; t++) {
                transform_tiles(y, I, &g, t, t + 1, v + (t - from) * PLANE, tiles, 0);
                transform_tiles(dout, O, &g, t, t + 1, d + (t - from) * PLANE, tiles, 1);
            }
#pragma omp for collapse(2) schedule(dynamic)
            for (long k = 0; k < points; k++)
                OVER(i, I, PLANE)
                    OVER(o, O, BLOCK) {
                        const real *a = v + k * tiles * I + i * tiles;
                        const real *b = d + k * tiles * O + o / PLANE * tiles * PLANE + o % PLANE;
                        real *sum = s + (k * I + i) * O + o;
                        long r = 0;
                        for (; r + ROWS <= PLANE; r += ROWS) accumulate(a + r, b, tiles, sum + r * O, O, !from, ROWS);
                        accumulate(a + r, b, tiles, sum + r * O, O, !from, PLANE % ROWS);
                    }
        }
#pragma omp for collapse(2)
        OVER(first_c, I, BLOCK)
            OVER(o, O, LANES)
                for (long i = first_c; i < first_c + BLOCK; i++) {
                    vec u[SIDE * SIDE], half[3 * SIDE], result[9];
                    for (long k = 0; k < points; k++) u[k] = load(s + (k * I + i) * O + o);
                    if (points == 1) result[0] = u[0];
                    else {
                        for (int k = 0; k < SIDE; k++) transform_weight_gradient(u + SIDE * k, half + 3 * k, 1);
                        for (int k = 0; k < 3; k++) {
                            vec column[3];
                            transform_weight_gradient(half + k, column, 3);
                            for (int l = 0; l < 3; l++) result[3 * l + k] = column[l];
                        }
                    }
                    for (long t = 0; t < taps; t++)
                        for (int l = 0; l < LANES; l++) dw[((o + l) * taps + t) * I + i] = result[t][l];
                }
    }
    return give_back(0);
}
