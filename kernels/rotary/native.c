/* Rotary position embedding; see __init__.py for what it means. */
#include <stddef.h>

#include "vectors.h"

/* One half of a head; `sign` is that of its partners. */
INLINE void rotate(void *y, const void *x, const void *partners, const void *cosines, const void *sines, float sign,
                   int width, Kind kind) {
    for (int i = 0; i < width; i += LANES) {
        const vec one = rounded(load_some(at(x, i, kind), width - i, kind) * load_some(at(cosines, i, kind), width - i, kind), kind);
        const vec other = sign * load_some(at(partners, i, kind), width - i, kind);
        const vec two = rounded(other * load_some(at(sines, i, kind), width - i, kind), kind);
        store_some((void *)at(y, i, kind), one + two, width - i, kind);
    }
}

INLINE void pass(void *y, const void *x, const void *cosines, const void *sines, int heads, ptrdiff_t tokens, int width,
                 ptrdiff_t stride_head, ptrdiff_t stride_token, int threads, Kind kind) {
    const int half = width / 2;
#pragma omp parallel for num_threads(threads)
    for (ptrdiff_t token = 0; token < tokens; token++) {
        const void *c = at(cosines, token * width, kind), *s = at(sines, token * width, kind);
        for (int head = 0; head < heads; head++) {
            const void *from = at(x, token * stride_token + head * stride_head, kind);
            void *to = (void *)at(y, (token * heads + head) * width, kind);
            rotate(to, from, at(from, half, kind), c, s, -1, half, kind);
            rotate((void *)at(to, half, kind), at(from, half, kind), from, at(c, half, kind), at(s, half, kind), 1, half, kind);
        }
    }
}

/* y: [tokens, heads, width]; strides of x in elements. */
void rotary(void *y, const void *x, const void *cosines, const void *sines, int heads, ptrdiff_t tokens, int width,
            ptrdiff_t stride_head, ptrdiff_t stride_token, int kind, int threads) {
    if (kind == BF16)
        pass(y, x, cosines, sines, heads, tokens, width, stride_head, stride_token, threads, BF16);
    else
        pass(y, x, cosines, sines, heads, tokens, width, stride_head, stride_token, threads, FP32);
}
