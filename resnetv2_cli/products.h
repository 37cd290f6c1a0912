/* BN, ReLU and the convolution behind them as one operation on bf16, in training: what pointwise.c
   and conv3x3.c share.

   With a = max(scale x + shift, least), rounded to bf16 as it would be in memory, which it never
   sees, where least is 0 (ReLU), or a NaN for a convolution alone, above which is all:
     forward    y = a * W + plus
     backward   g = (dy * W') where a > least;  dW = dy' * a
                dx = scale g + slope x + offset + plus
   x, a, g, dx have c channels; y, dy have n; W, dW: [n][taps][c] in float. Sums of products are
   floats. ``plus`` may be null: it is the other side of an addition, which then costs no pass of
   its own.

   A block (rows, or an image) is gone through by tiles of sums. The processor multiplies and adds
   pairs of bf16, so each factor of a product lies as pairs along what is summed over: W by two
   inputs (forward) or two outputs (backward), a and dy by two rows (dW). The sums of a tile are
   16 or 24 vector registers: fewer, and each waits for its last product; more, and the factors have
   none. Where the processor has AMX, they are in up to four of its eight registers of tiles, into
   which it adds the products of 16 rows of sixteen pairs with 16 columns of them at once, or of
   eight pairs at the end. To load a factor takes about as long, so that each serves several sums
   where it can.

   What goes along the rows of a block for the columns of a tile is a function of its own for each
   shape of tile (COLUMNS): gcc keeps the sums in registers where nothing else asks for them. */

#include <stdio.h>
#include <stdlib.h>

#include "vectors.h"

#ifdef __AVX512BF16__

#define INLINE static inline __attribute__((always_inline))
#define WIDE 2 /* vectors in a row of a tile, at most */
#define TAPS 3 /* and of a tile of dW, of a 3x3 convolution */
#define TALL 16 /* rows of a tile, at most */

typedef struct Work Work; /* of a block: what its functions read and write */
typedef void Columns(const Work *of, int64_t j); /* of columns j on */

/* NAME by tiles of one shape. */
#define COLUMNS(NAME, TALL_, WIDE_)                                                              \
    static __attribute__((noinline)) void NAME##_##TALL_##x##WIDE_(const Work *of, int64_t j) {  \
        NAME(of, j, TALL_, WIDE_);                                                               \
    }

/* All columns, by tiles of one vector and of two. */
static void each_column(Columns *const by[2], const Work *of, int64_t columns) {
    int64_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) by[1](of, j);
    for (; j < columns; j += LANES) by[0](of, j);
}

INLINE F dot(F sum, U a, U b) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

/* A NaN stays one. */
INLINE F at_least(F least, F z) { return (F)_mm512_max_ps((__m512)least, (__m512)z); }

/* x where z is above least, or a NaN; elsewhere 0. */
INLINE F where_above(F z, F least, F x) {
    __mmask16 above = _mm512_cmp_ps_mask((__m512)z, (__m512)least, _CMP_NLE_UQ);
    return (F)_mm512_maskz_mov_ps(above, (__m512)x);
}

/* The first of two vectors to bf16, and then the other. */
INLINE U both(F first, F other) {
    return (U)_mm512_cvtne2ps_pbh((__m512)other, (__m512)first);
}

/* The first half and the other, as pairs of one number from each. */
INLINE U woven(U both) {
    static const uint16_t order[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                              21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                              11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (U)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)both);
}

/* Two vectors to bf16, as pairs of one number from each. */
INLINE U interleaved(F low, F high) { return woven(both(low, high)); }

INLINE void store_row(uint16_t *p, const F *x, int wide) {
    if (wide == 2)
        *(U_ *)p = both(x[0], x[1]);
    else
        store_bf16(p, x[0]);
}

/* The numbers at low and at high, as pairs. */
INLINE U pairs(const uint16_t *low, const uint16_t *high) {
    __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low));
    return woven((U)_mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *)high), 1));
}

/* The pair at p, sixteen times. */
INLINE U spread(const uint16_t *p) {
    uint32_t both;
    memcpy(&both, p, sizeof both);
    return (U)_mm512_set1_epi32(both);
}

#ifdef __AMX_BF16__
#include "amx.h"
#else
#include "avx512.h"
#endif

/* a of a row; saved: of BN, [5][c] of mean, 1 / std, scale, shift and least. */
INLINE void activate(const uint16_t *x, const float *saved, uint16_t *a, int64_t c, int wide) {
    F z[WIDE];
    soon(x);
    for (int v = 0; v < wide; v++) {
        const float *of = saved + v * LANES;
        F u = load_float(of + 2 * c) * load_bf16(x + v * LANES) + load_float(of + 3 * c);
        z[v] = at_least(load_float(of + 4 * c), u);
    }
    store_row(a, z, wide);
}

/* a of ``rows`` rows. */
static void activate_rows(const uint16_t *x, const float *saved, uint16_t *a, int64_t rows,
                          int64_t c) {
    for (int64_t i = 0; i < rows * c; i += c) {
        int64_t j = 0;
        for (; j + 2 * LANES <= c; j += 2 * LANES) activate(x + i + j, saved + j, a + i + j, c, 2);
        for (; j < c; j += LANES) activate(x + i + j, saved + j, a + i + j, c, 1);
    }
}

/* A tile of sums, and plus, to y. */
INLINE void put(F sum[TALL][WIDE], const uint16_t *plus, uint16_t *y, int64_t n, int tall,
                int wide) {
#pragma GCC unroll 16
    for (int r = 0; r < tall; r++) {
        for (int v = 0; plus && v < wide; v++) sum[r][v] += load_bf16(plus + r * n + v * LANES);
        store_row(y + r * n, sum[r], wide);
    }
}

/* A tile by pairs of rows, ``columns`` of them. */
INLINE void put_pairs(F sum[TALL][WIDE], uint16_t *a, int64_t columns, int tall, int wide) {
#pragma GCC unroll 8
    for (int r = 0; r < tall; r += 2)
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++)
            *(U_ *)(a + r * columns + 2 * v * LANES) = interleaved(sum[r][v], sum[r + 1][v]);
}

/* g of a tile, from sums of dy * W', and its sums s and q; a is left in the tile. */
INLINE void let_through(F sum[TALL][WIDE], const uint16_t *x, uint16_t *g, const float *saved, F *s,
                        F *q, int64_t c, int tall, int wide) {
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) {
        const float *of = saved + v * LANES;
        F mean = load_float(of), scale = load_float(of + 2 * c), shift = load_float(of + 3 * c);
        F least = load_float(of + 4 * c);
#pragma GCC unroll 16
        for (int r = 0; r < tall; r++) {
            int64_t i = r * c + v * LANES;
            F u = load_bf16(x + i), z = scale * u + shift, d = where_above(z, least, sum[r][v]);
            store_bf16(g + i, d);
            s[v] += d;
            q[v] += d * (u - mean);
            sum[r][v] = at_least(least, z);
        }
    }
}

INLINE void widen_both(double *sums, const F *s, const F *q, int64_t c, int wide) {
    for (int v = 0; v < wide; v++) {
        widen(sums + v * LANES, s[v]);
        widen(sums + c + v * LANES, q[v]);
    }
}

/* W as pairs of inputs, c of them with every tap's: [c / 2][n][2]; each thread makes a part. */
static void pack_inputs(const float *weight, uint16_t *w, int64_t c, int64_t n) {
#pragma omp for
    for (int64_t k = 0; k < c; k += 2)
        for (int64_t j = 0; j < n; j += LANES) {
            F low, high;
            for (int i = 0; i < LANES; i++) {
                low[i] = weight[(j + i) * c + k];
                high[i] = weight[(j + i) * c + k + 1];
            }
            *(U_ *)(w + k * n + 2 * j) = interleaved(low, high);
        }
}

/* W as pairs of outputs, its taps from the last to the first: [taps][n / 2][c][2]. */
static void pack_outputs(const float *weight, uint16_t *w, int64_t c, int64_t n, int64_t taps) {
#pragma omp for
    for (int64_t k = 0; k < n; k += 2)
        for (int64_t t = 0; t < taps; t++)
            for (int64_t j = 0; j < c; j += LANES) {
                const float *from = weight + (k * taps + taps - 1 - t) * c + j;
                F low = load_float(from), high = load_float(from + taps * c);
                *(U_ *)(w + (t * n + k) * c + 2 * j) = interleaved(low, high);
            }
}

/* Numbers rounded up to whole lines of a cache. */
static inline int64_t lines(int64_t numbers) { return (numbers + 31) / 32 * 32; }

/* Room of a thread for so many numbers, on a line. It keeps it: its stack may be small, and new
   room would be new to the process each time. */
static uint16_t *room(int64_t numbers) {
    static __thread uint16_t *kept;
    static __thread int64_t size;
    if (size < numbers) {
        free(kept);
        kept = aligned_alloc(64, 2 * lines(numbers));
        if (!kept) {
            fputs("no memory for what a convolution keeps aside\n", stderr);
            abort();
        }
        size = numbers;
    }
    return kept;
}

/* Sums of x - origin and of its square, of ``wide`` vectors of ``high`` rows at a time. */
INLINE void moments(const uint16_t *x, const float *origin, double *sums, int64_t rows, int64_t c,
                    int wide, int high) {
    F s[4], q[4];
#pragma GCC unroll 4
    for (int v = 0; v < wide * high; v++) s[v] = q[v] = (F){0};
    for (int64_t r = 0; r < rows; r += high)
#pragma GCC unroll 4
        for (int v = 0; v < wide * high; v++) {
            const uint16_t *from = x + (r + v / wide) * c + v % wide * LANES;
            if (v % wide % 2 == 0) soon(from);
            F d = load_bf16(from) - load_float(origin + v % wide * LANES);
            s[v] += d;
            q[v] += d * d;
        }
#pragma GCC unroll 4
    for (int v = wide; v < wide * high; v++) {
        s[v % wide] += s[v];
        q[v % wide] += q[v];
    }
    widen_both(sums, s, q, c, wide);
}

/* The same of rows first to last. */
static void count(const uint16_t *x, const float *origin, double *sums, int64_t first, int64_t last,
                  int64_t c) {
    memset(sums, 0, 2 * c * sizeof(double));
    for (int64_t b = first; b < last; b += BLOCK) {
        int64_t many = b + BLOCK < last ? BLOCK : last - b, j = 0;
        for (; j + 4 * LANES <= c; j += 4 * LANES)
            moments(x + b * c + j, origin + j, sums + j, many, c, 4, 1);
        for (; j < c; j += LANES) {
            int64_t whole = many / 4 * 4;
            moments(x + b * c + j, origin + j, sums + j, whole, c, 1, 4);
            moments(x + (b + whole) * c + j, origin + j, sums + j, many - whole, c, 1, 1);
        }
    }
}

/* The parts of dW by the other threads, added to the first's in their order. */
static void add_parts(float *dw, const float *parts, int64_t numbers) {
#pragma omp for
    for (int64_t i = 0; i < numbers; i += LANES)
        for (int t = 1; t < omp_get_num_threads(); t++)
            *(F_ *)(dw + i) += load_float(parts + numbers * (t - 1) + i);
}

/* dx of rows first to last, where g stands: of BN, or ``alone`` of none. */
static void normalized(uint16_t *dx, const uint16_t *x, const uint16_t *plus, const float *scale,
                       const float *slope, const float *offset, int64_t first, int64_t last,
                       int64_t c, int alone) {
    for (int64_t i = first * c; alone && i < last * c; i += LANES)
        store_bf16(dx + i, load_bf16(dx + i) + load_bf16(plus + i));
    for (int64_t r = first; !alone && r < last; r++)
        for (int64_t j = 0; j < c; j += LANES) {
            int64_t i = r * c + j;
            soon(x + i);
            soon(dx + i);
            if (plus) soon(plus + i);
            F v = load_float(scale + j) * load_bf16(dx + i) +
                  (load_float(slope + j) * load_bf16(x + i) + load_float(offset + j));
            store_bf16(dx + i, plus ? v + load_bf16(plus + i) : v);
        }
}

#endif
