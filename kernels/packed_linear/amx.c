/* y = x W^T + bias in bf16 with sums in fp32, by the tiles of Intel's AMX; see __init__.py.
 *
 * W is kept as tiles, in the order in which they are read: for every 32 outputs, for every 32 inputs, two tiles of 16
 * rows, of which row p has the inputs 2p and 2p + 1 of 16 outputs. So a product of few rows reads memory once, in order.
 * x is laid out as tiles too: for every 32 rows, for every 32 inputs, two tiles of 16 rows of 32 inputs.
 */
#include <stddef.h>
#include <stdint.h>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 32, TILE = 16 * 32, PAIR = 2 * TILE, AHEAD = 4 * PAIR, CACHED = 1 << 20 };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) TileConfig;

/* Linux lets a process use the tiles once it asked. 0: it may. */
int amx_permitted(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }

static void configure(void) {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 64, config.rows[tile] = 16;
    _tile_loadconfig(&config);
}

static int blocks(int count) { return (count + SIDE - 1) / SIDE; }

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

/* Tiles of the 16 rows from `first` on. */
static void pack_rows(const uint16_t *x, uint16_t *packed, int first, int rows, int inputs) {
    const int steps = blocks(inputs);
    uint16_t *to = packed + (size_t)(first / SIDE) * steps * PAIR + (first % SIDE ? TILE : 0);
    for (int row = 0; row < 16; row++) {
        const uint16_t *from = x + (size_t)(first + row) * inputs;
        for (int k = 0; k < steps; k++) {
            const int left = inputs - k * SIDE;
            const __mmask32 used = first + row >= rows ? 0 : left >= 32 ? ~0u : (1u << left) - 1;
            _mm512_store_si512(to + (size_t)k * PAIR + row * SIDE, _mm512_maskz_loadu_epi16(used, from + k * SIDE));
        }
    }
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

/* Sums [32, 32] of one block of rows and one of outputs, whose weights come from memory if they are fresh. */
static void multiply(const uint16_t *x, const uint16_t *w, int steps, int both, int fresh, float *sums) {
    const int ahead = fresh ? AHEAD : PAIR;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < steps; k++, x += PAIR, w += PAIR) {
        for (int line = 0; line < PAIR; line += 32) {
            _mm_prefetch((const char *)(w + ahead + line), _MM_HINT_T0);
            _mm_prefetch((const char *)(x + PAIR + line), _MM_HINT_T0);
        }
        _tile_loadd(6, w, 64);
        _tile_loadd(7, w + TILE, 64);
        _tile_loadd(4, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, x + TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if (both) {
        _tile_stored(2, sums + 16 * SIDE, 128);
        _tile_stored(3, sums + 16 * SIDE + 16, 128);
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
        for (int first = 0; first < rows; first += 16) pack_rows(x, tiles, first, rows, inputs);
        configure();
        for (int m0 = 0; m0 < row_blocks; m0 += together)
            for (int n = from; n < to; n++)
                for (int m = m0; m < row_blocks && m < m0 + together; m++) {
                    const int left = rows - m * SIDE;
                    multiply(tiles + (size_t)m * steps * PAIR, packed + (size_t)n * steps * PAIR, steps, left > 16, m == m0,
                             sums);
                    put(sums, bias ? bias + n * SIDE : NULL, y + (size_t)m * SIDE * outputs + n * SIDE,
                        left < SIDE ? left : SIDE, outputs - n * SIDE, outputs);
                }
        _tile_release();
    }
    free(tiles);
    return 0;
}
#else
int amx_permitted(void) { return -1; }
#endif
