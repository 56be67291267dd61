/* What a call of grouped LoRA is given; see native.py. */
#ifndef WEFT_LORA_H
#define WEFT_LORA_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    void *y;
    const void *x, *a, *b;            /* a: [pool rows, in], b: [pool rows, out] */
    const int32_t *table_a, *table_b; /* rows of the pools, by slot */
    const int32_t *order;             /* rows of the batch, sorted by slot */
    const int32_t *segments;          /* [segments, 4]: slot, start and stop in `order`, rank */
    int segments_count, rows /* in `order` */, inputs, outputs, most_rank;
    ptrdiff_t stride_x, stride_y, stride_table_a, stride_table_b; /* elements */
    int kind, threads;
} Lora;

#endif
