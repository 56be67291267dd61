/* Grouped LoRA of few rows; see native.py. */
#include <stdlib.h>

#include "grouped_lora/rows.h"

/* 0: done; 1: there is no memory for the inner vectors. */
int lora_of_rows(const Lora *in) {
    float *h = malloc(sizeof(float) * in->rows * in->most_rank);
    if (!h) return 1;
    if (in->kind == BF16)
        lora_in_team(in, h, BF16);
    else
        lora_in_team(in, h, FP32);
    free(h);
    return 0;
}
