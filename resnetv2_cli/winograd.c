/* BN, ReLU and a 3x3 convolution of stride 1 (products.h), with 36 multiplications, of floats, in
   place of 144: Winograd's minimal algorithm F(4x4, 3x3), as in Lavin and Gray 2016
   (arXiv:1509.09308).

   For 4x4 outputs y, the 6x6 inputs a that they see and the 3x3 weights w of a channel:
     forward    y = A' [U * V] A    where U = G w G', V = B' a B, and * is element by element
     backward   dW = G' [Z * V] G   where Z = A dy A'; and the gradient of a is a convolution of dy
                with w turned round, computed as the forward one
   Over all channels, each of the 36 elements of U * V is a product of matrices: tiles x channels,
   of a strip of tiles, times channels x channels.

   The matrices are those of polynomials known at the points 0, P, -P, Q, -Q and infinity (Toom and
   Cook). Their choice decides the error: with 5/8 and 3/2, whose powers are exact, it is half of
   what it is with 1 and 2, and about twice that of 144 multiplications. A number that is not finite
   makes NaNs of all outputs of the tiles that see it.

   Images are copied to a buffer with a border of zeros, in groups, because small ones have few
   tiles. Further zeros make height and width multiples of 4. */

#define WIDENED
#include "products.h"

#ifdef PRODUCTS

#define SIDE 4 /* of a tile of outputs */
#define SPAN 6 /* of the inputs that it sees */
#define ELEMENTS (SPAN * SPAN)
#define STRIP 16 /* tiles at a time, about */
#define P1 0.625f /* P and its square */
#define P2 (P1 * P1)
#define Q1 1.5f
#define Q2 (Q1 * Q1)
#define BY_0 (1 / (P2 * Q2)) /* 1 / the product of a point's differences from the others */
#define BY_P (1 / (2 * P2 * (P2 - Q2)))
#define BY_Q (1 / (2 * Q2 * (Q2 - P2)))

typedef struct {
    int64_t height, width, pitch;
    int64_t rows;   /* of an image in the buffer */
    int64_t across; /* tiles in a row of them */
    int64_t down;   /* rows of tiles in an image */
    int64_t group;  /* images at a time */
    int64_t strip;  /* rows of tiles at a time, of one image or several */
    int64_t tiles;  /* of a strip, rounded up to a multiple of TALL */
} Shape;

static Shape shape_of(int64_t height, int64_t width) {
    int64_t across = (width + SIDE - 1) / SIDE, down = (height + SIDE - 1) / SIDE;
    int64_t strip = (STRIP + across - 1) / across, group = (strip + down - 1) / down;
    int64_t tiles = (strip * across + TALL - 1) / TALL * TALL;
    return (Shape){height, width, SIDE * across + 2, SIDE * down + 2, across, down, group, strip,
                   tiles};
}

struct Work {
    const Shape *s;
    int64_t c, n;
    const X *x, *plus;
    const T *w;
    X *y, *g;
    const float *saved;
    double *sums;
    T *a, *dy;           /* activated images; dy of images */
    T *v, *m, *du;       /* V of a strip; its products, or Z; dU of a thread */
    int64_t from, rows;  /* of the strip: its first row of tiles, and how many */
    int64_t in, out;     /* channels summed over, and of the products */
    const X *to, *with;  /* where the outputs go, and what they are added to or compared with */
};

/* Numbers of a group of images in the buffer. */
INLINE int64_t group_of(const Shape *s, int64_t channels) {
    return lines(s->group * s->rows * s->pitch * channels);
}

/* Numbers from one element of transformed tiles to the next. Not a multiple of 4 KB, which would
   put all elements of a tile in the same few lines of the cache. */
INLINE int64_t apart(const Shape *s, int64_t channels) { return s->tiles * channels + LANES; }

/* The first row of pixels of a row of tiles, in its group of images. */
INLINE int64_t row_of(const Shape *s, int64_t t) {
    return t / s->down * s->height + t % s->down * SIDE;
}

/* The first number that a row of tiles sees in the buffer. */
INLINE int64_t seen_by(const Shape *s, int64_t t, int64_t channels) {
    return (t / s->down * s->rows + t % s->down * SIDE) * s->pitch * channels;
}

/* The first number of a row of pixels of a group, inside the border. */
INLINE int64_t inside(const Shape *s, int64_t row, int64_t channels) {
    return ((row / s->height * s->rows + row % s->height + 1) * s->pitch + 1) * channels;
}

/* A row or a column of B' a B. */
INLINE void spanned(const F a[SPAN], F to[SPAN]) {
    F even = a[4] - Q2 * a[2], odd = a[3] - Q2 * a[1];
    to[1] = even + P1 * odd;
    to[2] = even - P1 * odd;
    even = a[4] - P2 * a[2];
    odd = a[3] - P2 * a[1];
    to[3] = even + Q1 * odd;
    to[4] = even - Q1 * odd;
    to[0] = P2 * Q2 * a[0] - (P2 + Q2) * a[2] + a[4];
    to[5] = P2 * Q2 * a[1] - (P2 + Q2) * a[3] + a[5];
}

/* A row or a column of A' m A. */
INLINE void gathered(const F m[SPAN], F to[SIDE]) {
    F p = m[1] + m[2], q = m[3] + m[4], p_ = m[1] - m[2], q_ = m[3] - m[4];
    to[0] = m[0] + p + q;
    to[1] = P1 * p_ + Q1 * q_;
    to[2] = P2 * p + Q2 * q;
    to[3] = P1 * P2 * p_ + Q1 * Q2 * q_ + m[5];
}

/* A row or a column of A dy A'. */
INLINE void scattered(const F dy[SIDE], F to[SPAN]) {
    F even = dy[0] + P2 * dy[2], odd = dy[1] + P2 * dy[3];
    to[1] = even + P1 * odd;
    to[2] = even - P1 * odd;
    even = dy[0] + Q2 * dy[2];
    odd = dy[1] + Q2 * dy[3];
    to[3] = even + Q1 * odd;
    to[4] = even - Q1 * odd;
    to[0] = dy[0];
    to[5] = dy[3];
}

/* A row or a column of G w G'. */
INLINE void widened(const F w[3], F to[SPAN]) {
    F even = BY_P * (w[0] + P2 * w[2]), odd = BY_P * P1 * w[1];
    to[1] = even + odd;
    to[2] = even - odd;
    even = BY_Q * (w[0] + Q2 * w[2]);
    odd = BY_Q * Q1 * w[1];
    to[3] = even + odd;
    to[4] = even - odd;
    to[0] = BY_0 * w[0];
    to[5] = w[2];
}

/* A row or a column of G' dU G. */
INLINE void narrowed(const F u[SPAN], F to[3]) {
    F p = BY_P * (u[1] + u[2]), p_ = BY_P * (u[1] - u[2]);
    F q = BY_Q * (u[3] + u[4]), q_ = BY_Q * (u[3] - u[4]);
    to[0] = BY_0 * u[0] + p + q;
    to[1] = P1 * p_ + Q1 * q_;
    to[2] = P2 * p + Q2 * q + u[5];
}

/* What a tile sees of a column of an image, as a column of B' a. */
INLINE void spanned_down(const T *from, int64_t row, F to[SPAN]) {
    F a[SPAN];
#pragma GCC unroll 6
    for (int r = 0; r < SPAN; r++) a[r] = load_float(from + r * row);
    spanned(a, to);
}

/* V of a strip, from images with their border. */
static void transform(const Work *of, const T *images, int64_t channels, T *v) {
    const Shape *s = of->s;
    int64_t step = apart(s, channels), row = s->pitch * channels;
    for (int64_t t = 0; t < of->rows; t++)
        for (int64_t j = 0; j < channels; j += LANES) {
            const T *from = images + seen_by(s, of->from + t, channels) + j;
            T *to = v + t * s->across * channels + j;
            F column[SPAN][SPAN]; /* the last two of a tile are the first two of the next */
            for (int q = SIDE; q < SPAN; q++, from += channels)
                spanned_down(from, row, column[q]);
            for (int64_t i = 0; i < s->across; i++, to += channels) {
#pragma GCC unroll 6
                for (int r = 0; r < SPAN; r++) {
                    column[0][r] = column[SIDE][r];
                    column[1][r] = column[SIDE + 1][r];
                }
#pragma GCC unroll 4
                for (int q = 2; q < SPAN; q++, from += channels)
                    spanned_down(from, row, column[q]);
#pragma GCC unroll 6
                for (int r = 0; r < SPAN; r++) {
                    F a[SPAN], made[SPAN];
#pragma GCC unroll 6
                    for (int q = 0; q < SPAN; q++) a[q] = column[q][r];
                    spanned(a, made);
#pragma GCC unroll 6
                    for (int q = 0; q < SPAN; q++)
                        store_float(to + (SPAN * r + q) * step, made[q]);
                }
            }
        }
}

/* Z of a strip, from dy of images with their border. */
static void transform_gradient(const Work *of, T *z) {
    const Shape *s = of->s;
    int64_t n = of->n, step = apart(s, n), row = s->pitch * n;
    for (int64_t t = 0; t < of->rows; t++)
        for (int64_t j = 0; j < n; j += LANES) {
            const T *from = of->dy + seen_by(s, of->from + t, n) + row + n + j;
            T *to = z + t * s->across * n + j;
            for (int64_t i = 0; i < s->across; i++, to += n) {
                F column[SIDE][SPAN];
#pragma GCC unroll 4
                for (int q = 0; q < SIDE; q++, from += n) {
                    F dy[SIDE];
#pragma GCC unroll 4
                    for (int r = 0; r < SIDE; r++) dy[r] = load_float(from + r * row);
                    scattered(dy, column[q]);
                }
#pragma GCC unroll 6
                for (int r = 0; r < SPAN; r++) {
                    F dy[SIDE], made[SPAN];
#pragma GCC unroll 4
                    for (int q = 0; q < SIDE; q++) dy[q] = column[q][r];
                    scattered(dy, made);
#pragma GCC unroll 6
                    for (int q = 0; q < SPAN; q++) store_float(to + (SPAN * r + q) * step, made[q]);
                }
            }
        }
}

/* U * V, summed over the channels of V, of a strip. Meanwhile what its outputs are written to, and
   what they are added to or compared with, come from memory. */
INLINE void multiply_columns(const Work *of, int64_t j, int tall, int wide) {
    const Shape *s = of->s;
    int64_t k = of->in, n = of->out, tiles = of->rows * s->across;
    int64_t pixels = row_of(s, of->from + of->rows) - row_of(s, of->from);
    int64_t part = j ? 0 : pixels * s->width * n / ELEMENTS;
    const X *to = of->to + row_of(s, of->from) * s->width * n;
    const T *v = of->v, *u = of->w + j;
    T *m = of->m + j;
    for (int e = 0; e < ELEMENTS; e++) {
        const T *right[WIDE] = {u, u + LANES};
        for (int64_t i = 0; i < part; i += 64 / sizeof(X), to += 64 / sizeof(X)) {
            __builtin_prefetch(to, 1, 2);
            if (of->with) __builtin_prefetch(of->with + (to - of->to), 0, 2);
        }
        for (int64_t r = 0; r < tiles; r += tall) {
            F sum[1][TALL][WIDE];
            const T *left = v + r * k;
            clear(sum, tall, wide, 1);
            tile(sum, &left, k, right, n, k, tall, wide, 1);
            put(sum[0], 0, m + r * n, n, tall, wide);
        }
        v += apart(s, k);
        u += k * n;
        m += apart(s, n);
    }
}

COLUMNS(multiply_columns, narrow, TALL, 1)
COLUMNS(multiply_columns, wide, LOW, 2)

static void multiply(const Work *of) {
    static Columns *const by[] = {multiply_columns_narrow, multiply_columns_wide};
    each_column(by, of, of->out);
}

/* The pixels of a tile: A' m A. */
INLINE void outputs_of(const T *m, int64_t step, F y[SIDE][SIDE]) {
    F column[SPAN][SIDE];
#pragma GCC unroll 6
    for (int q = 0; q < SPAN; q++) {
        F down[SPAN];
#pragma GCC unroll 6
        for (int r = 0; r < SPAN; r++) down[r] = load_float(m + (SPAN * r + q) * step);
        gathered(down, column[q]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < SIDE; r++) {
        F row[SPAN];
#pragma GCC unroll 6
        for (int q = 0; q < SPAN; q++) row[q] = column[q][r];
        gathered(row, y[r]);
    }
}

/* Do something with tile i of row t of a strip, which has high x broad pixels of the image: 4 x 4,
   or fewer at its end. */
typedef void Put(const Work *of, int64_t t, int64_t i, int64_t j, F *sums, int high, int broad);

INLINE int at_most(int64_t pixels) { return pixels < SIDE ? pixels : SIDE; }

INLINE void each_tile(Put put, const Work *of, int64_t j, F *sums) {
    const Shape *s = of->s;
    for (int64_t t = 0; t < of->rows; t++) {
        int high = at_most(s->height - (of->from + t) % s->down * SIDE);
        for (int64_t i = 0; i < s->across; i++)
            if (high == SIDE && SIDE * (i + 1) <= s->width)
                put(of, t, i, j, sums, SIDE, SIDE);
            else
                put(of, t, i, j, sums, high, at_most(s->width - SIDE * i));
    }
}

/* y of a tile; there are no sums. */
INLINE void put_output(const Work *of, int64_t t, int64_t i, int64_t j, F *sums, int high,
                       int broad) {
    const Shape *s = of->s;
    int64_t n = of->n, at = (row_of(s, of->from + t) * s->width + SIDE * i) * n + j;
    F y[SIDE][SIDE];
    outputs_of(of->m + (t * s->across + i) * n + j, apart(s, n), y);
#pragma GCC unroll 4
    for (int r = 0; r < high; r++, at += s->width * n)
#pragma GCC unroll 4
        for (int q = 0; q < broad; q++) {
            if (of->plus) y[r][q] += load(of->plus + at + q * n);
            store(of->y + at + q * n, y[r][q]);
        }
}

/* g of a tile, its sums, and a. */
INLINE void put_gradient(const Work *of, int64_t t, int64_t i, int64_t j, F *sums, int high,
                         int broad) {
    const Shape *s = of->s;
    int64_t c = of->c, at = (row_of(s, of->from + t) * s->width + SIDE * i) * c + j;
    T *a = of->a + seen_by(s, of->from + t, c) + (s->pitch + 1 + SIDE * i) * c + j;
    F y[SIDE][SIDE];
    outputs_of(of->m + (t * s->across + i) * c + j, apart(s, c), y);
#pragma GCC unroll 4
    for (int r = 0; r < high; r++, at += s->width * c, a += s->pitch * c) {
        F sum[TALL][WIDE];
#pragma GCC unroll 4
        for (int q = 0; q < broad; q++) sum[q][0] = y[r][q];
        let_through(sum, of->x + at, of->g + at, of->saved + j, sums, sums + 1, c, broad, 1);
#pragma GCC unroll 4
        for (int q = 0; q < broad; q++) store_float(a + q * c, sum[q][0]);
    }
}

/* y of a strip. */
static void put_outputs(const Work *of) {
    for (int64_t j = 0; j < of->n; j += LANES) each_tile(put_output, of, j, 0);
}

/* g of a strip, its sums, and a. */
static void put_gradients(const Work *of) {
    for (int64_t j = 0; j < of->c; j += LANES) {
        F sums[2] = {{0}, {0}};
        each_tile(put_gradient, of, j, sums);
        widen_both(of->sums + j, sums, sums + 1, of->c, 1);
    }
}

/* What a strip adds to dU. */
INLINE void weights(const Work *of, int64_t j, int tall, int wide) {
    const Shape *s = of->s;
    int64_t c = of->c, n = of->n;
    for (int e = 0; e < ELEMENTS; e++) {
        const T *z = of->m + e * apart(s, n), *v = of->v + e * apart(s, c) + j;
        for (int64_t i = 0; i < n; i += tall) {
            const T *right[WIDE] = {v, v + LANES};
            float *du = of->du + (e * n + i) * c + j, *to[WIDE] = {du, du + LANES};
            weigh(z, i, n, right, c, of->rows * s->across, to, c, tall, wide);
        }
    }
}

COLUMNS(weights, narrow, TALL, 1)
COLUMNS(weights, wide, LOW, 2)

static void weigh_strip(const Work *of) {
    static Columns *const by[] = {weights_narrow, weights_wide};
    each_column(by, of, of->c);
}

/* Go on to the next strip of some images, or the first; false after the last. */
static int next_strip(Work *of, int64_t images) {
    of->from += of->rows;
    int64_t left = images * of->s->down - of->from;
    of->rows = left < of->s->strip ? left : of->s->strip;
    if (!left) of->from = 0;
    return left > 0;
}

static void forward_images(Work *of, int64_t images) {
    const Shape *s = of->s;
    for (int64_t row = 0; row < images * s->height; row++)
        activate_rows(of->x + row * s->width * of->c, of->saved, of->a + inside(s, row, of->c),
                      s->width, of->c);
    of->in = of->c;
    of->out = of->n;
    of->to = of->y;
    of->with = of->plus;
    while (next_strip(of, images)) {
        transform(of, of->a, of->c, of->v);
        multiply(of);
        put_outputs(of);
    }
}

static void backward_images(const X *dy, Work *of, int64_t images) {
    const Shape *s = of->s;
    for (int64_t row = 0; row < images * s->height; row++) {
        T *at = of->dy + inside(s, row, of->n);
        for (int64_t i = 0; i < s->width * of->n; i += LANES)
            store_float(at + i, load(dy + row * s->width * of->n + i));
    }
    of->in = of->n;
    of->out = of->c;
    of->to = of->g;
    of->with = of->x;
    while (next_strip(of, images)) {
        transform(of, of->dy, of->n, of->v);
        multiply(of);
        put_gradients(of);
    }
    while (next_strip(of, images)) {
        transform(of, of->a, of->c, of->v);
        transform_gradient(of, of->m);
        weigh_strip(of);
    }
}

/* Write U of the 3x3 weights of some channels, ``step`` numbers from one element to the next. */
INLINE void put_transformed(const F w[9], T *u, int64_t step) {
    F column[3][SPAN];
    for (int q = 0; q < 3; q++) {
        F down[3] = {w[q], w[3 + q], w[6 + q]};
        widened(down, column[q]);
    }
    for (int r = 0; r < SPAN; r++) {
        F row[3] = {column[0][r], column[1][r], column[2][r]}, made[SPAN];
        widened(row, made);
        for (int q = 0; q < SPAN; q++) store_float(u + (SPAN * r + q) * step, made[q]);
    }
}

/* U: [36][c][n]; each thread makes a part. */
static void transform_for_forward(const float *weight, T *u, int64_t c, int64_t n) {
#pragma omp for collapse(2)
    for (int64_t j = 0; j < n; j += LANES)
        for (int64_t first = 0; first < c; first += LANES) /* of the same cache lines of weights */
            for (int64_t k = first; k < first + LANES; k++) {
                F w[9];
                for (int t = 0; t < 9; t++)
                    for (int i = 0; i < LANES; i++) w[t][i] = weight[((j + i) * 9 + t) * c + k];
                put_transformed(w, u + k * n + j, c * n);
            }
}

/* U of the weights turned round: [36][n][c]. */
static void transform_for_backward(const float *weight, T *u, int64_t c, int64_t n) {
#pragma omp for
    for (int64_t k = 0; k < n; k++)
        for (int64_t j = 0; j < c; j += LANES) {
            F w[9];
            for (int t = 0; t < 9; t++) w[t] = load_float(weight + (k * 9 + 8 - t) * c + j);
            put_transformed(w, u + k * c + j, c * n);
        }
}

/* dW: [n][9][c], from dU: [36][n][c]. */
static void put_weights(const T *du, float *dw, int64_t c, int64_t n) {
    for (int64_t k = 0; k < n; k++)
        for (int64_t j = 0; j < c; j += LANES) {
            F column[SPAN][3];
            for (int q = 0; q < SPAN; q++) {
                F down[SPAN];
                for (int r = 0; r < SPAN; r++)
                    down[r] = load_float(du + ((SPAN * r + q) * n + k) * c + j);
                narrowed(down, column[q]);
            }
            for (int r = 0; r < 3; r++) {
                F row[SPAN], made[3];
                for (int q = 0; q < SPAN; q++) row[q] = column[q][r];
                narrowed(row, made);
                for (int q = 0; q < 3; q++) store_float(dw + (k * 9 + 3 * r + q) * c + j, made[q]);
            }
        }
}

/* again: recompute y with the saved statistics, which are only read. u: [36][c][n] */
void NAME(winograd_forward)(const X *x, const X *plus, X *y, const float *gamma, const float *beta,
                           const float *weight, float *running_mean, float *running_var,
                           float *saved, double *sums, T *u, int64_t images, int64_t height,
                           int64_t width, int64_t c, int64_t n, double momentum, double eps,
                           int threads, int again) {
    Shape s = shape_of(height, width);
    int64_t size = height * width;
    float origin[MOST];
    for (int64_t j = 0; j < c; j += LANES) store_float(origin + j, load(x + j));
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        rows_of(images, 1, &first, &last);
        if (!again)
            count(x, origin, sums + 2 * c * omp_get_thread_num(), first * size, last * size, c);
        transform_for_forward(weight, u, c, n); /* ends with a barrier: the sums are complete */
        if (!again)
            settle(sums, origin, gamma, beta, running_mean, running_var, saved, images * size, c,
                   momentum, eps);
        int64_t of_a = group_of(&s, c), of_v = lines(ELEMENTS * apart(&s, c));
        T *a = room(of_a + of_v + ELEMENTS * apart(&s, n));
        memset(a, 0, sizeof(T) * (of_a + of_v));
        Work of = {.s = &s, .c = c, .n = n, .w = u, .saved = saved, .a = a, .v = a + of_a,
                   .m = a + of_a + of_v};
        for (int64_t i = first; i < last; i += s.group) {
            of.x = x + i * size * c;
            of.plus = plus ? plus + i * size * n : 0;
            of.y = y + i * size * n;
            forward_images(&of, last - i < s.group ? last - i : s.group);
        }
    }
}

/* alone: a convolution without BN, for which ``saved`` has constants; dgamma, dbeta are not
   written. parts: [threads - 1][n][9][c], dW of the other threads; u: [36][n][c]. Between the two
   passes dx holds g. */
void NAME(winograd_backward)(const X *dy, const X *x, const X *plus, X *dx, const float *saved,
                            const float *weight, float *dgamma, float *dbeta, float *dw,
                            float *parts, double *sums, T *u, int64_t images, int64_t height,
                            int64_t width, int64_t c, int64_t n, int threads, int alone) {
    Shape s = shape_of(height, width);
    int64_t size = height * width, weights = n * 9 * c;
    float slope[MOST] = {0}, offset[MOST] = {0};
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num();
        double *mine = sums + 2 * c * me;
        memset(mine, 0, 2 * c * sizeof(double));
        transform_for_backward(weight, u, c, n);
        int64_t first, last, most = c > n ? c : n;
        rows_of(images, 1, &first, &last);
        int64_t of_du = ELEMENTS * n * c, of_a = group_of(&s, c), of_dy = group_of(&s, n);
        int64_t of_v = lines(ELEMENTS * apart(&s, most));
        T *du = room(of_du + of_a + of_dy + 2 * of_v), *a = du + of_du, *dy_ = a + of_a;
        T *v = dy_ + of_dy;
        memset(du, 0, sizeof(T) * (of_du + of_a + of_dy + of_v));
        Work of = {.s = &s, .c = c, .n = n, .w = u, .saved = saved, .sums = mine, .a = a,
                   .dy = dy_, .v = v, .m = v + of_v, .du = du};
        for (int64_t i = first; i < last; i += s.group) {
            of.x = x + i * size * c;
            of.g = dx + i * size * c;
            backward_images(dy + i * size * n, &of, last - i < s.group ? last - i : s.group);
        }
        put_weights(du, me ? parts + weights * (me - 1) : dw, c, n);
        finish(dw, parts, weights, sums, saved, slope, offset, dgamma, dbeta, dx, x, plus,
               images * size, first * size, last * size, c, alone);
    }
}

#endif
