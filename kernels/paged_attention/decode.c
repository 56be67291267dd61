/* Attention of rows with one new token each over keys and values in pages, and the write into these; see __init__.py.
 *
 * A row's tokens are cut into chunks of a fixed length, so that long rows are shared between threads and a row's result
 * does not depend on what else is in the batch. A chunk goes through its keys and values once each, in the order they
 * lie in memory, for all heads: running maximum, denominator and sum of values, as in FlashAttention. Chunks of a row are
 * joined in order.
 */
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdlib.h>

#include "vectors.h"

enum { CHUNK = 256, FEW = 256 };

typedef struct {
    const void *q, *k_cache, *v_cache;
    void *out;
    const int32_t *tokens;  /* [rows], where the row's token is in q and out */
    const int32_t *lengths; /* [rows] */
    const int32_t *pages;   /* [rows, max_pages] */
    const float *sinks;     /* [heads] or NULL */
    int rows, max_pages, page_size, heads, kv_heads, d, d_v;
    int window; /* 0: none */
    float scale;
    float softcap; /* 0: none */
    ptrdiff_t stride_token, stride_head; /* of q, elements */
    int kind, threads;
} Decode;

/* What is known of some tokens: for every head the maximum of the scores, sum_j e^(s_j - maximum), and the sum of values
 * weighed by the same. */
typedef struct {
    float *maximum, *total, *values;
} Partial;

static Partial partial_at(float *memory, const Decode *in, int index) {
    float *own = memory + (size_t)index * in->heads * (in->d_v + 2);
    return (Partial){own, own + in->heads, own + 2 * in->heads};
}

/* values[0 .. d) = values * keep + sum_t weights[t] v[t], v's rows being `stride` elements apart. */
INLINE void add_values(float *values, float keep, const float *weights, const void *v, int count, ptrdiff_t stride, int d,
                       Kind kind) {
    int i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) {
        vec sums[4];
        for (int j = 0; j < 4; j++) sums[j] = load(values + i + j * LANES, FP32) * keep;
        for (int t = 0; t < count; t++)
            for (int j = 0; j < 4; j++) sums[j] += load(at(v, t * stride + i + j * LANES, kind), kind) * weights[t];
        for (int j = 0; j < 4; j++) store(values + i + j * LANES, sums[j], FP32);
    }
    for (; i + LANES <= d; i += LANES) {
        vec sums = load(values + i, FP32) * keep;
        for (int t = 0; t < count; t++) sums += load(at(v, t * stride + i, kind), kind) * weights[t];
        store(values + i, sums, FP32);
    }
    for (; i < d; i++) {
        float total = values[i] * keep;
        for (int t = 0; t < count; t++) total += load1(at(v, t * stride + i, kind), kind) * weights[t];
        values[i] = total;
    }
}

/* Scores of a head with up to LANES tokens, -inf where there are no more. */
INLINE vec scores(const Decode *in, const void *q, const char *k, int count, size_t stride, Kind kind) {
    vec lanes[LANES] = {{0}}, result;
    for (int t = 0; t < count; t++) lanes[t] = products(q, k + t * stride, in->d, kind);
    result = sums(lanes) * in->scale;
    for (int t = 0; in->softcap && t < count; t++) result[t] = in->softcap * tanhf(result[t] / in->softcap);
    const ints none = (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} >= count;
    return (vec)(((ints)splat(-INFINITY) & none) | ((ints)result & ~none));
}

/* Weights e^(s - maximum) of scores; the new maximum and total are kept, and what older sums are worth is returned. */
INLINE float weigh(vec scores, float weights[LANES], float *maximum, float *total) {
    vec all = larger(scores, splat(*maximum));
    all = larger(all, __builtin_shuffle(all, (ints){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    all = larger(all, __builtin_shuffle(all, (ints){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    all = larger(all, __builtin_shuffle(all, (ints){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
    all = larger(all, __builtin_shuffle(all, (ints){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
    if (all[0] == -INFINITY) { /* minus itself it would be NaN */
        memset(weights, 0, sizeof(float) * LANES);
        return 1;
    }
    const float keep = exponential(splat(*maximum) - all)[0];
    const vec shares = exponential(scores - all);
    store(weights, shares, FP32);
    *maximum = all[0];
    *total = *total * keep + sum(shares);
    return keep;
}

/* Tokens that lie together in a page, from token `first` of a row on. */
typedef struct {
    const char *k, *v;
    int count;
} Run;

INLINE Run run_from(const Decode *in, int row, int first, int stop, Kind kind) {
    const int place = first % in->page_size, rest = in->page_size - place;
    int count = rest < stop - first ? rest : stop - first;
    if (count > LANES) count = LANES;
    if (count <= 0) return (Run){NULL, NULL, 0};
    const int32_t page = in->pages[(size_t)row * in->max_pages + first / in->page_size];
    const size_t token = ((size_t)page * in->page_size + place) * in->kv_heads;
    return (Run){at(in->k_cache, token * in->d, kind), at(in->v_cache, token * in->d_v, kind), count};
}

/* One head's vectors are as far apart as all heads are long: an order that processors do not foresee. */
INLINE void foresee(const char *from, int count, size_t stride, size_t bytes) {
    for (int t = 0; t < count; t++)
        for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + t * stride + line);
}

INLINE void attend(const Decode *in, int row, int start, int stop, char *q, Partial to, Kind kind) {
    const int group = in->heads / in->kv_heads;
    const size_t k_head = in->d * size_of(kind), k_token = in->kv_heads * k_head;
    const size_t v_head = in->d_v * size_of(kind), v_token = in->kv_heads * v_head;
    for (int head = 0; head < in->heads; head++) {
        const size_t from = in->tokens[row] * in->stride_token + head * in->stride_head;
        memcpy(q + head * k_head, at(in->q, from, kind), k_head);
        to.maximum[head] = -INFINITY;
        to.total[head] = 0;
    }
    memset(to.values, 0, sizeof(float) * in->heads * in->d_v);
    Run now = run_from(in, row, start, stop, kind), next;
    for (int first = start; now.count; now = next) {
        first += now.count;
        next = run_from(in, row, first, stop, kind);
        for (int kv = 0; kv < in->kv_heads; kv++) {
            foresee(next.k + kv * k_head, next.count, k_token, k_head);
            foresee(next.v + kv * v_head, next.count, v_token, v_head);
            for (int head = kv * group; head < (kv + 1) * group; head++) {
                float weights[LANES];
                const vec found = scores(in, q + head * k_head, now.k + kv * k_head, now.count, k_token, kind);
                const float keep = weigh(found, weights, to.maximum + head, to.total + head);
                add_values(to.values + (size_t)head * in->d_v, keep, weights, now.v + kv * v_head, now.count,
                           (ptrdiff_t)in->kv_heads * in->d_v, in->d_v, kind);
            }
        }
    }
}

/* Joins a row's chunks in the first of them, and writes what they make. */
INLINE void finish(const Decode *in, int row, float *memory, int chunk, int chunks, Kind kind) {
    Partial all = partial_at(memory, in, chunk);
    for (int head = 0; head < in->heads; head++) {
        float *values = all.values + (size_t)head * in->d_v;
        for (int other = chunk + 1; other < chunk + chunks; other++) {
            const Partial more = partial_at(memory, in, other);
            const float highest = fmaxf(all.maximum[head], more.maximum[head]);
            if (highest == -INFINITY) continue;
            const float old = expf(all.maximum[head] - highest), new = expf(more.maximum[head] - highest);
            all.maximum[head] = highest;
            all.total[head] = all.total[head] * old + more.total[head] * new;
            for (int i = 0; i < in->d_v; i++)
                values[i] = values[i] * old + more.values[(size_t)head * in->d_v + i] * new;
        }
        float total = all.total[head];
        if (in->sinks) total += expf(in->sinks[head] - all.maximum[head]);
        const float share = 1 / total;
        char *to = (char *)in->out + ((size_t)in->tokens[row] * in->heads + head) * in->d_v * size_of(kind);
        int i = 0;
        for (; i + LANES <= in->d_v; i += LANES) store(to + i * size_of(kind), load(values + i, FP32) * share, kind);
        for (; i < in->d_v; i++) store1(to + i * size_of(kind), values[i] * share, kind);
    }
}

INLINE int run(const Decode *in, Kind kind) {
    int *first = malloc(sizeof(int) * (in->rows + 1)), failed = first == NULL;
    if (failed) return 1;
    first[0] = 0;
    for (int row = 0; row < in->rows; row++) {
        const int length = in->lengths[row], seen = in->window && in->window < length ? in->window : length;
        first[row + 1] = first[row] + (length - 1) / CHUNK - (length - seen) / CHUNK + 1;
    }
    const int chunks = first[in->rows];
    float *memory = malloc(sizeof(float) * chunks * in->heads * (in->d_v + 2));
    char *queries = malloc((size_t)in->threads * in->heads * in->d * size_of(kind));
    failed = memory == NULL || queries == NULL;
    if (!failed) {
#pragma omp parallel num_threads(in->threads)
        {
            char *q = queries + (size_t)omp_get_thread_num() * in->heads * in->d * size_of(kind);
#pragma omp for schedule(dynamic, 1)
            for (int chunk = 0; chunk < chunks; chunk++) {
                int row = 0;
                while (first[row + 1] <= chunk) row++;
                const int length = in->lengths[row], seen = in->window && in->window < length ? in->window : length;
                const int from = length - seen, at_chunk = from / CHUNK + chunk - first[row];
                const int start = at_chunk * CHUNK > from ? at_chunk * CHUNK : from;
                const int stop = (at_chunk + 1) * CHUNK < length ? (at_chunk + 1) * CHUNK : length;
                attend(in, row, start, stop, q, partial_at(memory, in, chunk), kind);
            }
#pragma omp for
            for (int row = 0; row < in->rows; row++) finish(in, row, memory, first[row], first[row + 1] - first[row], kind);
        }
    }
    free(first);
    free(memory);
    free(queries);
    return failed;
}

/* 0: done; 1: there is no memory for it. */
int decode(const Decode *in) { return in->kind == BF16 ? run(in, BF16) : run(in, FP32); }

/* Copies the vectors of new tokens to their places in a cache: [tokens, heads] of `bytes` each, strides in bytes. */
int write_cache(char *cache, const char *from, const int64_t *places, int tokens, int heads, size_t bytes,
                ptrdiff_t stride_token, ptrdiff_t stride_head, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens > FEW)
    for (int token = 0; token < tokens; token++)
        for (int head = 0; head < heads; head++)
            memcpy(cache + (places[token] * heads + head) * bytes, from + token * stride_token + head * stride_head, bytes);
    return 0;
}
