/* BN, ReLU and the 1x1 convolution of stride 1 behind them as one operation on bf16, in training,
   forward and backward: what is activated lives in registers and the nearest cache alone.

   With a = relu(scale x + shift), rounded to bf16 as it would be in memory:
     forward    y = a W' + plus
     backward   g = (dy W) where a > 0;  dW = dy' a;  dx = scale g + slope x + offset + plus
   x, a, g, dx: [rows][c]; y, dy: [rows][n]; W, dW: [n][c] in float. Sums of products are floats.
   ``plus`` may be null: it is the other side of an addition, which then costs no pass of its own.

   Each function goes through rows by blocks, and through a block by tiles of sums that fill the
   registers. The processor multiplies and adds pairs of bf16, so one factor of each product lies
   as pairs along what is summed over: W by two inputs (forward) or two outputs (backward), a and
   dy by two rows. */

#include "vectors.h"

#ifdef __AVX512BF16__

#define INLINE static inline __attribute__((always_inline))
#define WIDE 2 /* vectors in a row of a tile, at most */
#define TALL 16 /* rows of a tile, at most */

INLINE F dot(F sum, U a, U b) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

/* A NaN stays one. */
INLINE F relu(F z) { return (F)_mm512_max_ps(_mm512_setzero_ps(), (__m512)z); }

/* The first of two vectors to bf16, and then the other. */
INLINE U both(F first, F other) {
    return (U)_mm512_cvtne2ps_pbh((__m512)other, (__m512)first);
}

/* Two vectors to bf16, as pairs of one number from each. */
INLINE U interleaved(F low, F high) {
    static const uint16_t order[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                              21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                              11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i at = _mm512_loadu_si512(order);
    return (U)_mm512_permutexvar_epi16(at, (__m512i)both(low, high));
}

INLINE void store_row(uint16_t *p, const F *x, int wide) {
    if (wide == 2)
        *(U_ *)p = both(x[0], x[1]);
    else
        store_bf16(p, x[0]);
}

/* The numbers at low and at high, as pairs. */
INLINE U pairs(const uint16_t *low, const uint16_t *high) {
    return __builtin_convertvector(*(const H_ *)low, U) |
           __builtin_convertvector(*(const H_ *)high, U) << 16;
}

/* The pair at p, sixteen times. */
INLINE U spread(const uint16_t *p) {
    uint32_t both;
    memcpy(&both, p, sizeof both);
    return (U)_mm512_set1_epi32(both);
}

/* What lies here in the next block will be needed: asked for row by row, among the products, it
   comes while they are computed. */
INLINE void ahead(const uint16_t *p, int64_t columns) {
    __builtin_prefetch(p + BLOCK * columns, 0, 2);
}

/* sum[r][v] += left[r][k] right[k][v], k in pairs. One row of pairs of the left factor is
   ``step`` numbers from the next pair, and ``stride`` from the next row. */
INLINE void tile(F sum[TALL][WIDE], const uint16_t *left, int64_t stride, int64_t step,
                 const uint16_t *right, int64_t columns, int64_t many, int tall, int wide) {
    for (int64_t k = 0; k < many; k++) {
        U w[WIDE];
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++)
            w[v] = *(const U_ *)(right + 2 * (k * columns + v * LANES));
#pragma GCC unroll 16
        for (int r = 0; r < tall; r++) {
            U l = spread(left + r * stride + k * step);
#pragma GCC unroll 2
            for (int v = 0; v < wide; v++) sum[r][v] = dot(sum[r][v], w[v], l);
        }
    }
}

INLINE void clear(F sum[TALL][WIDE], int tall, int wide) {
    for (int r = 0; r < tall; r++)
        for (int v = 0; v < wide; v++) sum[r][v] = (F){0};
}

/* y of a tile. */
INLINE void product(const uint16_t *a, const uint16_t *w, const uint16_t *plus, uint16_t *y,
                    int64_t c, int64_t n, int tall, int wide) {
    F sum[TALL][WIDE];
    clear(sum, tall, wide);
    tile(sum, a, c, 2, w, n, c / 2, tall, wide);
#pragma GCC unroll 16
    for (int r = 0; r < tall; r++) {
        for (int v = 0; plus && v < wide; v++) sum[r][v] += load_bf16(plus + r * n + v * LANES);
        store_row(y + r * n, sum[r], wide);
        ahead(y + r * n, n);
        if (plus) ahead(plus + r * n, n);
    }
}

INLINE void activate(const uint16_t *x, const float *scale, const float *shift, uint16_t *a,
                     int wide) {
    F z[WIDE];
    for (int v = 0; v < wide; v++) {
        int64_t i = v * LANES;
        z[v] = relu(load_float(scale + i) * load_bf16(x + i) + load_float(shift + i));
    }
    store_row(a, z, wide);
}

/* y of a block; a: room for what is activated. */
static void forward_block(const uint16_t *x, const uint16_t *w, const uint16_t *plus, uint16_t *y,
                          const float *saved, uint16_t *a, int64_t c, int64_t n) {
    const float *scale = saved + 2 * c, *shift = saved + 3 * c;
    for (int64_t i = 0; i < BLOCK * c; i += c) {
        int64_t j = 0;
        for (; j + 2 * LANES <= c; j += 2 * LANES)
            activate(x + i + j, scale + j, shift + j, a + i + j, 2);
        for (; j < c; j += LANES) activate(x + i + j, scale + j, shift + j, a + i + j, 1);
    }
#define TILES(J, TALL_, WIDE_)                                                                   \
    product(a + r * c, w + 2 * J, plus ? plus + r * n + J : 0, y + r * n + J, c, n, TALL_, WIDE_)
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
        int64_t r = 0;
        for (; r + 12 <= BLOCK; r += 12) TILES(j, 12, 2);
        for (; r < BLOCK; r += 4) TILES(j, 4, 2);
    }
    for (; j < n; j += LANES)
        for (int64_t r = 0; r < BLOCK; r += 16) TILES(j, 16, 1);
#undef TILES
}

/* W as pairs of inputs: [c / 2][n][2]; each thread makes a part. */
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

/* W as pairs of outputs: [n / 2][c][2]. */
static void pack_outputs(const float *weight, uint16_t *w, int64_t c, int64_t n) {
#pragma omp for
    for (int64_t k = 0; k < n; k += 2)
        for (int64_t j = 0; j < c; j += LANES) {
            F low = load_float(weight + k * c + j), high = load_float(weight + (k + 1) * c + j);
            *(U_ *)(w + k * c + 2 * j) = interleaved(low, high);
        }
}

/* Sums of x - origin and of its square, up to four vectors at a time: whole lines of a row. */
INLINE void moments(const uint16_t *x, const float *origin, double *sums, int64_t rows, int64_t c,
                    int wide) {
    F s[4], q[4];
    for (int v = 0; v < wide; v++) s[v] = q[v] = (F){0};
    for (int64_t r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++) {
            F d = load_bf16(x + r * c + v * LANES) - load_float(origin + v * LANES);
            s[v] += d;
            q[v] += d * d;
        }
    for (int v = 0; v < wide; v++) {
        widen(sums + v * LANES, s[v]);
        widen(sums + c + v * LANES, q[v]);
    }
}

void pointwise_forward(const uint16_t *x, const uint16_t *plus, uint16_t *y, const float *gamma,
                       const float *beta, const float *weight, float *running_mean,
                       float *running_var, float *saved, double *sums, uint16_t *w, int64_t rows,
                       int64_t c, int64_t n, double momentum, double eps, int threads) {
    float origin[MOST];
    for (int64_t j = 0; j < c; j += LANES) store_float(origin + j, load_bf16(x + j));
#pragma omp parallel num_threads(threads)
    {
        double *mine = sums + 2 * c * omp_get_thread_num();
        memset(mine, 0, 2 * c * sizeof(double));
        int64_t first, last;
        rows_of(rows, BLOCK, &first, &last);
        for (int64_t b = first; b < last; b += BLOCK) {
            int64_t many = b + BLOCK < last ? BLOCK : last - b, j = 0;
            for (; j + 4 * LANES <= c; j += 4 * LANES)
                moments(x + b * c + j, origin + j, mine + j, many, c, 4);
            for (; j < c; j += LANES) moments(x + b * c + j, origin + j, mine + j, many, c, 1);
        }
        pack_inputs(weight, w, c, n); /* its end is a barrier: the sums are there */
#pragma omp single
        {
            gather(sums, c);
            statistics(sums, origin, gamma, beta, running_mean, running_var, saved, rows, c,
                       momentum, eps);
        }
        uint16_t a[BLOCK * c] __attribute__((aligned(64)));
        for (int64_t b = first; b < last; b += BLOCK) {
            const uint16_t *xb = x + b * c, *pb = plus ? plus + b * n : 0;
            uint16_t *yb = y + b * n;
            if (b + BLOCK <= last)
                forward_block(xb, w, pb, yb, saved, a, c, n);
            else { /* fewer rows than a block: in a whole one aside */
                uint16_t x_[BLOCK * c], plus_[BLOCK * n], y_[BLOCK * n];
                memset(x_, 0, sizeof x_);
                memcpy(x_, xb, 2 * c * (last - b));
                if (plus) memcpy(plus_, pb, 2 * n * (last - b));
                forward_block(x_, w, plus ? plus_ : 0, y_, saved, a, c, n);
                memcpy(yb, y_, 2 * n * (last - b));
            }
        }
    }
}

/* g of a tile, its sums, and a as pairs of rows. */
INLINE void let_through(const uint16_t *dy, const uint16_t *w, const uint16_t *x, uint16_t *g,
                        uint16_t *a, const float *saved, F *s, F *q, int64_t c, int64_t n,
                        int tall, int wide) {
    F sum[TALL][WIDE];
    clear(sum, tall, wide);
    tile(sum, dy, n, 2, w, c, n / 2, tall, wide);
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) {
        const float *of = saved + v * LANES;
        F mean = load_float(of), scale = load_float(of + 2 * c), shift = load_float(of + 3 * c);
#pragma GCC unroll 16
        for (int r = 0; r < tall; r++) {
            int64_t i = r * c + v * LANES;
            F u = load_bf16(x + i), z = scale * u + shift, d = only(sum[r][v], ~(U)(z <= 0));
            store_bf16(g + i, d);
            s[v] += d;
            q[v] += d * (u - mean);
            sum[r][v] = relu(z);
            if (v == 0) {
                ahead(x + i, c);
                ahead(g + i, c);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < tall; r += 2)
            *(U_ *)(a + (r * wide + 2 * v) * LANES) = interleaved(sum[r][v], sum[r + 1][v]);
    }
}

/* dW of a tile: eight outputs, over the rows of a block, added to what is there. */
INLINE void weigh(const uint16_t *d, const uint16_t *a, float *dw, int64_t c, int64_t n, int wide) {
    F sum[TALL][WIDE];
    for (int i = 0; i < 8; i++)
        for (int v = 0; v < wide; v++) sum[i][v] = load_float(dw + i * c + v * LANES);
    tile(sum, d, 2, 2 * n, a, wide * LANES, BLOCK / 2, 8, wide);
    for (int i = 0; i < 8; i++)
        for (int v = 0; v < wide; v++) store_float(dw + i * c + v * LANES, sum[i][v]);
}

/* g and dW of the columns from j on; d: dy as pairs of rows; a: room for these columns. */
INLINE void columns(int64_t j, const uint16_t *dy, const uint16_t *d, const uint16_t *w,
                    const uint16_t *x, uint16_t *g, uint16_t *a, const float *saved, double *sums,
                    float *dw, int64_t c, int64_t n, int tall, int wide) {
    F s[WIDE], q[WIDE];
    for (int v = 0; v < wide; v++) s[v] = q[v] = (F){0};
    for (int64_t r = 0; r < BLOCK; r += tall)
        let_through(dy + r * n, w + 2 * j, x + r * c + j, g + r * c + j, a + r * wide * LANES,
                    saved + j, s, q, c, n, tall, wide);
    for (int v = 0; v < wide; v++) {
        widen(sums + j + v * LANES, s[v]);
        widen(sums + c + j + v * LANES, q[v]);
    }
    for (int64_t i = 0; i < n; i += 8) weigh(d + 2 * i, a, dw + i * c + j, c, n, wide);
}

/* g of a block, its sums, and its part of dW; d: room for dy as pairs of rows. */
static void backward_block(const uint16_t *dy, const uint16_t *x, const uint16_t *w, uint16_t *g,
                           const float *saved, double *sums, float *dw, uint16_t *d, int64_t c,
                           int64_t n) {
    uint16_t a[BLOCK * WIDE * LANES] __attribute__((aligned(64)));
    for (int64_t r = 0; r < BLOCK; r += 2)
        for (int64_t j = 0; j < n; j += LANES)
            *(U_ *)(d + r * n + 2 * j) = pairs(dy + r * n + j, dy + (r + 1) * n + j);
    int64_t j = 0;
    for (; j + 2 * LANES <= c; j += 2 * LANES)
        columns(j, dy, d, w, x, g, a, saved, sums, dw, c, n, 8, 2);
    for (; j < c; j += LANES) columns(j, dy, d, w, x, g, a, saved, sums, dw, c, n, 16, 1);
}

/* parts: [threads - 1][n][c], of dW by the other threads. dx has g between the two passes. */
void pointwise_backward(const uint16_t *dy, const uint16_t *x, const uint16_t *plus, uint16_t *dx,
                        const float *saved, const float *weight, float *dgamma, float *dbeta,
                        float *dw, float *parts, double *sums, uint16_t *w, int64_t rows, int64_t c,
                        int64_t n, int threads) {
    float slope[MOST], offset[MOST];
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num();
        double *mine = sums + 2 * c * me;
        float *dw_ = me ? parts + n * c * (me - 1) : dw;
        memset(mine, 0, 2 * c * sizeof(double));
        memset(dw_, 0, n * c * sizeof(float));
        pack_outputs(weight, w, c, n);
        int64_t first, last;
        rows_of(rows, BLOCK, &first, &last);
        uint16_t d[BLOCK * n] __attribute__((aligned(64)));
        for (int64_t b = first; b < last; b += BLOCK) {
            const uint16_t *dyb = dy + b * n, *xb = x + b * c;
            uint16_t *gb = dx + b * c;
            if (b + BLOCK <= last)
                backward_block(dyb, xb, w, gb, saved, mine, dw_, d, c, n);
            else { /* rows of zeros add nothing to the sums */
                uint16_t dy_[BLOCK * n], x_[BLOCK * c], g_[BLOCK * c];
                memset(dy_, 0, sizeof dy_);
                memset(x_, 0, sizeof x_);
                memcpy(dy_, dyb, 2 * n * (last - b));
                memcpy(x_, xb, 2 * c * (last - b));
                backward_block(dy_, x_, w, g_, saved, mine, dw_, d, c, n);
                memcpy(gb, g_, 2 * c * (last - b));
            }
        }
#pragma omp barrier
#pragma omp for
        for (int64_t i = 0; i < n * c; i += LANES)
            for (int t = 1; t < omp_get_num_threads(); t++)
                *(F_ *)(dw + i) += load_float(parts + n * c * (t - 1) + i);
#pragma omp single
        {
            gather(sums, c);
            gradients(sums, saved, slope, offset, dgamma, dbeta, rows, c);
        }
        for (int64_t r = first; r < last; r++)
            for (int64_t j = 0; j < c; j += LANES) {
                int64_t i = r * c + j;
                F v = load_float(saved + 2 * c + j) * load_bf16(dx + i) +
                      (load_float(slope + j) * load_bf16(x + i) + load_float(offset + j));
                store_bf16(dx + i, plus ? v + load_bf16(plus + i) : v);
            }
    }
}

#endif
