/* Sixteen floats at a time, on whatever the compiler knows of the machine; bf16 is widened on the way in. */
#ifndef WEFT_VECTORS_H
#define WEFT_VECTORS_H

#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

typedef enum { FP32 = 0, BF16 = 1 } Kind;

/* As the compiler should do it itself: gcc 12 takes five instructions for each. */
#ifdef __AVX512F__
#include <immintrin.h>
INLINE words widen(halves half) { return (words)_mm512_cvtepu16_epi32((__m256i)half); }
INLINE halves narrow(words word) { return (halves)_mm512_cvtepi32_epi16((__m512i)word); }
#else
INLINE words widen(halves half) { return __builtin_convertvector(half, words); }
INLINE halves narrow(words word) { return __builtin_convertvector(word, halves); }
#endif

INLINE size_t size_of(Kind kind) { return kind == BF16 ? 2 : 4; }

INLINE const void *at(const void *base, size_t index, Kind kind) {
    return (const char *)base + index * size_of(kind);
}

INLINE float load1(const void *from, Kind kind) {
    float value;
    if (kind == FP32) {
        memcpy(&value, from, 4);
        return value;
    }
    uint16_t half;
    memcpy(&half, from, 2);
    uint32_t word = (uint32_t)half << 16;
    memcpy(&value, &word, 4);
    return value;
}

INLINE vec load(const void *from, Kind kind) {
    if (kind == FP32) {
        vec value;
        memcpy(&value, from, sizeof value);
        return value;
    }
    halves half;
    memcpy(&half, from, sizeof half);
    return (vec)(widen(half) << 16);
}

/* To the nearest, ties to even; a NaN stays one. */
INLINE uint16_t narrow1(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if (value != value) return (uint16_t)(word >> 16 | 0x40);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

INLINE void store1(void *to, float value, Kind kind) {
    if (kind == FP32) {
        memcpy(to, &value, 4);
        return;
    }
    uint16_t half = narrow1(value);
    memcpy(to, &half, 2);
}

INLINE void store(void *to, vec value, Kind kind) {
    if (kind == FP32) {
        memcpy(to, &value, sizeof value);
        return;
    }
#ifdef __AVX512BF16__ /* the same in one instruction, but that subnormals become 0 */
    const __m256bh at_once = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &at_once, sizeof at_once);
    return;
#endif
    words word = (words)value, rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    words nan = (words)(value != value);
    halves half = narrow((nan & (word >> 16 | 0x40)) | (~nan & rounded));
    memcpy(to, &half, sizeof half);
}

/* The first of the sixteen, as many as there are, and zeros behind them. */
INLINE vec load_some(const void *from, size_t count, Kind kind) {
    if (count >= LANES) return load(from, kind);
    char padded[sizeof(vec)] = {0};
    memcpy(padded, from, count * size_of(kind));
    return load(padded, kind);
}

INLINE void store_some(void *to, vec value, size_t count, Kind kind) {
    if (count >= LANES) {
        store(to, value, kind);
        return;
    }
    char all[sizeof(vec)];
    store(all, value, kind);
    memcpy(to, all, count * size_of(kind));
}

/* What is read back of a value that was stored. */
INLINE vec rounded(vec value, Kind kind) {
    char stored[sizeof(vec)];
    store(stored, value, kind);
    return load(stored, kind);
}

INLINE vec splat(float value) { return value - (vec){0}; }

/* One step of adding up lanes: of every 2 * `apart` lanes the sums of halves, a's before b's. */
#define FOLD(a, b, apart)                                                                                              \
    (__builtin_shuffle(a, b, fold_order(apart, 0)) + __builtin_shuffle(a, b, fold_order(apart, 1)))

INLINE ints fold_order(int apart, int half) {
    ints order;
    for (int lane = 0; lane < LANES; lane++) {
        const int within = lane % (2 * apart), from = lane - within + half * apart;
        order[lane] = within < apart ? from + within : LANES + from + within - apart;
    }
    return order;
}

/* Lane i of the result is the sum of values[i]'s lanes. */
INLINE vec sums(const vec values[LANES]) {
    vec folded[LANES];
    for (int i = 0; i < 8; i++) folded[i] = FOLD(values[2 * i], values[2 * i + 1], 1);
    for (int i = 0; i < 4; i++) folded[i] = FOLD(folded[2 * i], folded[2 * i + 1], 2);
    for (int i = 0; i < 2; i++) folded[i] = FOLD(folded[2 * i], folded[2 * i + 1], 4);
    return FOLD(folded[0], folded[1], 8);
}

INLINE float sum(vec value) {
    value = FOLD(value, value, 1);
    value = FOLD(value, value, 2);
    value = FOLD(value, value, 4);
    return FOLD(value, value, 8)[0];
}

INLINE vec larger(vec a, vec b) {
    const words first = (words)(a > b);
    return (vec)((first & (words)a) | (~first & (words)b));
}

/* Products of two vectors of n elements summed in lanes; what does not fill a vector goes to the first. */
INLINE vec products(const void *a, const void *b, int n, Kind kind) {
    vec total = {0};
    int i = 0;
#ifdef __AVX512BF16__ /* pairs of bf16 at once, without widening */
    for (; kind == BF16 && i + 2 * LANES <= n; i += 2 * LANES)
        total = (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(at(a, i, kind)),
                                      (__m512bh)_mm512_loadu_si512(at(b, i, kind)));
#endif
    for (; i + LANES <= n; i += LANES) total += load(at(a, i, kind), kind) * load(at(b, i, kind), kind);
    float rest = 0;
    for (; i < n; i++) rest += load1(at(a, i, kind), kind) * load1(at(b, i, kind), kind);
    total[0] += rest;
    return total;
}

/* e^x to about one unit in the last place, 0 below the range of fp32: 2^n e^r with |r| <= ln 2 / 2 (Cephes' expf). */
INLINE vec exponential(vec x) {
    const vec low = splat(-87.3f);
    const words under = (words)(x < low);
    x = (vec)((under & (words)low) | (~under & (words)x));
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    const vec n = x * 1.44269504088896341f + shift - shift;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return (vec)(~under & (words)(p * (vec)power));
}

#endif
