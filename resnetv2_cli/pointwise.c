/* BN, ReLU and a 1x1 convolution of stride 1 (products.h), in blocks of rows. */

#include "products.h"

#ifdef PRODUCTS

struct Work {
    int64_t c, n;
    const T *x, *plus, *dy, *w;
    T *y, *g;
    const float *saved;
    double *sums;
    float *dw;
    T *a; /* buffer for activated rows */
    const T *dy_pairs; /* dy in pairs of rows */
};

/* y of a tile, beginning at ``row``. */
INLINE void output(const Work *of, int64_t row, int64_t j, int tall, int wide) {
    int64_t c = of->c, n = of->n;
    const T *plus = of->plus ? of->plus + row * n + j : 0;
    T *y = of->y + row * n + j;
    F sum[1][TALL][WIDE];
    sums_of(sum, of->a + row * c, c, of->w + PAIR * j, n, tall, wide);
    put(sum[0], plus, y, n, tall, wide);
#pragma GCC unroll 16
    for (int r = 0; r < tall; r++) {
        soon(y + r * n);
        if (plus) soon(plus + r * n);
    }
}

/* y of a block. */
INLINE void outputs(const Work *of, int64_t j, int tall, int wide) {
    for (int64_t r = 0; r < BLOCK; r += tall) output(of, r, j, tall, wide);
}

COLUMNS(outputs, narrow, TALL, 1)
COLUMNS(outputs, wide, AMX ? TALL : LOW, 2)

static void forward_block(const Work *of) {
    static Columns *const by[] = {outputs_narrow, outputs_wide};
    activate_rows(of->x, of->saved, of->a, BLOCK, of->c);
    each_column(by, of, of->n);
}

/* again: recompute y with the saved statistics, which are only read. */
void NAME(pointwise_forward)(const T *x, const T *plus, T *y, const float *gamma,
                       const float *beta, const float *weight, float *running_mean,
                       float *running_var, float *saved, double *sums, T *w, int64_t images,
                       int64_t height, int64_t width, int64_t c, int64_t n, double momentum,
                       double eps, int threads, int again) {
    int64_t rows = images * height * width;
    float origin[MOST];
    for (int64_t j = 0; j < c; j += LANES) store_float(origin + j, load(x + j));
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        rows_of(rows, BLOCK, &first, &last);
        if (!again) count(x, origin, sums + 2 * c * omp_get_thread_num(), first, last, c);
        pack_inputs(weight, w, c, n); /* ends with a barrier: the sums are complete */
        if (!again)
            settle(sums, origin, gamma, beta, running_mean, running_var, saved, rows, c,
                   momentum, eps);
        T *a = room(2 * BLOCK * (c + n)), *x_ = a + BLOCK * c, *y_ = x_ + BLOCK * c;
        T *plus_ = y_ + BLOCK * n;
        Work of = {.c = c, .n = n, .w = w, .saved = saved, .a = a};
        begin(TALL);
        for (int64_t b = first; b < last; b += BLOCK) {
            of.x = x + b * c;
            of.plus = plus ? plus + b * n : 0;
            of.y = y + b * n;
            if (b + BLOCK <= last)
                forward_block(&of);
            else { /* fewer rows than a block: copied to a whole one */
                memset(x_, 0, sizeof(T) * BLOCK * c);
                memcpy(x_, of.x, sizeof(T) * c * (last - b));
                if (plus) memcpy(plus_, of.plus, sizeof(T) * n * (last - b));
                of.x = x_;
                of.plus = plus ? plus_ : 0;
                of.y = y_;
                forward_block(&of);
                memcpy(y + b * n, y_, sizeof(T) * n * (last - b));
            }
        }
        end();
    }
}

/* g of a tile, beginning at ``row``, its sums, and a in pairs of rows. */
INLINE void gradient(const Work *of, int64_t row, int64_t j, F *s, F *q, int tall, int wide) {
    int64_t c = of->c, n = of->n;
    const T *x = of->x + row * c + j;
    T *g = of->g + row * c + j;
    F sum[1][TALL][WIDE];
    sums_of(sum, of->dy + row * n, n, of->w + PAIR * j, c, tall, wide);
    let_through(sum[0], x, g, of->saved + j, s, q, c, tall, wide);
    put_pairs(sum[0], of->a + row * wide * LANES, wide * LANES, tall, wide);
#pragma GCC unroll 16
    for (int r = 0; r < tall; r++) {
        soon(x + r * c);
        soon(g + r * c);
    }
}

/* g of a block, its sums, and a, for these columns. */
INLINE void gradients_of(const Work *of, int64_t j, int tall, int wide) {
    F s[WIDE], q[WIDE];
    for (int v = 0; v < wide; v++) s[v] = q[v] = (F){0};
    for (int64_t r = 0; r < BLOCK; r += tall) gradient(of, r, j, s, q, tall, wide);
    widen_both(of->sums + j, s, q, of->c, wide);
}

/* dW of these columns. Each product prefetches its part of the next block's dy. */
INLINE void weights(const Work *of, int64_t j, int tall, int wide) {
    int64_t c = of->c, n = of->n, part = BLOCK * tall * LANES * wide / c;
    const T *next = of->dy + BLOCK * n + j / (LANES * wide) * (n / tall) * part;
    for (int64_t i = 0; i < n; i += tall, next += part) {
        const T *right[WIDE] = {of->a, of->a + PAIR * LANES};
        float *to[WIDE] = {of->dw + i * c + j, of->dw + i * c + j + LANES};
        weigh(of->dy_pairs, i, n, right, wide * LANES, BLOCK / PAIR, to, c, tall, wide);
        for (int64_t k = 0; k < part; k += 64 / sizeof(T)) __builtin_prefetch(next + k, 0, 2);
    }
}

COLUMNS(gradients_of, narrow, TALL, 1)
COLUMNS(gradients_of, wide, AMX ? TALL : LOW, 2)
COLUMNS(weights, narrow, TALL, 1)
COLUMNS(weights, wide, AMX ? TALL : LOW, 2)

static void one_vector(const Work *of, int64_t j) {
    gradients_of_narrow(of, j);
    weights_narrow(of, j);
}

static void two_vectors(const Work *of, int64_t j) {
    gradients_of_wide(of, j);
    weights_wide(of, j);
}

/* g of a block, its sums, and its part of dW. */
static void backward_block(Work *of, T *pairs) {
    static Columns *const by[] = {one_vector, two_vectors};
#if PAIR > 1
    lay_pairs(of->dy, pairs, BLOCK / PAIR, of->n);
    of->dy_pairs = pairs;
#else
    of->dy_pairs = of->dy;
#endif
    each_column(by, of, of->c);
}

/* alone: a convolution without BN, for which ``saved`` has constants; dgamma, dbeta are not
   written. parts: [threads - 1][n][c], dW of the other threads. Between the two passes dx holds
   g. */
void NAME(pointwise_backward)(const T *dy, const T *x, const T *plus, T *dx,
                        const float *saved, const float *weight, float *dgamma, float *dbeta,
                        float *dw, float *parts, double *sums, T *w, int64_t images,
                        int64_t height, int64_t width, int64_t c, int64_t n, int threads,
                        int alone) {
    int64_t rows = images * height * width;
    float slope[MOST] = {0}, offset[MOST] = {0};
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num();
        double *mine = sums + 2 * c * me;
        float *dw_ = me ? parts + n * c * (me - 1) : dw;
        memset(mine, 0, 2 * c * sizeof(double));
        memset(dw_, 0, n * c * sizeof(float));
        pack_outputs(weight, w, c, n, 1);
        int64_t first, last;
        rows_of(rows, BLOCK, &first, &last);
        T *a = room(BLOCK * (WIDE * LANES + 2 * n + 2 * c)), *dy_ = a + BLOCK * WIDE * LANES;
        T *dy_pairs = dy_ + BLOCK * n, *x_ = dy_pairs + BLOCK * n, *g_ = x_ + BLOCK * c;
        Work of = {.c = c, .n = n, .w = w, .saved = saved, .sums = mine, .dw = dw_, .a = a};
        begin(TALL);
        for (int64_t b = first; b < last; b += BLOCK) {
            of.dy = dy + b * n;
            of.x = x + b * c;
            of.g = dx + b * c;
            if (b + BLOCK <= last)
                backward_block(&of, dy_pairs);
            else { /* rows of zeros add nothing to the sums */
                memset(dy_, 0, sizeof(T) * BLOCK * n);
                memset(x_, 0, sizeof(T) * BLOCK * c);
                memcpy(dy_, of.dy, sizeof(T) * n * (last - b));
                memcpy(x_, of.x, sizeof(T) * c * (last - b));
                of.dy = dy_;
                of.x = x_;
                of.g = g_;
                backward_block(&of, dy_pairs);
                memcpy(dx + b * c, g_, sizeof(T) * c * (last - b));
            }
        }
        end();
        finish(dw, parts, n * c, sums, saved, slope, offset, dgamma, dbeta, dx, x, plus, rows,
               first, last, c, alone);
    }
}

#ifndef FLOATS

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether this process should use these functions. Linux grants the tile registers on request; on
   a processor whose AMX the compiler does not know, PyTorch is faster. */
int products_allowed(void) {
#if AMX
    enum { REQUEST = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return !syscall(SYS_arch_prctl, REQUEST, TILES);
#else
    unsigned a, b, c, d;
    return !(__get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1); /* AMX-BF16 */
#endif
}

#endif

#endif
