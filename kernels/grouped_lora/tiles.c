/* Grouped LoRA of many rows in bf16, by the tiles of Intel's AMX; see __init__.py.
 *
 * 32 rows of a slot go all the way, from x through the inner vectors to y, so that all but x and y stays in the cache. The
 * weights are laid out as tiles by each thread for itself, slot after slot: threads have adjacent rows, so that is done
 * about once, and nobody waits for anybody.
 */
#include "grouped_lora/lora.h"
#include "tiles.h"

#ifdef TILES
#include <omp.h>
#include <stdlib.h>

/* What a thread works in. */
typedef struct {
    uint16_t *a, *b; /* of one slot: for every 32 ranks the inputs, for every 32 outputs the ranks */
    uint16_t *x, *h; /* of 32 rows */
} Room;

static void *room_for(int columns, int depth) {
    return aligned_alloc(64, sizeof(uint16_t) * (size_t)blocks(columns) * blocks(depth) * PAIR);
}

/* A as the right operand: its rows are columns there, pairs of inputs stay together. */
static void pack_a(const Lora *in, const int32_t *table, int rank, uint16_t *to) {
    const int steps = blocks(in->inputs);
    for (int r0 = 0; r0 < rank; r0 += 16) {
        uint16_t *tile = to + (size_t)(r0 / SIDE) * steps * PAIR + (r0 % SIDE ? TILE : 0);
        for (int k = 0; k < steps; k++, tile += PAIR) {
            __m512i columns[16];
            for (int c = 0; c < 16; c++) {
                const int there = r0 + c < rank;
                const uint16_t *from = (const uint16_t *)in->a + (there ? (size_t)table[r0 + c] * in->inputs : 0);
                columns[c] = _mm512_maskz_loadu_epi16(there ? first(in->inputs - k * SIDE) : 0, from + k * SIDE);
            }
            pack_columns(columns, tile);
        }
    }
}

/* B as the right operand: pairs of its rows are interleaved. */
static void pack_b(const Lora *in, const int32_t *table, int rank, uint16_t *to) {
    const int steps = blocks(rank);
    for (int r = 0; r < steps * SIDE; r += 2) {
        const uint16_t *b = in->b, *even = b + (r < rank ? (size_t)table[r] * in->outputs : 0);
        const uint16_t *odd = b + (r + 1 < rank ? (size_t)table[r + 1] * in->outputs : 0);
        uint16_t *tiles = to + (size_t)(r / SIDE) * PAIR + r % SIDE / 2 * SIDE;
        for (int n = 0; n < in->outputs; n += 16, tiles += n % SIDE ? TILE : (size_t)steps * PAIR - TILE) {
            const int left = in->outputs - n;
            const __mmask16 used = left >= 16 ? 0xffff : (1u << left) - 1;
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(r < rank ? used : 0, even + n));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(r + 1 < rank ? used : 0, odd + n));
            _mm512_store_si512(tiles, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

/* The inner vectors of 32 rows as the left operand, rounded as x is; 0 beyond the rank, whatever x holds. */
static void put_h(const float *sums, int rank, uint16_t *tiles) {
    for (int row = 0; row < SIDE; row++) {
        const __m512 a = _mm512_load_ps(sums + row * SIDE), b = _mm512_load_ps(sums + row * SIDE + 16);
        _mm512_store_si512(tiles + row * SIDE, _mm512_maskz_mov_epi16(first(rank), (__m512i)_mm512_cvtne2ps_pbh(b, a)));
    }
}

static __m512 widened(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

static void add(const float *sums, uint16_t *y, ptrdiff_t stride, const int32_t *rows, int count, int outputs) {
    const __mmask32 used = first(outputs);
    for (int row = 0; row < count; row++) {
        uint16_t *to = y + rows[row] * stride;
        const __m512i old = _mm512_maskz_loadu_epi16(used, to);
        const __m512 a = _mm512_add_ps(_mm512_load_ps(sums + row * SIDE), widened(_mm512_castsi512_si256(old)));
        const __m512 b = _mm512_add_ps(_mm512_load_ps(sums + row * SIDE + 16), widened(_mm512_extracti64x4_epi64(old, 1)));
        _mm512_mask_storeu_epi16(to, used, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

/* What is added to next: a column of rows is no order that processors foresee. */
static void fetch(const Lora *in, const int32_t *rows, int count, int column) {
    for (int row = 0; row < count; row++) _mm_prefetch((const char *)((const uint16_t *)in->y + rows[row] * in->stride_y + column), _MM_HINT_T0);
}

static void update(const Lora *in, const Room *room, const int32_t *rows, int count, int rank) {
    const int steps = blocks(in->inputs), ranks = blocks(rank), both = count > 16;
    float sums[SIDE * SIDE] __attribute__((aligned(64))) = {0};
    pack_rows(in->x, in->stride_x, rows, count, in->inputs, room->x);
    if (both) pack_rows(in->x, in->stride_x, rows + 16, count - 16, in->inputs, room->x + TILE);
    for (int r = 0; r < ranks; r++) {
        multiply(room->x, room->a + (size_t)r * steps * PAIR, steps, both, rank - r * SIDE > 16, PAIR, sums);
        put_h(sums, rank - r * SIDE, room->h + (size_t)r * PAIR);
    }
    for (int n = 0; n < in->outputs; n += SIDE) {
        fetch(in, rows, count, n + SIDE);
        multiply(room->h, room->b + (size_t)(n / SIDE) * ranks * PAIR, ranks, both, 1, 0, sums);
        add(sums, (uint16_t *)in->y + n, in->stride_y, rows, count, in->outputs - n);
    }
}

/* A thread's share of the blocks of rows. */
static void share(const Lora *in, const Room *room, int64_t from, int64_t to) {
    int64_t at = 0;
    for (int s = 0; s < in->segments_count && at < to; s++) {
        const int32_t *segment = in->segments + 4 * s;
        const int slot = segment[0], rank = segment[3], count = blocks(segment[2] - segment[1]);
        const int begin = from > at ? (int)(from - at) : 0, end = to - at < count ? (int)(to - at) : count;
        at += count;
        if (begin >= end) continue;
        pack_a(in, in->table_a + slot * in->stride_table_a, rank, room->a);
        pack_b(in, in->table_b + slot * in->stride_table_b, rank, room->b);
        for (int block = begin; block < end; block++) {
            const int start = segment[1] + block * SIDE, left = segment[2] - start;
            update(in, room, in->order + start, left < SIDE ? left : SIDE, rank);
        }
    }
}

/* 0: done; 1: there is no memory to work in, and y is in part as it was. */
int lora_of_tiles(const Lora *in) {
    int64_t total = 0;
    for (int s = 0; s < in->segments_count; s++) total += blocks(in->segments[4 * s + 2] - in->segments[4 * s + 1]);
    int failed = 0;
#pragma omp parallel num_threads(in->threads) reduction(| : failed)
    {
        const int id = omp_get_thread_num(), count = omp_get_num_threads();
        const Room room = {room_for(in->most_rank, in->inputs), room_for(in->outputs, in->most_rank), room_for(SIDE, in->inputs),
                           room_for(SIDE, in->most_rank)};
        failed = !room.a || !room.b || !room.x || !room.h;
        if (!failed) {
            configure();
            share(in, &room, total * id / count, total * (id + 1) / count);
            _tile_release();
        }
        free(room.a);
        free(room.b);
        free(room.x);
        free(room.h);
    }
    return failed;
}
#endif
