/* y = x W^T + bias in bf16 with sums in fp32, by the tiles of Intel's AMX; see __init__.py.
 *
 * W is kept as tiles, in the order in which they are read: for every 32 outputs, for every 32 inputs, a pair of tiles. So a
 * product of few rows reads memory once, in order.
 */
#include "grouped_lora/rows.h"
#include "tiles.h"

#ifdef TILES
#include <omp.h>
#include <stdlib.h>

/* Bytes of x that stay in the second-level cache; rows of a thread from which on threads share rows, not outputs; blocks of
 * outputs that are written before the next rows. */
enum { CACHED = 1 << 19, MANY = 128, ABREAST = 4 };

/* One tile of W from output `row` and input `column` on; W[n, k] lies at n * stride_n + k * stride_k elements. */
static void pack_tile(const uint16_t *w, uint16_t *tile, int row, int column, int outputs, int inputs, ptrdiff_t stride_n,
                      ptrdiff_t stride_k) {
    const uint16_t *from = w + row * stride_n + column * stride_k;
    if (stride_k == 1) {
        __m512i columns[16];
        for (int c = 0; c < 16; c++) {
            const int there = row + c < outputs;
            columns[c] = _mm512_maskz_loadu_epi16(there ? first(inputs - column) : 0, from + (there ? c * stride_n : 0));
        }
        pack_columns(columns, tile);
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

typedef struct {
    const uint16_t *x, *packed, *bias; /* x: [rows, inputs] */
    uint16_t *y;                       /* [rows, outputs] */
    int rows, inputs, outputs, threads;
} Linear;

/* 32 columns of y from output n on, for as many rows as there are. */
static void put(const Linear *in, const float *sums, int row, int rows, int n) {
    const __mmask32 used = first(in->outputs - n);
    uint16_t *y = in->y + (size_t)row * in->outputs + n;
    __m512 low = _mm512_setzero_ps(), high = low;
    if (in->bias) {
        const __m512i both = _mm512_maskz_loadu_epi16(used, in->bias + n);
        low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
        high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
    }
    for (int k = 0; k < rows; k++, y += in->outputs) {
        const __m512 a = _mm512_add_ps(_mm512_load_ps(sums + k * SIDE), low);
        const __m512 b = _mm512_add_ps(_mm512_load_ps(sums + k * SIDE + 16), high);
        _mm512_mask_storeu_epi16(y, used, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

/* Where the tiles of a row begin, which is the first of 16. */
static uint16_t *tiles_of(const Linear *in, uint16_t *tiles, int row) {
    return tiles + (size_t)(row / SIDE) * blocks(in->inputs) * PAIR + row % SIDE / 16 * TILE;
}

/* 16 rows from `first` on as tiles. */
static void pack(const Linear *in, int first, uint16_t *to) {
    pack_rows(in->x + (size_t)first * in->inputs, in->inputs, NULL, in->rows - first, in->inputs, to);
}

/* The outputs of the blocks [from, to) for `count` rows from `first` on, which are there as tiles. Some outputs of one
 * row are written before the next row's: rows of y lie in different pages. */
static void multiply_rows(const Linear *in, const uint16_t *tiles, int first, int count, int from, int to) {
    const size_t block = (size_t)blocks(in->inputs) * PAIR;
    float sums[SIDE * SIDE] __attribute__((aligned(64)));
    for (int n0 = from; n0 < to; n0 += ABREAST)
        for (int row = 0; row < count; row += SIDE)
            for (int n = n0; n < to && n < n0 + ABREAST; n++) {
                const int rows = count - row < SIDE ? count - row : SIDE;
                multiply(tiles + row / SIDE * block, in->packed + n * block, blocks(in->inputs), rows > 16, 1,
                         row ? PAIR : AHEAD, sums);
                put(in, sums, first + row, rows, n * SIDE);
            }
}

/* Rows that stay in the second-level cache as tiles while the weights pass by. */
static int rows_in_cache(int inputs) {
    const int fit = CACHED / (blocks(inputs) * PAIR * (int)sizeof(uint16_t));
    return SIDE * (fit > 0 ? fit : 1);
}

static uint16_t *room_for(int rows, int inputs) {
    return aligned_alloc(64, sizeof(uint16_t) * blocks(rows) * blocks(inputs) * PAIR);
}

/* Few rows: every thread has outputs of its own, so that it reads its part of the weights once. What adapters add to these
 * comes in the same go. h: as in rows.h, if there are such. */
static int by_outputs(const Linear *in, const Lora *lora, float *h) {
    const int together = rows_in_cache(in->inputs), all = blocks(in->outputs);
    uint16_t *tiles = room_for(in->rows, in->inputs);
    if (!tiles) return 1;
#pragma omp parallel num_threads(in->threads)
    {
        const int id = omp_get_thread_num(), count = omp_get_num_threads();
        const Share own = share_of(parts_of(in->outputs, WIDE), id, count);
        const int from = (int)own.from * (WIDE / SIDE), end = (int)own.to * (WIDE / SIDE), to = end < all ? end : all;
        if (lora) shrink_share(lora, h, id, count, BF16);
#pragma omp for
        for (int first = 0; first < in->rows; first += 16) pack(in, first, tiles_of(in, tiles, first));
        configure();
        for (int first = 0; first < in->rows; first += together) {
            const int left = in->rows - first;
            multiply_rows(in, tiles_of(in, tiles, first), first, left < together ? left : together, from, to);
        }
        _tile_release();
        if (lora) expand_share(lora, h, own, BF16);
    }
    free(tiles);
    return 0;
}

/* Many rows: every thread has rows of its own, which never leave its cache as tiles. */
static int by_rows(const Linear *in) {
    const int together = rows_in_cache(in->inputs);
    int failed = 0;
#pragma omp parallel num_threads(in->threads) reduction(| : failed)
    {
        const int64_t id = omp_get_thread_num(), count = omp_get_num_threads(), all = blocks(in->rows);
        const int from = (int)(all * id / count) * SIDE, end = (int)(all * (id + 1) / count) * SIDE;
        const int to = end < in->rows ? end : in->rows;
        uint16_t *tiles = room_for(together, in->inputs);
        failed = !tiles;
        configure();
        for (int first = from; !failed && first < to; first += together) {
            const int some = to - first < together ? to - first : together;
            for (int row = 0; row < some; row += 16) pack(in, first + row, tiles_of(in, tiles, row));
            multiply_rows(in, tiles, first, some, 0, blocks(in->outputs));
        }
        _tile_release();
        free(tiles);
    }
    return failed;
}

/* lora: what adapters add, or NULL. 0: done; 1: there is no memory for what lies between x and y. */
int linear(const uint16_t *x, const uint16_t *packed, const uint16_t *bias, uint16_t *y, int rows, int inputs, int outputs,
           int threads, const Lora *lora) {
    const Linear in = {x, packed, bias, y, rows, inputs, outputs, threads};
    float *h = lora ? malloc(sizeof(float) * lora->rows * lora->most_rank) : NULL;
    int failed = lora && !h;
    if (!failed && rows < MANY * threads) {
        failed = by_outputs(&in, lora, h);
    } else if (!failed) {
        failed = by_rows(&in);
        if (lora && !failed) lora_in_team(lora, h, BF16);
    }
    free(h);
    return failed;
}
#endif
