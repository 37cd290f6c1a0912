/* BN, ReLU and a 1x1 convolution of stride 1 (products.h), by blocks of rows. */

#include "products.h"

#ifdef __AVX512BF16__

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A tile of sums over the c channels of a. */
INLINE void sums_of(F sum[][TALL][WIDE], const uint16_t *a, int64_t c, const uint16_t *w, int64_t n,
                    int tall, int wide) {
    const uint16_t *right[WIDE] = {w, w + 2 * LANES};
    clear(sum, tall, wide, 1);
    tile(sum, &a, c, 2, right, n, c / 2, tall, wide, 1);
    done(sum, wide, 1);
}

/* y of a tile. */
INLINE void product(const uint16_t *a, const uint16_t *w, const uint16_t *plus, uint16_t *y,
                    int64_t c, int64_t n, int tall, int wide) {
    F sum[1][TALL][WIDE];
    sums_of(sum, a, c, w, n, tall, wide);
    put(sum[0], plus, y, n, tall, wide);
#pragma GCC unroll 16
    for (int r = 0; r < tall; r++) {
        soon(y + r * n);
        if (plus) soon(plus + r * n);
    }
}

/* y of a block; a: room for what is activated. */
static void forward_block(const uint16_t *x, const uint16_t *w, const uint16_t *plus, uint16_t *y,
                          const float *saved, uint16_t *a, int64_t c, int64_t n) {
    activate_rows(x, saved, a, BLOCK, c);
#define TILES(J, TALL_, WIDE_)                                                                   \
    product(a + r * c, w + 2 * J, plus ? plus + r * n + J : 0, y + r * n + J, c, n, TALL_, WIDE_)
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
        int64_t r = 0;
        for (; AMX && r < BLOCK; r += 16) TILES(j, 16, 2);
        for (; r + 12 <= BLOCK; r += 12) TILES(j, 12, 2);
        for (; r < BLOCK; r += 4) TILES(j, 4, 2);
    }
    for (; j < n; j += LANES)
        for (int64_t r = 0; r < BLOCK; r += 16) TILES(j, 16, 1);
#undef TILES
}

/* again: with the statistics that are saved, which stay as they are. */
void pointwise_forward(const uint16_t *x, const uint16_t *plus, uint16_t *y, const float *gamma,
                       const float *beta, const float *weight, float *running_mean,
                       float *running_var, float *saved, double *sums, uint16_t *w, int64_t images,
                       int64_t height, int64_t width, int64_t c, int64_t n, double momentum,
                       double eps, int threads, int again) {
    int64_t rows = images * height * width;
    float origin[MOST];
    for (int64_t j = 0; j < c; j += LANES) store_float(origin + j, load_bf16(x + j));
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        rows_of(rows, BLOCK, &first, &last);
        if (!again) count(x, origin, sums + 2 * c * omp_get_thread_num(), first, last, c);
        pack_inputs(weight, w, c, n); /* its end is a barrier: the sums are there */
#pragma omp single
        if (!again) {
            gather(sums, c);
            statistics(sums, origin, gamma, beta, running_mean, running_var, saved, rows, c,
                       momentum, eps);
            memset(saved + 4 * c, 0, c * sizeof(float));
        }
        uint16_t a[BLOCK * c] __attribute__((aligned(64)));
        begin(TALL);
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
        end();
    }
}

/* g of a tile, its sums, and a as pairs of rows. */
INLINE void gradient(const uint16_t *dy, const uint16_t *w, const uint16_t *x, uint16_t *g,
                     uint16_t *a, const float *saved, F *s, F *q, int64_t c, int64_t n, int tall,
                     int wide) {
    F sum[1][TALL][WIDE];
    sums_of(sum, dy, n, w, c, tall, wide);
    let_through(sum[0], x, g, saved, s, q, c, tall, wide);
    put_pairs(sum[0], a, wide * LANES, tall, wide);
#pragma GCC unroll 16
    for (int r = 0; r < tall; r++) {
        soon(x + r * c);
        soon(g + r * c);
    }
}

/* g and dW of the columns from j on; d: dy as pairs of rows; a: room for these columns. */
INLINE void columns(int64_t j, const uint16_t *dy, const uint16_t *d, const uint16_t *w,
                    const uint16_t *x, uint16_t *g, uint16_t *a, const float *saved, double *sums,
                    float *dw, int64_t c, int64_t n, int tall, int wide) {
    F s[WIDE], q[WIDE];
    for (int v = 0; v < wide; v++) s[v] = q[v] = (F){0};
    for (int64_t r = 0; r < BLOCK; r += tall)
        gradient(dy + r * n, w + 2 * j, x + r * c + j, g + r * c + j, a + r * wide * LANES,
                 saved + j, s, q, c, n, tall, wide);
    widen_both(sums + j, s, q, c, wide);
    /* Each product asks for its part of the next block's dy, which comes meanwhile. */
    int deep = TALLEST(2);
    int64_t part = BLOCK * deep * LANES * wide / c;
    const uint16_t *next = dy + BLOCK * n + j / (LANES * wide) * (n / deep) * part;
    for (int64_t i = 0; i < n; i += deep, next += part) {
        const uint16_t *right[WIDE] = {a, a + 2 * LANES};
        float *to[WIDE] = {dw + i * c + j, dw + i * c + j + LANES};
        weigh(d, i, n, right, wide * LANES, BLOCK / 2, to, c, deep, wide);
        for (int64_t k = 0; k < part; k += 32) __builtin_prefetch(next + k, 0, 2);
    }
}

/* g of a block, its sums, and its part of dW; d: room for dy as pairs of rows. */
static void backward_block(const uint16_t *dy, const uint16_t *x, const uint16_t *w, uint16_t *g,
                           const float *saved, double *sums, float *dw, uint16_t *d, int64_t c,
                           int64_t n) {
    uint16_t a[BLOCK * WIDE * LANES] __attribute__((aligned(64)));
    lay_pairs(dy, d, BLOCK / 2, n);
    int64_t j = 0;
    for (; j + 2 * LANES <= c; j += 2 * LANES)
        columns(j, dy, d, w, x, g, a, saved, sums, dw, c, n, TALLEST(2), 2);
    for (; j < c; j += LANES) columns(j, dy, d, w, x, g, a, saved, sums, dw, c, n, 16, 1);
}

/* alone: a convolution without BN, by what is ``saved`` of no BN; dgamma, dbeta are not written.
   parts: [threads - 1][n][c], of dW by the other threads. dx has g between the two passes. */
void pointwise_backward(const uint16_t *dy, const uint16_t *x, const uint16_t *plus, uint16_t *dx,
                        const float *saved, const float *weight, float *dgamma, float *dbeta,
                        float *dw, float *parts, double *sums, uint16_t *w, int64_t images,
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
        uint16_t d[BLOCK * n] __attribute__((aligned(64)));
        begin(TALL);
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
        end();
#pragma omp barrier
        add_parts(dw, parts, n * c);
#pragma omp single
        if (!alone) {
            gather(sums, c);
            gradients(sums, saved, slope, offset, dgamma, dbeta, rows, c);
        }
        if (!alone || plus) normalized(dx, x, plus, saved + 2 * c, slope, offset, first, last, c);
    }
}

/* Whether this process should use them. Linux gives the registers of tiles to those who ask; a
   processor with AMX that the compiler does not know is faster in PyTorch's hands. */
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
