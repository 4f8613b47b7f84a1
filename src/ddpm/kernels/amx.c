/* GroupNorm, swish, dropout and convolution in one pass, in bfloat16 on the AMX tiles of x86-64.
 *
 *     y   = dropout(swish(groupnorm(x)))      each of the three may be absent
 *     out = conv(y, w) + bias + add + residual
 *
 * Images are [B, H, W, C] with C a multiple of 32; convolutions are 3x3 (padding 1) or 1x1, of stride 1.
 *
 * y is written into a padded buffer, `flat`. In it a row of an image has W + 1 positions, of which the last is zero,
 * and a row of zeros follows each image. So a tap of position p is at p + offset(tap), for all images one after another,
 * and a convolution is the matrix product
 *
 *     out[p, o] = sum over taps and i of flat[p + offset(tap), i] w[tap, i, o]
 *
 * Channels are stored in planes of 32, [C/32][position][32], so 16 positions of a plane are one tile of 1 KiB. The
 * order of sums does not depend on the batch or on the number of threads, so the result for an image depends on nothing
 * else.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;
typedef float real;
#include "common.h"

enum { REQUEST = 0x1023, TILE_DATA = 18 };

/* Ask the operating system for permission to use the tiles. Returns 0 if there are none. */
int ready(void) { return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0; }

/* Configure all eight tiles as 16 rows of 64 bytes. */
static void configure_tiles(void) {
    static const struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
}

/* GCC does not know that tile loads and stores touch memory. The barrier keeps it from moving other accesses across
 * them. */
#define MEMORY_BARRIER __asm__ volatile("" ::: "memory")

static inline __m512 load(const bf16 *p) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}

static inline void store(bf16 *p, __m512 low, __m512 high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* 1 / (1 + exp(-u)) with an error of 1e-4, far below the resolution of bfloat16. */
static inline __m512 sigmoid(__m512 u) {
    __m512 x = _mm512_mul_ps(u, _mm512_set1_ps(-1.44269504f)), n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(5.5825e-2f); /* 2^r on [-1/2, 1/2] */
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.242614f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693127f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.999964f));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_scalef_ps(p, n), _mm512_set1_ps(1)));
}

static const before nothing;

/* The dropout mask of the 16 channels from c at `position`, which counts over the batch: 1 if the channel is kept. */
static inline __mmask16 dropout_mask(const before *f, long position, long c) {
    uint64_t h = (f->seed + (uint64_t)position) * 0x9E3779B97F4A7C15u;
    h ^= h >> 32;
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i x = _mm512_add_epi32(_mm512_set1_epi32((int)h), _mm512_mullo_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(c)),
                                                                              _mm512_set1_epi32(0x9E3779B9)));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7FEB352D));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(0x846CA68B));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    return _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32((int)(uint32_t)(f->keep * 4294967040.0)));
}

#define OVER_PLANES(c, C) for (long c = 0; c < (C); c += PLANE)
enum { PART = 1024 }; /* positions that are summed in float32; these sums are added in double */

/* Set f->mean and f->rstd of each group of image b, whose x is [n, C]. */
static void measure(const bf16 *x, long n, long C, const before *f, long b) {
    double sum[MOST_GROUPS] = {0}, square[MOST_GROUPS] = {0};
    long each = C / f->groups;
    OVER_PLANES(c, C)
        for (long from = 0; from < n; from += PART) {
            __m512 s[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, q[2] = {s[0], s[0]};
            __m512 pivot[2] = {load(x + c), load(x + c + 16)}; /* a value near the mean, so that few digits cancel */
            long to = from + PART < n ? from + PART : n;
            for (long p = from; p < to; p++)
                for (int k = 0; k < 2; k++) {
                    __m512 v = _mm512_sub_ps(load(x + p * C + c + 16 * k), pivot[k]);
                    s[k] = _mm512_add_ps(s[k], v);
                    q[k] = _mm512_fmadd_ps(v, v, q[k]);
                }
            for (int k = 0; k < PLANE; k++) {
                double a = ((float *)pivot)[k], part = ((float *)s)[k], count = to - from;
                sum[(c + k) / each] += part + count * a;
                square[(c + k) / each] += ((float *)q)[k] + 2 * a * part + count * a * a;
            }
        }
    for (long g = 0; g < f->groups; g++) {
        double count = (double)n * each, mean = sum[g] / count, variance = square[g] / count - mean * mean;
        f->mean[b * f->groups + g] = mean;
        f->rstd[b * f->groups + g] = 1 / __builtin_sqrt((variance > 0 ? variance : 0) + f->eps);
    }
}

/* How the positions of a group of images lie in `flat`, and the tiles of 16 positions that cover them. */
typedef struct {
    long B, H, W, images, groups; /* `images` per group; the last group may have fewer */
    long row, image, size;        /* positions of a row, of an image, and of `flat` */
    long tiles, *start;           /* first position of each tile; the number of tiles is even */
    int *pixel;                   /* the pixel of the group at each position, or -1 for padding */
} geometry;

static geometry arrange(long B, long H, long W) {
    geometry g = {.B = B, .H = H, .W = W, .row = W + 1, .image = (H + 1) * (W + 1)};
    long threads = omp_get_max_threads(), most = (B + threads - 1) / threads, wanted = 256 / (H * W);
    g.images = wanted < 1 ? 1 : wanted > most ? most : wanted;
    g.groups = (B + g.images - 1) / g.images;
    long all = g.images * g.image;
    g.size = g.row + 1 + all + PLANE + g.row + 1; /* zeros on both sides for the taps, and a last tile */
    g.start = malloc(sizeof(long) * (all / 16 + 2));
    if (W % 16 == 0) { /* no tile contains padding */
        for (long i = 0; i < g.images * H; i++)
            for (long j = 0; j < W; j += 16) g.start[g.tiles++] = i / H * g.image + i % H * g.row + j;
    } else
        for (long p = 0; p < all; p += 16) g.start[g.tiles++] = p;
    if (g.tiles % 2) g.start[g.tiles] = g.start[g.tiles - 1], g.tiles++;
    g.pixel = malloc(sizeof(int) * (all + PLANE));
    for (long p = 0; p < all + PLANE; p++) {
        long n = p / g.image, i = p % g.image / g.row, j = p % g.image % g.row;
        g.pixel[p] = n < g.images && i < H && j < W ? (n * H + i) * W + j : -1;
    }
    return g;
}

static void free_geometry(geometry g) { free(g.start), free(g.pixel); }

/* The offset of each tap from its position, in numbers of a plane. */
static void taps_of(const geometry *g, long taps, long *offset) {
    for (long t = 0; t < taps; t++) offset[t] = taps == 1 ? 0 : ((t / 3 - 1) * g->row + t % 3 - 1) * PLANE;
}

/* Compute a plane of y for image b, whose x is [H W, C], and write it into `flat`. */
INLINE void fill_plane(const bf16 *x, bf16 *plane, const geometry *g, long C, const before *f, long b, long c,
                      const float *scale, const float *shift, int swish, int drop) {
    __m512 by[2] = {_mm512_load_ps(scale), _mm512_load_ps(scale + 16)};
    __m512 plus[2] = {_mm512_load_ps(shift), _mm512_load_ps(shift + 16)}, keep = _mm512_set1_ps(1 / f->keep);
    for (long i = 0; i < g->H; i++)
#pragma GCC unroll 4
        for (long j = 0; j < g->W; j++) {
            long p = i * g->W + j;
            __m512 y[2];
            for (int k = 0; k < 2; k++) {
                y[k] = _mm512_fmadd_ps(load(x + p * C + c + 16 * k), by[k], plus[k]);
                if (swish) y[k] = _mm512_mul_ps(y[k], sigmoid(y[k]));
                if (drop) y[k] = _mm512_maskz_mul_ps(dropout_mask(f, b * g->H * g->W + p, c + 16 * k), y[k], keep);
            }
            store(plane + (i * g->row + j) * PLANE, y[0], y[1]);
        }
}

/* The index after the last image of group u. */
static long end_of(const geometry *g, long u) { return (u + 1) * g->images < g->B ? (u + 1) * g->images : g->B; }

/* Write y of the images of group u, from x [B, H W, C], into planes of g->size positions whose padding is already 0. */
static void fill_planes(const bf16 *x, bf16 *start, const geometry *g, long C, const before *f, long u) {
    for (long b = u * g->images; b < end_of(g, u); b++)
        OVER_PLANES(c, C) {
            const bf16 *from = x + b * g->H * g->W * C;
            bf16 *plane = start + (b - u * g->images) * g->image * PLANE + c * g->size;
            float scale[PLANE] __attribute__((aligned(64))), shift[PLANE] __attribute__((aligned(64)));
            if (f->gamma) affine(f, b, c, C, scale, shift);
            if (!f->gamma)
                for (long i = 0; i < g->H; i++)
                    for (long j = 0; j < g->W; j++)
                        _mm512_storeu_si512(plane + (i * g->row + j) * PLANE,
                                            _mm512_loadu_si512(from + (i * g->W + j) * C + c));
            else if (!f->swish) fill_plane(from, plane, g, C, f, b, c, scale, shift, 0, 0);
            else if (f->keep == 1) fill_plane(from, plane, g, C, f, b, c, scale, shift, 1, 0);
            else fill_plane(from, plane, g, C, f, b, c, scale, shift, 1, 1);
        }
}

/* A block of the product, 32 positions x 32 channels, and the place in the output that it is written to. */
typedef struct {
    float sum[32 * PLANE];
    const int *pixel[2];
    const float *bias, *add; /* bias [32] of these channels, add [images, channels]; or NULL */
    const bf16 *residual;
    bf16 *out;
    long channels, pixels, image; /* channels of out; pixels of the group and of an image */
} __attribute__((aligned(64))) block;

/* Add bias, add and residual to row r of a block, and write it to its pixel. */
static inline void write_row(const block *d, long r) {
    long p = d->pixel[r / 16][r % 16];
    if ((unsigned long)p >= (unsigned long)d->pixels) return;
    __m512 low = _mm512_load_ps(d->sum + r * PLANE), high = _mm512_load_ps(d->sum + r * PLANE + 16);
    if (d->bias) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(d->bias));
        high = _mm512_add_ps(high, _mm512_loadu_ps(d->bias + 16));
    }
    if (d->add) {
        const float *add = d->add + p / d->image * d->channels;
        low = _mm512_add_ps(low, _mm512_loadu_ps(add));
        high = _mm512_add_ps(high, _mm512_loadu_ps(add + 16));
    }
    if (d->residual) {
        low = _mm512_add_ps(low, load(d->residual + p * d->channels));
        high = _mm512_add_ps(high, load(d->residual + p * d->channels + 16));
    }
    store(d->out + p * d->channels, low, high);
}

/* Multiply 32 positions of C channels by 32 output channels of w. Meanwhile, finish the rows of the block `last`, so
 * that vector instructions run between those of the tiles. */
static void multiply(const bf16 *a0, const bf16 *a1, long C, long plane, const bf16 *w, const long *offset, long taps,
                     block *now, const block *last) {
    long each = (32 * PLANE + C * taps - 1) / (C * taps), row = last ? 0 : 32;
    MEMORY_BARRIER;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long c = 0; c < C; c += PLANE, a0 += plane, a1 += plane)
        for (long t = 0; t < taps; t++, w += 1024) {
            _tile_loadd(6, w, 64);
            _tile_loadd(4, a0 + offset[t], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w + 512, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a1 + offset[t], 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            for (long i = 0; i < each && row < 32; i++) write_row(last, row++);
        }
    _tile_stored(0, now->sum, 128); _tile_stored(1, now->sum + 16, 128);
    _tile_stored(2, now->sum + 512, 128); _tile_stored(3, now->sum + 528, 128);
    MEMORY_BARRIER;
}

/* How many numbers `pack` writes for a weight. In winograd.c it may be more than the taps. */
long packed(long B, long H, long W, long taps, long kept) { return taps; }

/* Write weights w[o, tap, i] in the order in which `multiply` reads them,
 * [O/32][I/32][taps][2][16 pairs of i][16 o][2]. O and I are filled up with zeros to multiples of 32. */
void pack(const float *w, bf16 *out, long O, long I, long taps, long numbers) {
    __m512i down = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                      _mm512_set1_epi32(64));
    long planes = (I + 31) / 32;
#pragma omp parallel for
    for (long o = 0; o < (O + 31) / 32 * 32; o++)
        for (long c = 0; c < planes; c++)
            for (long t = 0; t < taps; t++) {
                const float *row = w + (o * taps + t) * I + 32 * c;
                long count = o < O ? I - 32 * c : 0;
                __m512 low = _mm512_maskz_loadu_ps(count < 16 ? (1 << count) - 1 : 0xffff, row);
                __m512 high = _mm512_maskz_loadu_ps(count < 17 ? 0 : count < 32 ? (1 << (count - 16)) - 1 : 0xffff, row + 16);
                bf16 *to = out + ((o / 32 * planes + c) * taps + t) * 1024 + o % 32 / 16 * 512 + o % 16 * 2;
                _mm512_i32scatter_epi32(to, down, (__m512i)_mm512_cvtne2ps_pbh(high, low), 1);
            }
}

/* Pack the same weights with o and i exchanged and the taps reversed, for the gradient of the input. */
void pack_transposed(const float *w, bf16 *out, long O, long I, long taps, long numbers) {
    long planes = (O + 31) / 32;
#pragma omp parallel for
    for (long c = 0; c < planes; c++)
        for (long t = 0; t < taps; t++)
            for (long i = 0; i < (I + 31) / 32 * 32; i += 16)
                for (long o = 32 * c; o < 32 * c + 32; o += 2) {
                    __m256i two[2];
                    for (long k = 0; k < 2; k++) {
                        long count = o + k < O ? I - i : 0;
                        __mmask16 mask = count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0;
                        two[k] = (__m256i)_mm512_cvtneps_pbh(
                            _mm512_maskz_loadu_ps(mask, w + ((o + k) * taps + taps - 1 - t) * I + i));
                    }
                    bf16 *to = out + ((i / 32 * planes + c) * taps + t) * 1024 + i % 32 / 16 * 512 + o % 32 / 2 * 32;
                    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(two[0]),
                                                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(two[1]), 16)));
                }
}

/* Compute the output channels from..to of the pixels of group u, whose y is in flat. */
static void convolve(const bf16 *flat, const geometry *g, long u, const bf16 *w, long I, long O, long from, long to,
                     const long *offset, long taps, const float *bias, const float *add, const bf16 *residual, bf16 *out) {
    long n = g->H * g->W, count = (end_of(g, u) - u * g->images) * n;
    block blocks[2], *last = NULL;
    for (long o = from; o < to; o += 32)
        for (long m = 0; m < g->tiles; m += 2) {
            block *now = last == blocks ? blocks + 1 : blocks;
            now->pixel[0] = g->pixel + g->start[m], now->pixel[1] = g->pixel + g->start[m + 1];
            now->bias = bias ? bias + o : NULL, now->add = add ? add + u * g->images * O + o : NULL;
            now->residual = residual ? residual + o : NULL, now->out = out + o;
            now->channels = O, now->pixels = count, now->image = n;
            multiply(flat + g->start[m] * PLANE, flat + g->start[m + 1] * PLANE, I, g->size * PLANE, w + o * I * taps,
                     offset, taps, now, last);
            last = now;
        }
    for (long r = 0; r < 32; r++) write_row(last, r);
}

/* out = conv(y, w) + bias + add + residual, where w is packed by `pack`. */
int forward(const bf16 *x, bf16 *out, const bf16 *w, const float *bias, const float *add, const bf16 *residual, long B,
            long H, long W, long I, long O, long taps, long numbers, before *f) {
    geometry g = arrange(B, H, W);
    long offset[9], threads = omp_get_max_threads(), parts = (threads + g.groups - 1) / g.groups, blocks = O / 32;
    if (parts > blocks) parts = blocks;
    taps_of(&g, taps, offset);
    if (f->gamma) {
#pragma omp parallel for
        for (long b = 0; b < B; b++) measure(x + b * H * W * I, H * W, I, f, b);
    }
#pragma omp parallel
    {
        configure_tiles();
        bf16 *flat = memset(buffer_or_abort(0, g.size * I * 2), 0, g.size * I * 2);
#pragma omp for collapse(2) schedule(dynamic)
        for (long u = 0; u < g.groups; u++)
            for (long part = 0; part < parts; part++) { /* more threads than groups share the output channels */
                fill_planes(x, flat + (g.row + 1) * PLANE, &g, I, f, u);
                long at = u * g.images * H * W * O;
                convolve(flat + (g.row + 1) * PLANE, &g, u, w, I, O, blocks * part / parts * 32,
                         blocks * (part + 1) / parts * 32, offset, taps, bias, add, residual ? residual + at : NULL,
                         out + at);
            }
        _tile_release();
        give_back(0);
    }
    free_geometry(g);
    return 0;
}

/* Turn a plane of the gradient dy into du in place, where u = norm(x). Add the sums of du to s1 and of du x to s2, and
 * compute y again. */
INLINE void backward_plane(bf16 *dy, const bf16 *x, bf16 *y, long n, long C, const before *f, long b, long c, const float *scale,
                        const float *shift, double *s1, double *s2, int swish, int drop) {
    __m512 by[2] = {_mm512_load_ps(scale), _mm512_load_ps(scale + 16)}, one = _mm512_set1_ps(1);
    __m512 plus[2] = {_mm512_load_ps(shift), _mm512_load_ps(shift + 16)}, keep = _mm512_set1_ps(1 / f->keep);
    for (long from = 0; from < n; from += PART) {
        __m512 a1[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, a2[2] = {a1[0], a1[0]};
        long to = from + PART < n ? from + PART : n;
#pragma GCC unroll 2
        for (long p = from; p < to; p++) {
            __m512 du[2], out[2];
            for (int k = 0; k < 2; k++) {
                __m512 v = load(x + p * C + c + 16 * k), u = _mm512_fmadd_ps(v, by[k], plus[k]);
                du[k] = load(dy + p * C + c + 16 * k);
                out[k] = u;
                if (swish) { /* swish' = s + u s (1 - s) */
                    __m512 s = sigmoid(u);
                    out[k] = _mm512_mul_ps(u, s);
                    du[k] = _mm512_mul_ps(du[k], _mm512_fmadd_ps(out[k], _mm512_sub_ps(one, s), s));
                }
                if (drop) {
                    __mmask16 mask = dropout_mask(f, b * n + p, c + 16 * k);
                    du[k] = _mm512_maskz_mul_ps(mask, du[k], keep);
                    out[k] = _mm512_maskz_mul_ps(mask, out[k], keep);
                }
                a1[k] = _mm512_add_ps(a1[k], du[k]);
                a2[k] = _mm512_fmadd_ps(du[k], v, a2[k]);
            }
            store(dy + p * C + c, du[0], du[1]);
            store(y + p * C + c, out[0], out[1]);
        }
        for (int k = 0; k < PLANE; k++) s1[k] += ((float *)a1)[k], s2[k] += ((float *)a2)[k];
    }
}

/* From dy, the gradient of y of image b [n, C], compute dx, y, and the image's dgamma and dbeta [C]. Overwrites dy. */
static void backward_norm(bf16 *dy, const bf16 *x, bf16 *dx, bf16 *y, long n, long C, const before *f, long b, float *dgamma, float *dbeta) {
    double m1[MOST_GROUPS] = {0}, m2[MOST_GROUPS] = {0}; /* means of dxhat and of dxhat xhat */
    long each = C / f->groups;
    float count = (float)n * each, scale[PLANE] __attribute__((aligned(64))), shift[PLANE] __attribute__((aligned(64)));
    OVER_PLANES(c, C) {
        affine(f, b, c, C, scale, shift);
        double s1[PLANE] = {0}, s2[PLANE] = {0}; /* sums of du and du x */
        if (!f->swish) backward_plane(dy, x, y, n, C, f, b, c, scale, shift, s1, s2, 0, 0);
        else if (f->keep == 1) backward_plane(dy, x, y, n, C, f, b, c, scale, shift, s1, s2, 1, 0);
        else backward_plane(dy, x, y, n, C, f, b, c, scale, shift, s1, s2, 1, 1);
        for (int k = 0; k < PLANE; k++) {
            long g = (c + k) / each;
            float mean = f->mean[b * f->groups + g], rstd = f->rstd[b * f->groups + g];
            dbeta[c + k] = s1[k];
            dgamma[c + k] = (s2[k] - mean * s1[k]) * rstd;
            m1[g] += f->gamma[c + k] * dbeta[c + k] / count;
            m2[g] += f->gamma[c + k] * dgamma[c + k] / count;
        }
    }
    OVER_PLANES(c, C) { /* dx = rstd (gamma du - m1 - xhat m2) */
        float by_x[PLANE] __attribute__((aligned(64)));
        for (int k = 0; k < PLANE; k++) {
            long g = (c + k) / each;
            float mean = f->mean[b * f->groups + g], rstd = f->rstd[b * f->groups + g];
            scale[k] = rstd * f->gamma[c + k];
            by_x[k] = -rstd * rstd * m2[g];
            shift[k] = -rstd * m1[g] - by_x[k] * mean;
        }
        __m512 dys[2] = {_mm512_load_ps(scale), _mm512_load_ps(scale + 16)};
        __m512 xs[2] = {_mm512_load_ps(by_x), _mm512_load_ps(by_x + 16)};
        __m512 plus[2] = {_mm512_load_ps(shift), _mm512_load_ps(shift + 16)};
        for (long p = 0; p < n; p++) {
            __m512 d[2];
            for (int k = 0; k < 2; k++) {
                long at = p * C + c + 16 * k;
                d[k] = _mm512_fmadd_ps(load(dy + at), dys[k], _mm512_fmadd_ps(load(x + at), xs[k], plus[k]));
            }
            store(dx + p * C + c, d[0], d[1]);
        }
    }
}

/* Write dx; y [B, H, W, I], for the gradient of the weights; dgamma and dbeta of each image [B, I]; and dadd [B, O],
 * the sums of dout over positions. Without a norm y is x and is not written. dx may be NULL if it is not needed. w is
 * packed by `pack_transposed`. */
int backward_data(const bf16 *dout, const bf16 *x, bf16 *dx, bf16 *y, const bf16 *w, float *dgamma, float *dbeta,
                  float *dadd, long B, long H, long W, long I, long O, long taps, long numbers, before *f) {
    geometry g = arrange(B, H, W);
    long offset[9], n = H * W;
    taps_of(&g, taps, offset);
#pragma omp parallel
    {
        configure_tiles();
        bf16 *flat = memset(buffer_or_abort(0, g.size * O * 2), 0, g.size * O * 2), *dy = buffer_or_abort(1, g.images * n * I * 2);
#pragma omp for schedule(dynamic)
        for (long u = 0; u < g.groups; u++) {
            long first = u * g.images, end = end_of(&g, u);
            fill_planes(dout, flat + (g.row + 1) * PLANE, &g, O, &nothing, u);
            for (long b = first; b < end; b++) {
                const bf16 *d = dout + b * n * O;
                OVER_PLANES(o, O) {
                    __m512 s[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                    for (long p = 0; p < n; p++)
                        for (int k = 0; k < 2; k++) s[k] = _mm512_add_ps(s[k], load(d + p * O + o + 16 * k));
                    for (int k = 0; k < 2; k++) _mm512_storeu_ps(dadd + b * O + o + 16 * k, s[k]);
                }
            }
            if (dx)
                convolve(flat + (g.row + 1) * PLANE, &g, u, w, O, I, 0, I, offset, taps, NULL, NULL, NULL,
                         f->gamma ? dy : dx + first * n * I);
            if (f->gamma)
                for (long b = first; b < end; b++)
                    backward_norm(dy + (b - first) * n * I, x + b * n * I, dx + b * n * I, y + b * n * I, n, I, f, b,
                           dgamma + b * I, dbeta + b * I);
        }
        _tile_release();
        give_back(0);
    }
    free_geometry(g);
    return 0;
}

/* Transpose a plane [positions][32] into 32 rows with a distance of `length` positions. */
static void transpose(const bf16 *plane, bf16 *rows, long positions, long length) {
    __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                    _mm512_set1_epi32(PLANE * 2));
    for (long p = 0; p < positions; p += 16)
        for (long c = 0; c < PLANE; c += 2) {
            __m512i two = _mm512_i32gather_epi32(at, plane + p * PLANE + c, 1);
            _mm256_storeu_si256((__m256i *)(rows + c * length + p), _mm512_cvtepi32_epi16(two));
            _mm256_storeu_si256((__m256i *)(rows + (c + 1) * length + p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(two, 16)));
        }
}

/* Write 16 channels of a plane [positions][32] as [positions / 2][16][2], with pairs of positions side by side. */
static void interleave(const bf16 *plane, bf16 *out, long positions) {
    for (long p = 0; p < positions; p += 2) {
        __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(plane + p * PLANE)));
        __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(plane + (p + 1) * PLANE)));
        _mm512_storeu_si512(out + p * 16, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

/* sum [32][32] += a b^T over positions. A row of sum has `stride` floats, a is 32 rows with a distance of `length`
 * positions, and b is 2 x 16 channels with a distance of `half`. */
static void accumulate(const bf16 *a, long length, const bf16 *b, long half, long positions, float *sum, long stride) {
    float *below = sum + 16 * stride;
    long bytes = stride * 4;
    MEMORY_BARRIER;
    _tile_loadd(0, sum, bytes);
    _tile_loadd(1, sum + 16, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + 16, bytes);
    for (long p = 0; p < positions; p += 32) {
        _tile_loadd(6, b + p * 16, 64);
        _tile_loadd(4, a + p, length * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + half + p * 16, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * length + p, length * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum, bytes);
    _tile_stored(1, sum + 16, bytes);
    _tile_stored(2, below, bytes);
    _tile_stored(3, below + 16, bytes);
    MEMORY_BARRIER;
}

/* dw[o, tap, i] += sum over positions p of dout[p, o] y[p + offset(tap), i], float32.
 *
 * dout is transposed, and y is interleaved in pairs of positions. It is interleaved twice, as (0, 1), (2, 3) .. and as
 * (-1, 0), (1, 2) .., so that the positions of every tap begin with a pair. */
int backward_weight(const bf16 *dout, const bf16 *y, float *dw, long B, long H, long W, long I, long O, long taps) {
    geometry g = arrange(B, H, W);
    long offset[9], threads = omp_get_max_threads(), margin = (g.row + 3) / 2 * 2, most = I > O ? I : O;
    taps_of(&g, taps, offset);
    long per = (g.images * g.image + 31) / 32 * 32;  /* positions of a group of images */
    long at_once = 8192 / (per * threads) * threads; /* groups that are processed together */
    if (at_once < threads) at_once = threads;
    if (at_once > g.groups) at_once = g.groups;
    long length = (per * at_once + 63) / 64 * 64 + 32; /* an odd number of cache lines: no shared cache set */
    long half = (per * at_once + 2 * margin) * 16, phase = I / 16 * half;
    size_t pairs_bytes = (size_t)phase * 4;
    bf16 *d = aligned_alloc(64, (size_t)O * length * 2), *pairs = aligned_alloc(64, pairs_bytes);
    if (!d || !pairs) {
        free(d), free(pairs), free_geometry(g);
        return OUT_OF_MEMORY;
    }
    memset(pairs, 0, pairs_bytes);
#pragma omp parallel
    {
        configure_tiles();
        size_t flat_bytes = g.size * most * 2;
        bf16 *flat = memset(buffer_or_abort(0, flat_bytes), 0, flat_bytes), *start = flat + (g.row + 1) * PLANE;
        for (long from = 0; from < g.groups; from += at_once) {
            long groups = g.groups - from < at_once ? g.groups - from : at_once;
#pragma omp for schedule(dynamic)
            for (long u = 0; u < groups; u++) {
                if ((from + u + 1) * g.images > B) memset(flat, 0, flat_bytes); /* the last group has fewer images */
                fill_planes(y, start, &g, I, &nothing, from + u);
                for (long i = 0; i < I; i += 16)
                    for (long odd = 0; odd < 2; odd++)
                        interleave(start + i / 32 * 32 * g.size - odd * PLANE + i % 32,
                                   pairs + odd * phase + i / 16 * half + (margin + u * per) * 16, per);
                fill_planes(dout, start, &g, O, &nothing, from + u);
                OVER_PLANES(o, O) transpose(start + o * g.size, d + o * length + u * per, per, length);
            }
#pragma omp for collapse(2) schedule(dynamic)
            for (long o = 0; o < O; o += 32)
                for (long i = 0; i < I; i += 32)
                    for (long t = 0; t < taps; t++) {
                        long shift = margin + offset[t] / PLANE, odd = shift % 2;
                        accumulate(d + o * length, length, pairs + odd * phase + i / 16 * half + (shift + odd) * 16, half,
                                   groups * per, dw + (o * taps + t) * I + i, taps * I);
                    }
        }
        _tile_release();
        give_back(0);
    }
    free(d), free(pairs);
    free_geometry(g);
    return 0;
}
