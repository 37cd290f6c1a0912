/* BN, ReLU and the following convolution as one operation, in training: what pointwise.c,
   winograd.c, conv3x3.c and patches.c share. It is compiled for tensors of X: bf16, or float
   (FLOATS). What it multiplies are numbers of T: the same, or float for both (WIDENED).

   With a = max(scale x + shift, least), rounded to T as if it were stored in memory, which it never
   is; least is 0 for ReLU, or a NaN for a convolution alone, which lets everything pass:
     forward    y = a * W + plus
     backward   g = (dy * W') where a > least;  dW = dy' * a
                dx = scale g + slope x + offset + plus
   x, a, g, dx have c channels; y, dy have n; W, dW: [n][taps][c] in float. Sums of products are
   floats. ``plus`` is the other operand of an addition, which so costs no pass of its own; it may
   be null.

   A block (rows, or an image) is computed in tiles of sums. The processor multiplies and adds
   pairs of bf16, so each factor of a product is stored in pairs along the dimension summed over: W
   in pairs of inputs (forward) or outputs (backward), a and dy in pairs of rows (dW). For float a
   pair is one number (PAIR). The sums of a tile take 16 vector registers, and 8 where there are
   16: with fewer, each sum waits for its last product; with more, the factors have no registers.
   With AMX the sums are in up to four of its eight tile registers; an instruction adds to one of
   them the products of 16 rows of sixteen pairs with 16 columns of them, or of eight pairs at the
   end. Loading a factor takes about as long, so each serves several sums where it can.

   The loop over the rows of a block, for the columns of a tile, is a function of its own for each
   shape of tile (COLUMNS): gcc keeps the sums in registers where nothing else needs registers. */

#include <stdio.h>
#include <stdlib.h>

#include "vectors.h"

#if defined FLOATS || defined WIDENED
#define FACTORS "floats.h"
#if defined __AVX512F__ || (defined __AVX2__ && defined __FMA__)
#define PRODUCTS /* the processor multiplies them fast */
#endif
#else
#define FACTORS "bf16.h"
#ifdef __AVX512BF16__
#define PRODUCTS
#endif
#endif
#ifdef PRODUCTS

#define INLINE static inline __attribute__((always_inline))
#define WIDE 2 /* vectors in a row of a tile, at most */
#ifdef __AVX512F__
#define TALL 16 /* rows of a tile, at most */
#else
#define TALL 8
#endif
#define LOW (TALL / 2)

#ifdef FLOATS
typedef float X;
#define NAME(FUNCTION) FUNCTION##_float
INLINE F load(const X *p) { return load_float(p); }
INLINE void store(X *p, F x) { store_float(p, x); }
#else
typedef uint16_t X;
#define NAME(FUNCTION) FUNCTION##_bf16
INLINE F load(const X *p) { return load_bf16(p); }
INLINE void store(X *p, F x) { store_bf16(p, x); }
#endif
#include FACTORS

typedef struct Work Work; /* of a block: what its functions read and write */
typedef void Columns(const Work *of, int64_t j); /* from column j on */

/* NAME for tiles of one shape. */
#define COLUMNS(NAME, SHAPE, TALL_, WIDE_)                                                       \
    static __attribute__((noinline)) void NAME##_##SHAPE(const Work *of, int64_t j) {            \
        NAME(of, j, TALL_, WIDE_);                                                               \
    }

/* All columns, in tiles of two vectors and then of one. */
static void each_column(Columns *const by[2], const Work *of, int64_t columns) {
    int64_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) by[1](of, j);
    for (; j < columns; j += LANES) by[0](of, j);
}

/* max(least, z); a NaN z stays one, and a NaN least gives z. */
INLINE F at_least(F least, F z) {
#ifdef __AVX512F__
    return (F)_mm512_max_ps((__m512)least, (__m512)z);
#else
    U below = (U)(least > z);
    return (F)((U)least & below | (U)z & ~below);
#endif
}

/* x where z is above least, or a NaN; elsewhere 0. */
INLINE F where_above(F z, F least, F x) {
#ifdef __AVX512F__
    __mmask16 above = _mm512_cmp_ps_mask((__m512)z, (__m512)least, _CMP_NLE_UQ);
    return (F)_mm512_maskz_mov_ps(above, (__m512)x);
#else
    return only(x, ~(U)(z <= least));
#endif
}

#if defined __AMX_BF16__ && PAIR > 1
#include "amx.h"
#else
#include "registers.h"
#endif

/* a of a row; saved: [5][c] of BN's mean, 1 / std, scale and shift, and of least. */
INLINE void activate(const X *x, const float *saved, T *a, int64_t c, int wide) {
    F z[WIDE];
    soon(x);
    for (int v = 0; v < wide; v++) {
        const float *of = saved + v * LANES;
        F u = load_float(of + 2 * c) * load(x + v * LANES) + load_float(of + 3 * c);
        z[v] = at_least(load_float(of + 4 * c), u);
    }
    store_row(a, z, wide);
}

/* a of ``rows`` rows. */
static void activate_rows(const X *x, const float *saved, T *a, int64_t rows, int64_t c) {
    for (int64_t i = 0; i < rows * c; i += c) {
        int64_t j = 0;
        for (; j + 2 * LANES <= c; j += 2 * LANES) activate(x + i + j, saved + j, a + i + j, c, 2);
        for (; j < c; j += LANES) activate(x + i + j, saved + j, a + i + j, c, 1);
    }
}

/* A tile of sums over the c numbers of rows of a. */
INLINE void sums_of(F sum[][TALL][WIDE], const T *a, int64_t c, const T *w, int64_t n,
                    int tall, int wide) {
    const T *right[WIDE] = {w, w + PAIR * LANES};
    clear(sum, tall, wide, 1);
    tile(sum, &a, c, right, n, c / PAIR, tall, wide, 1);
    done(sum, wide, 1);
}

/* Write a tile of sums, with plus added, to y, which is of T. */
INLINE void put(F sum[TALL][WIDE], const X *plus, T *y, int64_t n, int tall, int wide) {
#pragma GCC unroll 16
    for (int r = 0; r < tall; r++) {
        for (int v = 0; plus && v < wide; v++) sum[r][v] += load(plus + r * n + v * LANES);
        store_row(y + r * n, sum[r], wide);
    }
}

/* Write a tile in pairs of rows, of ``columns`` numbers each. */
INLINE void put_pairs(F sum[TALL][WIDE], T *a, int64_t columns, int tall, int wide) {
#pragma GCC unroll 16
    for (int r = 0; r < tall; r += PAIR)
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) {
            F part[PAIR];
            for (int k = 0; k < PAIR; k++) part[k] = sum[r + k][v];
            *(P_ *)(a + r * columns + PAIR * v * LANES) = joined(part);
        }
}

/* g of a tile, from its sums of dy * W', and s and q: sums of g and of g (x - mean). Then the
   tile holds a. */
INLINE void let_through(F sum[TALL][WIDE], const X *x, X *g, const float *saved, F *s, F *q,
                        int64_t c, int tall, int wide) {
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) {
        const float *of = saved + v * LANES;
        F mean = load_float(of), scale = load_float(of + 2 * c), shift = load_float(of + 3 * c);
        F least = load_float(of + 4 * c);
#pragma GCC unroll 16
        for (int r = 0; r < tall; r++) {
            int64_t i = r * c + v * LANES;
            F u = load(x + i), z = scale * u + shift, d = where_above(z, least, sum[r][v]);
            store(g + i, d);
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

/* W in pairs of inputs: [c][n] in pairs, c for all taps together; each thread packs a part. */
static void pack_inputs(const float *weight, T *w, int64_t c, int64_t n) {
#pragma omp for
    for (int64_t k = 0; k < c; k += PAIR)
        for (int64_t j = 0; j < n; j += LANES) {
            F part[PAIR] = {0};
            for (int p = 0; p < PAIR; p++)
                for (int i = 0; i < LANES; i++) part[p][i] = weight[(j + i) * c + k + p];
            *(P_ *)(w + k * n + PAIR * j) = joined(part);
        }
}

/* W in pairs of outputs, its taps from the last to the first: [taps][n][c] in pairs. */
static void pack_outputs(const float *weight, T *w, int64_t c, int64_t n, int64_t taps) {
#pragma omp for
    for (int64_t k = 0; k < n; k += PAIR)
        for (int64_t t = 0; t < taps; t++)
            for (int64_t j = 0; j < c; j += LANES) {
                const float *from = weight + (k * taps + taps - 1 - t) * c + j;
                F part[PAIR];
                for (int p = 0; p < PAIR; p++) part[p] = load_float(from + p * taps * c);
                *(P_ *)(w + (t * n + k) * c + PAIR * j) = joined(part);
            }
}

/* Numbers rounded up to whole cache lines. */
static inline int64_t lines(int64_t numbers) {
    int64_t line = 64 / sizeof(T);
    return (numbers + line - 1) / line * line;
}

/* A thread's buffer for so many numbers, aligned to a cache line. The thread keeps it: its stack
   may be small, and a new buffer would be new to the process each time. */
static T *room(int64_t numbers) {
    static __thread T *kept;
    static __thread int64_t size;
    if (size < numbers) {
        free(kept);
        kept = aligned_alloc(64, sizeof(T) * lines(numbers));
        if (!kept) {
            fputs("no memory for what a convolution keeps aside\n", stderr);
            abort();
        }
        size = numbers;
    }
    return kept;
}

/* Sums of x - origin and of its square, of ``wide`` vectors of ``high`` rows at a time. */
INLINE void moments(const X *x, const float *origin, double *sums, int64_t rows, int64_t c,
                    int wide, int high) {
    F s[4], q[4];
#pragma GCC unroll 4
    for (int v = 0; v < wide * high; v++) s[v] = q[v] = (F){0};
    for (int64_t r = 0; r < rows; r += high)
#pragma GCC unroll 4
        for (int v = 0; v < wide * high; v++) {
            const X *from = x + (r + v / wide) * c + v % wide * LANES;
            if (v % wide % 2 == 0) soon(from);
            F d = load(from) - load_float(origin + v % wide * LANES);
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

/* The same, of rows first to last. */
static void count(const X *x, const float *origin, double *sums, int64_t first, int64_t last,
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

/* Add the other threads' parts of dW to the first thread's, in their order. */
static void add_parts(float *dw, const float *parts, int64_t numbers) {
#pragma omp for
    for (int64_t i = 0; i < numbers; i += LANES)
        for (int t = 1; t < omp_get_num_threads(); t++)
            *(F_ *)(dw + i) += load_float(parts + numbers * (t - 1) + i);
}

/* dx of rows first to last, written over g; ``alone``: without BN. */
static void normalized(X *dx, const X *x, const X *plus, const float *scale,
                       const float *slope, const float *offset, int64_t first, int64_t last,
                       int64_t c, int alone) {
    for (int64_t i = first * c; alone && i < last * c; i += LANES)
        store(dx + i, load(dx + i) + load(plus + i));
    for (int64_t r = first; !alone && r < last; r++)
        for (int64_t j = 0; j < c; j += LANES) {
            int64_t i = r * c + j;
            soon(x + i);
            soon(dx + i);
            if (plus) soon(plus + i);
            F v = load_float(scale + j) * load(dx + i) +
                  (load_float(slope + j) * load(x + i) + load_float(offset + j));
            store(dx + i, plus ? v + load(plus + i) : v);
        }
}

/* BN's statistics, from the sums of all threads; and ``least`` of ReLU. */
static void settle(double *sums, const float *origin, const float *gamma, const float *beta,
                   float *running_mean, float *running_var, float *saved, int64_t rows,
                   int64_t c, double momentum, double eps) {
#pragma omp single
    {
        gather(sums, c);
        statistics(sums, origin, gamma, beta, running_mean, running_var, saved, rows, c, momentum,
                   eps);
        memset(saved + 4 * c, 0, c * sizeof(float));
    }
}

/* The end of backward, once all threads have their sums: dW of so many weights, dgamma, dbeta, and
   dx of rows first to last of this thread. slope, offset: for all threads. */
static void finish(float *dw, const float *parts, int64_t weights, double *sums,
                   const float *saved, float *slope, float *offset, float *dgamma, float *dbeta,
                   X *dx, const X *x, const X *plus, int64_t rows, int64_t first, int64_t last,
                   int64_t c, int alone) {
#pragma omp barrier
    add_parts(dw, parts, weights);
#pragma omp single
    if (!alone) {
        gather(sums, c);
        gradients(sums, saved, slope, offset, dgamma, dbeta, rows, c);
    }
    if (!alone || plus)
        normalized(dx, x, plus, saved + 2 * c, slope, offset, first, last, c, alone);
}

#endif
