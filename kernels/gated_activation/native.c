/* Gated activation; see __init__.py for what it means. */
#include <stddef.h>

#include "vectors.h"

typedef enum { GELU = 2, GELU_TANH = 3, SILU = 4 } Activation; /* as in activations.py */

enum { CHUNK = 64 * LANES }; /* of one thread at a time */

INLINE vec choose(ints condition, vec yes, vec no) { return (vec)((condition & (ints)yes) | (~condition & (ints)no)); }

INLINE vec absolute(vec x) { return (vec)((words)x & 0x7fffffff); }

/* 1 / (1 + e^-x); the exponential does not overflow. */
INLINE vec logistic(vec x) {
    const vec e = exponential(-absolute(x));
    return choose(x < 0, e, splat(1)) / (1 + e);
}

/* The normal distribution's share below x, to 1e-7: erfc of |x| / sqrt 2 by Abramowitz and Stegun, 7.1.26. */
INLINE vec normal(vec x) {
    const vec z = absolute(x) * 0.70710678118654752f, t = 1 / (1 + 0.3275911f * z);
    vec p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec beyond = 0.5f * p * t * exponential(-z * z);
    return choose(x < 0, beyond, 1 - beyond);
}

INLINE vec activate(vec x, Activation activation) {
    if (activation == GELU) return x * normal(x);
    /* (1 + tanh u) / 2 is the logistic function of 2 u. */
    if (activation == GELU_TANH) return x * logistic(1.5957691216057308f * (x + 0.044715f * x * x * x));
    return x * logistic(x);
}

INLINE void pass(void *y, const void *gate, const void *up, ptrdiff_t from, ptrdiff_t to, Activation activation,
                 Kind kind) {
    for (ptrdiff_t i = from; i < to; i += LANES) {
        const vec value = rounded(activate(load_some(at(gate, i, kind), to - i, kind), activation), kind);
        store_some((void *)at(y, i, kind), value * load_some(at(up, i, kind), to - i, kind), to - i, kind);
    }
}

/* The activation is known to the compiler, or it would be asked for with every vector. */
INLINE void pass_as(void *y, const void *gate, const void *up, ptrdiff_t from, ptrdiff_t to, Activation activation,
                    Kind kind) {
    switch (activation) {
    case GELU: pass(y, gate, up, from, to, GELU, kind); break;
    case GELU_TANH: pass(y, gate, up, from, to, GELU_TANH, kind); break;
    case SILU: pass(y, gate, up, from, to, SILU, kind); break;
    }
}

void gated_activation(void *y, const void *gate, const void *up, ptrdiff_t count, int activation, int kind,
                      int threads) {
#pragma omp parallel for num_threads(threads)
    for (ptrdiff_t from = 0; from < count; from += CHUNK) {
        const ptrdiff_t to = from + CHUNK < count ? from + CHUNK : count;
        if (kind == BF16)
            pass_as(y, gate, up, from, to, activation, BF16);
        else
            pass_as(y, gate, up, from, to, activation, FP32);
    }
}
