/* AMX by vectors, for processors without it: its registers of tiles, as the manual describes them.
   What the manual forbids ends the process. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AMX_BF16__ 1
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_release

typedef struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Shapes;

static __thread Shapes shapes;
static __thread uint8_t tiles_[8][16][64];

static Shapes *shaped(int t) {
    if (shapes.palette != 1 || !shapes.rows[t] || shapes.rows[t] > 16) __builtin_trap();
    return &shapes;
}

static void load_config(const void *from) {
    memcpy(&shapes, from, sizeof shapes);
    memset(tiles_, 0, sizeof tiles_);
}

static void _tile_release(void) { shapes.palette = 0; }

static void _tile_zero(int t) { memset(tiles_[t], 0, shaped(t)->rows[t] * sizeof tiles_[t][0]); }

static void _tile_loadd(int t, const void *from, int64_t stride) {
    Shapes *s = shaped(t);
    memset(tiles_[t], 0, sizeof tiles_[t]);
    for (int r = 0; r < s->rows[t]; r++)
        memcpy(tiles_[t][r], (const char *)from + r * stride, s->bytes[t]);
}

static void _tile_stored(int t, void *to, int64_t stride) {
    Shapes *s = shaped(t);
    for (int r = 0; r < s->rows[t]; r++)
        memcpy((char *)to + r * stride, tiles_[t][r], s->bytes[t]);
}

static void _tile_dpbf16ps(int sum, int left, int right) {
    Shapes *s = shaped(sum);
    int pairs = shaped(left)->bytes[left] / 4;
    if (pairs != shaped(right)->rows[right] || s->rows[left] != s->rows[sum] ||
        s->bytes[right] != s->bytes[sum])
        __builtin_trap();
    for (int r = 0; r < s->rows[sum]; r++)
        for (int k = 0; k < pairs; k++) {
            uint32_t pair;
            memcpy(&pair, tiles_[left][r] + 4 * k, sizeof pair);
            __m512 x = _mm512_loadu_ps(tiles_[sum][r]);
            x = _mm512_dpbf16_ps(x, (__m512bh)_mm512_loadu_si512(tiles_[right][k]),
                                 (__m512bh)_mm512_set1_epi32(pair));
            _mm512_storeu_ps(tiles_[sum][r], x);
        }
}
