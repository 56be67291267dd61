/* y = x W^T + bias in bf16 with sums in fp32, by the tiles of Intel's AMX; see __init__.py.
 *
 * W is kept as tiles, in the order in which they are read: for every 32 outputs, for every 32 inputs, a pair of tiles. So a
 * product of few rows reads memory once, in order.
 */
#include "tiles.h"

#ifdef TILES
#include <omp.h>
#include <stdlib.h>

enum { CACHED = 1 << 20 };

/* One tile of W from output `row` and input `column` on; W[n, k] lies at n * stride_n + k * stride_k elements. */
static void pack_tile(const uint16_t *w, uint16_t *tile, int row, int column, int outputs, int inputs, ptrdiff_t stride_n,
                      ptrdiff_t stride_k) {
    const uint16_t *from = w + row * stride_n + column * stride_k;
    if (stride_k == 1 && row + 16 <= outputs && column + 32 <= inputs) { /* pairs of inputs stay together */
        for (int c = 0; c < 16; c++)
            for (int p = 0; p < 16; p++) memcpy(tile + 2 * (16 * p + c), from + c * stride_n + 2 * p, 4);
        return;
    }
    for (int p = 0; p < 16; p++)
        for (int c = 0; c < 16; c++)
            for (int e = 0; e < 2; e++) {
                const int k = 2 * p + e, there = row + c < outputs && column + k < inputs;
                *tile++ = there ? from[c * stride_n + k * stride_k] : 0;
            }
}

void pack_weight(const uint16_t *w, uint16_t *packed, int outputs, int inputs, ptrdiff_t stride_n, ptrdiff_t stride_k,
                 int threads) {
    const int steps = blocks(inputs);
#pragma omp parallel for num_threads(threads)
    for (int n = 0; n < blocks(outputs); n++)
        for (int k = 0; k < steps; k++)
            for (int half = 0; half < 2; half++)
                pack_tile(w, packed + ((size_t)n * steps + k) * PAIR + half * TILE, n * SIDE + half * 16, k * SIDE, outputs,
                          inputs, stride_n, stride_k);
}

static void put(const float *sums, const uint16_t *bias, uint16_t *y, int rows, int outputs, ptrdiff_t stride) {
    const __mmask32 used = outputs >= 32 ? ~0u : (1u << outputs) - 1;
    __m512 low = _mm512_setzero_ps(), high = low;
    if (bias) {
        const __m512i both = _mm512_maskz_loadu_epi16(used, bias);
        low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
        high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
    }
    for (int row = 0; row < rows; row++) {
        const __m512 a = _mm512_add_ps(_mm512_load_ps(sums + row * SIDE), low);
        const __m512 b = _mm512_add_ps(_mm512_load_ps(sums + row * SIDE + 16), high);
        _mm512_mask_storeu_epi16(y + row * stride, used, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

/* x: [rows, inputs], y: [rows, outputs]. 0: done; 1: there is no memory for x as tiles. */
int linear(const uint16_t *x, const uint16_t *packed, const uint16_t *bias, uint16_t *y, int rows, int inputs, int outputs,
           int threads) {
    const int steps = blocks(inputs), row_blocks = blocks(rows), output_blocks = blocks(outputs);
    uint16_t *tiles = aligned_alloc(64, sizeof(uint16_t) * row_blocks * steps * PAIR);
    if (!tiles) return 1;
    /* Rows that stay in the second-level cache while the weights pass by. */
    const int fit = CACHED / (steps * PAIR * (int)sizeof *tiles), together = fit > 0 ? fit : 1;
#pragma omp parallel num_threads(threads)
    {
        float sums[SIDE * SIDE] __attribute__((aligned(64)));
        const int id = omp_get_thread_num(), count = omp_get_num_threads();
        const int from = (int)((int64_t)output_blocks * id / count), to = (int)((int64_t)output_blocks * (id + 1) / count);
#pragma omp for
        for (int first = 0; first < rows; first += 16) {
            uint16_t *half = tiles + (size_t)(first / SIDE) * steps * PAIR + (first % SIDE ? TILE : 0);
            pack_rows(x + (size_t)first * inputs, inputs, NULL, rows - first, inputs, half);
        }
        configure();
        for (int m0 = 0; m0 < row_blocks; m0 += together)
            for (int n = from; n < to; n++)
                for (int m = m0; m < row_blocks && m < m0 + together; m++) {
                    const int left = rows - m * SIDE;
                    multiply(tiles + (size_t)m * steps * PAIR, packed + (size_t)n * steps * PAIR, steps, left > 16, 1,
                             m == m0 ? AHEAD : PAIR, sums);
                    put(sums, bias ? bias + n * SIDE : NULL, y + (size_t)m * SIDE * outputs + n * SIDE,
                        left < SIDE ? left : SIDE, outputs - n * SIDE, outputs);
                }
        _tile_release();
    }
    free(tiles);
    return 0;
}
#endif
