/* Grouped LoRA of few rows: weights are read where they lie in their pools. Its halves are for teams of threads that are
 * there already. */
#ifndef WEFT_LORA_ROWS_H
#define WEFT_LORA_ROWS_H

#include <omp.h>
#include <stddef.h>

#include "grouped_lora/lora.h"
#include "vectors.h"

enum { TOGETHER = 4, WIDE = 4 * LANES };

INLINE int parts_of(int count, int size) { return (count + size - 1) / size; }

/* h[row, j] = A[j] x[row] for up to TOGETHER rows and as many j, rounded as x is. */
INLINE void shrink(const Lora *in, const int32_t *rows, int count, const int32_t *table, int ranks, float *h, Kind kind) {
    vec lanes[TOGETHER * TOGETHER] = {{0}};
    const void *x[TOGETHER], *a[TOGETHER];
    for (int k = 0; k < TOGETHER; k++) { /* what there is not is computed twice and not kept */
        x[k] = at(in->x, rows[k < count ? k : 0] * in->stride_x, kind);
        a[k] = at(in->a, (size_t)table[k < ranks ? k : 0] * in->inputs, kind);
    }
    int i = 0;
    const size_t ahead = (size_t)TOGETHER * in->inputs; /* where the next rows of A are likely to be */
#ifdef __AVX512BF16__ /* pairs of bf16 at once, without widening */
    for (; kind == BF16 && i + 2 * LANES <= in->inputs; i += 2 * LANES) {
        for (int j = 0; j < TOGETHER; j++) __builtin_prefetch(at(a[j], i + ahead, kind));
        __m512bh weights[TOGETHER];
        for (int j = 0; j < TOGETHER; j++) weights[j] = (__m512bh)_mm512_loadu_si512(at(a[j], i, kind));
        for (int row = 0; row < TOGETHER; row++) {
            const __m512bh values = (__m512bh)_mm512_loadu_si512(at(x[row], i, kind));
            for (int j = 0; j < TOGETHER; j++) {
                vec *to = lanes + row * TOGETHER + j;
                *to = (vec)_mm512_dpbf16_ps((__m512)*to, weights[j], values);
            }
        }
    }
#endif
    for (; i + LANES <= in->inputs; i += LANES) {
        vec weights[TOGETHER];
        for (int j = 0; j < TOGETHER; j++) weights[j] = load(at(a[j], i, kind), kind);
        for (int row = 0; row < TOGETHER; row++) {
            const vec values = load(at(x[row], i, kind), kind);
            for (int j = 0; j < TOGETHER; j++) lanes[row * TOGETHER + j] += weights[j] * values;
        }
    }
    const vec found = sums(lanes);
    for (int row = 0; row < count; row++)
        for (int j = 0; j < ranks; j++) {
            float total = found[row * TOGETHER + j];
            for (int rest = i; rest < in->inputs; rest++)
                total += load1(at(a[j], rest, kind), kind) * load1(at(x[row], rest, kind), kind);
            uint32_t rounded;
            store1(&rounded, total, kind);
            h[(size_t)row * in->most_rank + j] = load1(&rounded, kind);
        }
}

/* y[row, from .. from + WIDE) += sum_j h[row, j] B[j] for up to TOGETHER rows, as far as there are columns. */
INLINE void expand(const Lora *in, const int32_t *rows, int count, const int32_t *table, int rank, const float *h, int from,
                   Kind kind) {
    if (from + WIDE <= in->outputs) {
        vec sums[TOGETHER][4] = {{{0}}};
        for (int j = 0; j < rank; j++) {
            const void *b = at(in->b, (size_t)table[j] * in->outputs + from, kind);
            /* What the next columns need of this row: a column of rows is no order that processors foresee. */
            for (size_t line = 0; line < WIDE * size_of(kind); line += 64) __builtin_prefetch((const char *)b + WIDE * size_of(kind) + line);
            vec weights[4];
            for (int part = 0; part < 4; part++) weights[part] = load(at(b, part * LANES, kind), kind);
            for (int row = 0; row < TOGETHER; row++)
                for (int part = 0; part < 4; part++)
                    sums[row][part] += weights[part] * h[(size_t)(row < count ? row : 0) * in->most_rank + j];
        }
        for (int row = 0; row < count; row++)
            for (int part = 0; part < 4; part++) {
                void *y = (void *)at(in->y, rows[row] * in->stride_y + from + part * LANES, kind);
                store(y, load(y, kind) + sums[row][part], kind);
            }
        return;
    }
    for (int row = 0; row < count; row++)
        for (int column = from; column < in->outputs; column++) {
            float total = 0;
            for (int j = 0; j < rank; j++)
                total += h[(size_t)row * in->most_rank + j] * load1(at(in->b, (size_t)table[j] * in->outputs + column, kind), kind);
            void *y = (void *)at(in->y, rows[row] * in->stride_y + column, kind);
            store1(y, load1(y, kind) + total, kind);
        }
}

/* The share of `items` that is a thread's: [from, to). */
typedef struct {
    int64_t from, to;
} Share;

INLINE Share share_of(int64_t items, int id, int threads) { return (Share){items * id / threads, items * (id + 1) / threads}; }

/* A part of a slot's rows. */
typedef struct {
    const int32_t *rows;
    int count;
    float *h;
} Block;

INLINE Block block_of(const Lora *in, float *h, const int32_t *segment, int index) {
    const int first = segment[1] + index * TOGETHER, left = segment[2] - first;
    return (Block){in->order + first, left < TOGETHER ? left : TOGETHER, h + (size_t)first * in->most_rank};
}

/* A thread's share of the inner vectors, all of which must be there before any thread goes on.
 * h: [rows in `order`, most_rank] */
INLINE void shrink_share(const Lora *in, float *h, int id, int threads, Kind kind) {
    for (int s = 0; s < in->segments_count; s++) {
        const int32_t *segment = in->segments + 4 * s, *table = in->table_a + segment[0] * in->stride_table_a;
        const int rank = segment[3], blocks = parts_of(segment[2] - segment[1], TOGETHER), ranks = parts_of(rank, TOGETHER);
        const Share own = share_of((int64_t)blocks * ranks, id, threads);
        for (int64_t item = own.from; item < own.to; item++) {
            const Block block = block_of(in, h, segment, item / ranks);
            const int j = item % ranks * TOGETHER;
            shrink(in, block.rows, block.count, table + j, rank - j < TOGETHER ? rank - j : TOGETHER, block.h + j, kind);
        }
    }
}

/* What is added to some parts of WIDE columns. */
INLINE void expand_share(const Lora *in, float *h, Share parts, Kind kind) {
    for (int s = 0; s < in->segments_count; s++) {
        const int32_t *segment = in->segments + 4 * s, *table = in->table_b + segment[0] * in->stride_table_b;
        const int blocks = parts_of(segment[2] - segment[1], TOGETHER);
        for (int64_t part = parts.from; part < parts.to; part++)
            for (int index = 0; index < blocks; index++) {
                const Block block = block_of(in, h, segment, index);
                expand(in, block.rows, block.count, table, segment[3], block.h, part * WIDE, kind);
            }
    }
}

/* All of it, by a team of its own. */
INLINE void lora_in_team(const Lora *in, float *h, Kind kind) {
#pragma omp parallel num_threads(in->threads)
    {
        const int id = omp_get_thread_num(), threads = omp_get_num_threads();
        shrink_share(in, h, id, threads, kind);
#pragma omp barrier
        expand_share(in, h, share_of(parts_of(in->outputs, WIDE), id, threads), kind);
    }
}

#endif
