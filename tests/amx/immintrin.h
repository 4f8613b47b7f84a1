/* Plain C for the parts of <immintrin.h> that amx.c uses: bfloat16 tiles and vectors of 64 bytes. With it the tests run
 * amx.c on CPUs that have neither. Rounding, masks and faults equal those of the instructions, except that denormals
 * are not flushed to 0. It is slow. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define syscall(...) 0 /* amx.c uses it to ask the operating system for the tiles */
#define EACH for (int i = 0; i < 16; i++)
#define FN static inline __attribute__((unused))

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias)), __m256i __attribute__((vector_size(32), may_alias));
typedef uint32_t u32 __attribute__((vector_size(64), may_alias));
typedef uint16_t u16 __attribute__((vector_size(32), may_alias)), __mmask16;

/* -- memory -- */
FN __m512 _mm512_loadu_ps(const void *p) { __m512 a; memcpy(&a, p, 64); return a; }
FN __m512 _mm512_load_ps(const void *p) { if ((uintptr_t)p % 64) abort(); return _mm512_loadu_ps(p); }
FN __m512i _mm512_loadu_si512(const void *p) { return (__m512i)_mm512_loadu_ps(p); }
FN __m256i _mm256_loadu_si256(const void *p) { __m256i a; memcpy(&a, p, 32); return a; }
FN void _mm512_storeu_ps(void *p, __m512 a) { memcpy(p, &a, 64); }
FN void _mm512_storeu_si512(void *p, __m512i a) { memcpy(p, &a, 64); }
FN void _mm256_storeu_si256(void *p, __m256i a) { memcpy(p, &a, 32); }
FN __m512 _mm512_maskz_loadu_ps(__mmask16 m, const float *p) { __m512 a; EACH a[i] = m >> i & 1 ? p[i] : 0; return a; }
FN __m512i _mm512_i32gather_epi32(__m512i at, const void *p, int scale) {
    u32 a;
    EACH { uint32_t v; memcpy(&v, (const char *)p + (long)(int)((u32)at)[i] * scale, 4); a[i] = v; }
    return (__m512i)a;
}
FN void _mm512_i32scatter_epi32(void *p, __m512i at, __m512i a, int scale) {
    EACH { uint32_t v = ((u32)a)[i]; memcpy((char *)p + (long)(int)((u32)at)[i] * scale, &v, 4); }
}

/* -- numbers -- */
FN __m512 _mm512_setzero_ps(void) { return (__m512){0}; }
FN __m512 _mm512_set1_ps(float v) { return (__m512){0} + v; }
FN __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
FN __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
FN __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
FN __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { EACH c[i] = __builtin_fmaf(a[i], b[i], c[i]); return c; }
FN __m512 _mm512_maskz_mul_ps(__mmask16 m, __m512 a, __m512 b) { EACH a[i] = m >> i & 1 ? a[i] * b[i] : 0; return a; }
FN __m512 _mm512_roundscale_ps(__m512 a, int digits) { EACH a[i] = rintf(a[i]); return digits ? abort(), a : a; }
FN __m512 _mm512_scalef_ps(__m512 a, __m512 b) { EACH a[i] = ldexpf(a[i], fmaxf(fminf(b[i], 512), -512)); return a; }
FN __m512 _mm512_rcp14_ps(__m512 a) { return (__m512)((u32)(1 / a) & ~0x1ffu); } /* error below 2^-14 */

FN __m512i _mm512_set1_epi32(int v) { return (__m512i)((u32){0} + (uint32_t)v); }
#define _mm512_setr_epi32(...) ((__m512i)(u32){__VA_ARGS__})
FN __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((u32)a + (u32)b); }
FN __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return (__m512i)((u32)a * (u32)b); }
FN __m512i _mm512_slli_epi32(__m512i a, int n) { return (__m512i)((u32)a << n); }
FN __m512i _mm512_srli_epi32(__m512i a, int n) { return (__m512i)((u32)a >> n); }
FN __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
FN __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
FN __m512i _mm512_cvtepu16_epi32(__m256i a) { return (__m512i)__builtin_convertvector((u16)a, u32); }
FN __m256i _mm512_cvtepi32_epi16(__m512i a) { return (__m256i)__builtin_convertvector((u32)a, u16); }
FN __mmask16 _mm512_cmplt_epu32_mask(__m512i a, __m512i b) {
    __mmask16 m = 0;
    EACH m |= (((u32)a)[i] < ((u32)b)[i]) << i;
    return m;
}

/* To the nearest bfloat16, a tie to the even one. */
FN __m256i _mm512_cvtneps_pbh(__m512 a) {
    u32 bits = (u32)a, rounded = bits + 0x7fff + (bits >> 16 & 1);
    EACH if (a[i] != a[i]) rounded[i] = bits[i] | 1 << 22;
    return _mm512_cvtepi32_epi16((__m512i)(rounded >> 16));
}
FN __m512i _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    __m256i halves[2] = {_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)};
    return _mm512_loadu_si512(halves);
}

/* -- tiles: 16 rows of 64 bytes -- */
static __thread u32 tile[8][16];
static __thread int configured; /* without that the instructions fault */
#define TILE(t) (configured ? tile[t] : (abort(), tile[t]))

FN void _tile_loadconfig(const void *p) { configured = *(const uint8_t *)p == 1; memset(tile, 0, sizeof tile); }
FN void _tile_release(void) { configured = 0; }
FN void _tile_zero(int t) { memset(TILE(t), 0, sizeof *tile); }
FN void _tile_loadd(int t, const void *p, long stride) { EACH memcpy(TILE(t) + i, (const char *)p + i * stride, 64); }
FN void _tile_stored(int t, void *p, long stride) { EACH memcpy((char *)p + i * stride, TILE(t) + i, 64); }
FN void _tile_dpbf16ps(int t, int a, int b) {
    for (int k = 0; k < 16; k++) {
        u32 pairs = TILE(b)[k];
        EACH {
            uint32_t two = TILE(a)[i][k];
            __m512 sum = (__m512)TILE(t)[i];
            sum += (__m512)((u32){0} + (two << 16)) * (__m512)(pairs << 16);
            sum += (__m512)((u32){0} + (two & 0xffff0000)) * (__m512)(pairs & 0xffff0000);
            TILE(t)[i] = (u32)sum;
        }
    }
}
