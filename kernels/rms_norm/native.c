/* RMS norm of rows; see __init__.py for what it means. */
#include <math.h>
#include <stddef.h>

#include "vectors.h"

INLINE void normalise(void *y, const void *x, const void *weight, ptrdiff_t width, float eps, float offset,
                      int round_first, Kind kind) {
    vec squares = {0};
    for (ptrdiff_t i = 0; i < width; i += LANES) {
        const vec value = load_some(at(x, i, kind), width - i, kind);
        squares += value * value;
    }
    const float scale = 1 / sqrtf(sum(squares) / width + eps);
    for (ptrdiff_t i = 0; i < width; i += LANES) {
        vec value = load_some(at(x, i, kind), width - i, kind) * scale;
        if (round_first) value = rounded(value, kind);
        value *= load_some(at(weight, i, kind), width - i, kind) + offset;
        store_some((void *)at(y, i, kind), value, width - i, kind);
    }
}

void rms_norm(void *y, const void *x, const void *weight, ptrdiff_t rows, ptrdiff_t width, float eps, float offset,
              int round_first, int kind, int threads) {
#pragma omp parallel for num_threads(threads)
    for (ptrdiff_t row = 0; row < rows; row++) {
        const void *from = at(x, row * width, kind);
        void *to = (void *)at(y, row * width, kind);
        if (kind == BF16)
            normalise(to, from, weight, width, eps, offset, round_first, BF16);
        else
            normalise(to, from, weight, width, eps, offset, round_first, FP32);
    }
}
