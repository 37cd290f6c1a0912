/* Products by AMX (products.h): sums of up to 16 x 32 numbers in tile registers. */

#define AMX 1
#define EVEN 8 /* the pairs of a sum are a multiple of it */

/* Tile registers: sums (0 to 3) and left factors (4; 5 for eight pairs) of ``tall`` rows; right
   factors (6; 7 for eight pairs). The sums of one tile are in 0, 1 and 2, one for each of its
   vectors; those of two tiles in 0 and 1, and in 2 and 3. */
static void begin(int tall) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {1,
               0,
               {0},
               {64, 64, 64, 64, 64, 32, 64, 64},
               {tall, tall, tall, tall, tall, tall, 16, 8}};
    /* Not by _tile_loadconfig, which tells gcc that only a part of ``tiles`` is read. */
    __asm__ volatile("ldtilecfg %0" : : "m"(tiles));
}

static void end(void) { _tile_release(); }

INLINE void clear(F sum[][TALL][WIDE], int tall, int wide, int high) {
    __asm__ volatile("" ::: "memory"); /* what tiles will load must be written by now */
    _tile_zero(0);
    if (high > 1) _tile_zero(2);
    if (wide > 1) _tile_zero(1);
    if (wide > 1 && high > 1) _tile_zero(3);
}

/* Add the products of the next pairs, from k on, to the sums, with registers for so many pairs. */
#define MULTIPLY(LEFT, RIGHT)                                                                    \
    do {                                                                                         \
        _tile_loadd(RIGHT, right[0] + 2 * k * columns, 4 * columns);                             \
        _tile_loadd(LEFT, left[0] + 2 * k, 2 * stride);                                          \
        _tile_dpbf16ps(0, LEFT, RIGHT);                                                          \
        if (high > 1) {                                                                          \
            _tile_loadd(LEFT, left[1] + 2 * k, 2 * stride);                                      \
            _tile_dpbf16ps(2, LEFT, RIGHT);                                                      \
        }                                                                                        \
        if (wide > 1) {                                                                          \
            _tile_loadd(RIGHT, right[1] + 2 * k * columns, 4 * columns);                         \
            if (high > 1) {                                                                      \
                _tile_dpbf16ps(3, LEFT, RIGHT);                                                  \
                _tile_loadd(LEFT, left[0] + 2 * k, 2 * stride);                                  \
            }                                                                                    \
            _tile_dpbf16ps(1, LEFT, RIGHT);                                                      \
        }                                                                                        \
        if (wide > 2) {                                                                          \
            _tile_loadd(RIGHT, right[2] + 2 * k * columns, 4 * columns);                         \
            _tile_dpbf16ps(2, LEFT, RIGHT);                                                      \
        }                                                                                        \
    } while (0)

/* As in registers.h; ``many`` is a multiple of 8. */
INLINE void tile(F sum[][TALL][WIDE], const T *const *left, int64_t stride,
                 const T *const *right, int64_t columns, int64_t many, int tall, int wide,
                 int high) {
    int64_t k = 0;
    for (; k + 16 <= many; k += 16) MULTIPLY(4, 6);
    if (k < many) MULTIPLY(5, 7);
}

INLINE void done(F sum[][TALL][WIDE], int wide, int high) {
    _tile_stored(0, &sum[0][0][0], sizeof sum[0][0]);
    if (wide > 1) _tile_stored(1, &sum[0][0][1], sizeof sum[0][0]);
    if (high > 1) _tile_stored(2, &sum[1][0][0], sizeof sum[0][0]);
    if (wide > 1 && high > 1) _tile_stored(3, &sum[1][0][1], sizeof sum[0][0]);
}

/* As in registers.h, or with three vectors in a row of the tile; ``many`` is a multiple of 8. */
INLINE void weigh(const T *dy, int64_t i, int64_t n, const T *const *a, int64_t columns,
                  int64_t many, float *const *dw, int64_t row, int tall, int wide) {
    const T *left = dy + 2 * i * many;
    __asm__ volatile("" ::: "memory");
#define EACH(DO)                                                                                 \
    DO(0, dw[0], 4 * row);                                                                       \
    if (wide > 1) DO(1, dw[1], 4 * row);                                                         \
    if (wide > 2) DO(2, dw[2], 4 * row);
    EACH(_tile_loadd)
    tile(0, &left, 2 * many, a, columns, many, tall, wide, 1);
    EACH(_tile_stored)
#undef EACH
}

/* Transpose sixteen rows of sixteen: first within groups of four rows, then the groups. */
INLINE void transpose(U m[LANES]) {
    __m512i a[LANES], b[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)m[i], (__m512i)m[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)m[i], (__m512i)m[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            b[i + 2 * k] = _mm512_unpacklo_epi64(a[i + k], a[i + 2 + k]);
            b[i + 2 * k + 1] = _mm512_unpackhi_epi64(a[i + k], a[i + 2 + k]);
        }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 8)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            a[i + k] = _mm512_shuffle_i32x4(b[i + k], b[i + 4 + k], 0x88);
            a[i + 4 + k] = _mm512_shuffle_i32x4(b[i + k], b[i + 4 + k], 0xdd);
        }
#pragma GCC unroll 16
    for (int k = 0; k < 8; k++) {
        m[k] = (U)_mm512_shuffle_i32x4(a[k], a[8 + k], 0x88);
        m[8 + k] = (U)_mm512_shuffle_i32x4(a[k], a[8 + k], 0xdd);
    }
}

/* Lay ``many`` pairs of rows of n numbers output by output: [n][many][2]. */
static void lay_pairs(const T *rows, T *to, int64_t many, int64_t n) {
    for (int64_t k = 0; k < many; k += LANES) {
        int64_t left = many - k < LANES ? many - k : LANES;
        for (int64_t j = 0; j < n; j += LANES) {
            U m[LANES] = {0};
            const T *from = rows + 2 * k * n + j;
            for (int64_t i = 0; i < left; i++, from += 2 * n) m[i] = pairs(from, from + n);
            transpose(m);
            for (int64_t i = 0; i < LANES; i++)
                _mm512_mask_storeu_epi32(to + 2 * ((j + i) * many + k), (1 << left) - 1,
                                         (__m512i)m[i]);
        }
    }
}
