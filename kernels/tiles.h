/* Products of bf16 with sums in fp32 by the tiles of Intel's AMX: 32 rows times 32 columns at a time.
 *
 * The left operand is laid out as pairs of tiles, one pair for every 32 inputs: 16 rows of 32 inputs, then 16 rows more.
 * So is the right one: row p of a tile has the inputs 2p and 2p + 1 of 16 columns; the second tile has 16 columns more.
 */
#ifndef WEFT_TILES_H
#define WEFT_TILES_H

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define TILES
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 32, TILE = 16 * 32, PAIR = 2 * TILE, AHEAD = 4 * PAIR };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) TileConfig;

/* Linux lets a process use the tiles once it asked. 0: it may. */
int tiles_permitted(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }

static inline void configure(void) {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 64, config.rows[tile] = 16;
    _tile_loadconfig(&config);
}

static inline int blocks(int count) { return (count + SIDE - 1) / SIDE; }

/* A mask of the first of 32, as many as there are. */
static __mmask32 first(int count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0; }

/* Sixteen rows of as many words to columns. */
static inline void transpose(__m512i rows[16]) {
    for (int apart = 1; apart < 16; apart *= 2) {
        int32_t low[16], high[16]; /* lanes of two rows: those of the second are 16 and more */
        for (int lane = 0; lane < 16; lane++) {
            low[lane] = lane & apart ? 16 + lane - apart : lane;
            high[lane] = lane & apart ? 16 + lane : lane + apart;
        }
        const __m512i to_low = _mm512_loadu_si512(low), to_high = _mm512_loadu_si512(high);
        for (int row = 0; row < 16; row++) {
            if (row & apart) continue;
            const __m512i one = rows[row], other = rows[row + apart];
            rows[row] = _mm512_permutex2var_epi32(one, to_low, other);
            rows[row + apart] = _mm512_permutex2var_epi32(one, to_high, other);
        }
    }
}

/* A tile of the right operand of 16 columns, of which 32 inputs are given. */
static inline void pack_columns(__m512i columns[16], uint16_t *tile) {
    transpose(columns); /* pairs of inputs stay together */
    for (int p = 0; p < 16; p++) _mm512_store_si512(tile + p * SIDE, columns[p]);
}

/* Tiles of 16 rows, the first or second of each pair, as far as there are rows, and zeros for what there is not.
 * order: which rows of x; NULL: the first 16. */
static inline void pack_rows(const uint16_t *x, ptrdiff_t stride, const int32_t *order, int rows, int inputs, uint16_t *to) {
    const int steps = blocks(inputs);
    for (int row = 0; row < 16; row++) {
        const uint16_t *from = row >= rows ? x : x + (order ? order[row] : row) * stride;
        for (int k = 0; k < steps; k++) {
            const __mmask32 used = row >= rows ? 0 : first(inputs - k * SIDE);
            _mm512_store_si512(to + (size_t)k * PAIR + row * SIDE, _mm512_maskz_loadu_epi16(used, from + k * SIDE));
        }
    }
}

/* sums[32, 32] = x w over `steps` pairs of tiles of each; of the rows and of the columns both halves or the first.
 * ahead: elements between the weights in use and those that are fetched; 0 where both operands are near already. */
static inline void multiply(const uint16_t *x, const uint16_t *w, int steps, int both_rows, int both_columns, int ahead,
                            float *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < steps; k++, x += PAIR, w += PAIR) {
        for (int line = 0; ahead && line < PAIR; line += 32) {
            _mm_prefetch((const char *)(w + ahead + line), _MM_HINT_T0);
            _mm_prefetch((const char *)(x + PAIR + line), _MM_HINT_T0);
        }
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (both_columns) {
            _tile_loadd(7, w + TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (both_rows) {
            _tile_loadd(5, x + TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (both_columns) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if (both_rows) {
        _tile_stored(2, sums + 16 * SIDE, 128);
        _tile_stored(3, sums + 16 * SIDE + 16, 128);
    }
}
#else
int tiles_permitted(void) { return -1; }
#endif

#endif
