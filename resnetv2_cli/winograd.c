/* BN, ReLU and a 3x3 convolution of stride 1 (products.h) for float, with 16 multiplications in
   place of 36: Winograd's minimal algorithm F(2x2, 3x3), as in Lavin and Gray 2016
   (arXiv:1509.09308).

   For 2x2 outputs y, the 4x4 inputs a that they see and the 3x3 weights w of a channel:
     forward    y = A' [U * V] A    where U = G w G', V = B' a B, and * is element by element
     backward   dW = G' [Z * V] G   where Z = A dy A'; and the gradient of a is a convolution of dy
                with w turned round, computed as the forward one
   Over all channels, each of the 16 elements of U * V is a product of matrices: of a strip of 2x2
   tiles, tiles x channels times channels x channels. For the same convolution twice, A' and B' here
   have the last column and row of Lavin's times -1.

   An image is copied to a buffer with a border of zeros; an odd height or width is made even by
   another row or column of zeros. */

#define FLOATS
#include "products.h"

#ifdef PRODUCTS

#define ELEMENTS 16 /* of a transformed tile, 4x4 */
#define STRIP 16    /* tiles at a time, about */

typedef struct {
    int64_t height, width, pitch;
    int64_t start;       /* place of the first pixel inside the border */
    int64_t pixels;      /* with the border */
    int64_t across;      /* tiles in a row of them */
    int64_t down;        /* rows of tiles */
    int64_t strip;       /* rows of tiles at a time */
    int64_t tiles;       /* of a strip, rounded up to a multiple of TALL */
} Shape;

static Shape shape_of(int64_t height, int64_t width) {
    int64_t across = (width + 1) / 2, down = (height + 1) / 2, pitch = 2 * across + 2;
    int64_t strip = STRIP / across < 1 ? 1 : STRIP / across < down ? STRIP / across : down;
    int64_t tiles = (strip * across + TALL - 1) / TALL * TALL;
    return (Shape){height, width, pitch, pitch + 1, (2 * down + 2) * pitch, across, down, strip, tiles};
}

struct Work {
    const Shape *s;
    int64_t c, n;
    const T *x, *plus, *w;
    T *y, *g;
    const float *saved;
    double *sums;
    T *a, *dy;          /* activated image; dy of an image */
    T *v, *m, *du;      /* transformed inputs of a strip; its products, or Z; dU of a thread */
    int64_t from, rows; /* of the strip: its first row of tiles, and how many */
    int64_t left, right; /* channels summed over, and of the products */
    int64_t element;
};

/* Numbers from one element of transformed tiles to the next. Not a multiple of 4 KB, which would
   put all elements of a tile in the same few lines of the cache. */
INLINE int64_t apart(const Shape *s, int64_t channels) { return s->tiles * channels + LANES; }

/* A row or a column of B' a B. */
INLINE void spanned(const F a[4], F to[4]) {
    to[0] = a[0] - a[2];
    to[1] = a[1] + a[2];
    to[2] = a[2] - a[1];
    to[3] = a[3] - a[1];
}

/* V of a strip, from an image with its border. */
static void transform(const Work *of, const T *image, int64_t channels, T *v) {
    const Shape *s = of->s;
    int64_t step = apart(s, channels), row = s->pitch * channels;
    for (int64_t t = 0; t < of->rows; t++)
        for (int64_t j = 0; j < channels; j += LANES) {
            const T *from = image + 2 * (of->from + t) * row + j;
            T *to = v + t * s->across * channels + j;
            F column[4][4]; /* of the tile: spanned downwards */
            for (int q = 0; q < 2; q++, from += channels) {
                F a[4];
                for (int r = 0; r < 4; r++) a[r] = load(from + r * row);
                spanned(a, column[q]);
            }
            for (int64_t i = 0; i < s->across; i++, to += channels) {
#pragma GCC unroll 2
                for (int q = 2; q < 4; q++, from += channels) {
                    F a[4];
#pragma GCC unroll 4
                    for (int r = 0; r < 4; r++) a[r] = load(from + r * row);
                    spanned(a, column[q]);
                }
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    F a[4] = {column[0][r], column[1][r], column[2][r], column[3][r]}, made[4];
                    spanned(a, made);
#pragma GCC unroll 4
                    for (int q = 0; q < 4; q++) store(to + (4 * r + q) * step, made[q]);
                    column[0][r] = column[2][r];
                    column[1][r] = column[3][r];
                }
            }
        }
}

/* Z of a strip, from dy of an image with its border. */
static void transform_gradient(const Work *of, T *z) {
    const Shape *s = of->s;
    int64_t n = of->n, step = apart(s, n), row = s->pitch * n;
    for (int64_t t = 0; t < of->rows; t++)
        for (int64_t j = 0; j < n; j += LANES) {
            const T *from = of->dy + s->start * n + 2 * (of->from + t) * row + j;
            T *to = z + t * s->across * n + j;
            for (int64_t i = 0; i < s->across; i++, from += 2 * n, to += n) {
                F column[2][4];
#pragma GCC unroll 2
                for (int q = 0; q < 2; q++) {
                    F up = load(from + q * n), low = load(from + q * n + row);
                    column[q][0] = up;
                    column[q][1] = up + low;
                    column[q][2] = up - low;
                    column[q][3] = low;
                }
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    F left = column[0][r], right = column[1][r];
                    store(to + (4 * r) * step, left);
                    store(to + (4 * r + 1) * step, left + right);
                    store(to + (4 * r + 2) * step, left - right);
                    store(to + (4 * r + 3) * step, right);
                }
            }
        }
}

/* An element of U * V, summed over the channels of V, of a strip. */
INLINE void products(const Work *of, int64_t j, int tall, int wide) {
    int64_t k = of->left, n = of->right, e = of->element;
    const T *v = of->v + e * apart(of->s, k), *u = of->w + e * k * n + j;
    const T *right[WIDE] = {u, u + LANES};
    T *m = of->m + e * apart(of->s, n) + j;
    for (int64_t r = 0; r < of->rows * of->s->across; r += tall) {
        F sum[1][TALL][WIDE];
        const T *left = v + r * k;
        clear(sum, tall, wide, 1);
        tile(sum, &left, k, right, n, k, tall, wide, 1);
        put(sum[0], 0, m + r * n, n, tall, wide);
    }
}

COLUMNS(products, narrow, TALL, 1)
COLUMNS(products, wide, LOW, 2)

/* All products of a strip. Meanwhile its outputs ``y``, and ``x``, which they are added to or
   compared with, come from memory. */
static void multiply(Work *of, const T *x, const T *y) {
    static Columns *const by[] = {products_narrow, products_wide};
    int64_t row = of->s->width * of->right, part = 2 * of->rows * row / ELEMENTS;
    int64_t next = 2 * of->from * row;
    for (of->element = 0; of->element < ELEMENTS; of->element++) {
        for (int64_t end = next + part; next < end; next += 64 / sizeof(T)) {
            __builtin_prefetch(y + next, 1, 2);
            if (x) __builtin_prefetch(x + next, 0, 2);
        }
        each_column(by, of, of->right);
    }
}

/* The four pixels of a tile: A' m A. */
INLINE void outputs_of(const T *m, int64_t step, F y[2][2]) {
    F up[4], low[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
        F a = load(m + q * step), b = load(m + (4 + q) * step), c = load(m + (8 + q) * step);
        up[q] = a + b + c;
        low[q] = b - c + load(m + (12 + q) * step);
    }
    y[0][0] = up[0] + up[1] + up[2];
    y[0][1] = up[1] - up[2] + up[3];
    y[1][0] = low[0] + low[1] + low[2];
    y[1][1] = low[1] - low[2] + low[3];
}

/* Do something with tile i of row t of a strip, which has high x broad pixels of the image: two by
   two, or one below or beside the last ones. */
typedef void Put(const Work *of, int64_t t, int64_t i, int64_t j, F *sums, int high, int broad);

INLINE void each_tile(Put put, const Work *of, int64_t j, F *sums) {
    const Shape *s = of->s;
    for (int64_t t = 0; t < of->rows; t++) {
        int high = 2 * (of->from + t) + 1 < s->height ? 2 : 1;
        for (int64_t i = 0; i < s->across; i++)
            if (high == 2 && 2 * i + 1 < s->width)
                put(of, t, i, j, sums, 2, 2);
            else
                put(of, t, i, j, sums, high, 2 * i + 1 < s->width ? 2 : 1);
    }
}

/* y of a tile. */
INLINE void put_output(const Work *of, int64_t t, int64_t i, int64_t j, F *sums, int high,
                       int broad) {
    const Shape *s = of->s;
    int64_t n = of->n, at = (2 * (of->from + t) * s->width + 2 * i) * n + j;
    F y[2][2];
    outputs_of(of->m + (t * s->across + i) * n + j, apart(s, n), y);
#pragma GCC unroll 2
    for (int r = 0; r < high; r++, at += s->width * n)
#pragma GCC unroll 2
        for (int q = 0; q < broad; q++) {
            if (of->plus) y[r][q] += load(of->plus + at + q * n);
            store(of->y + at + q * n, y[r][q]);
        }
}

/* g of a tile, its sums, and a. */
INLINE void put_gradient(const Work *of, int64_t t, int64_t i, int64_t j, F *sums, int high,
                         int broad) {
    const Shape *s = of->s;
    int64_t c = of->c, row = 2 * (of->from + t), at = (row * s->width + 2 * i) * c + j;
    T *a = of->a + (s->start + row * s->pitch + 2 * i) * c + j;
    F y[2][2];
    outputs_of(of->m + (t * s->across + i) * c + j, apart(s, c), y);
#pragma GCC unroll 2
    for (int r = 0; r < high; r++, at += s->width * c, a += s->pitch * c) {
        F sum[TALL][WIDE] = {{y[r][0]}, {y[r][1]}};
        let_through(sum, of->x + at, of->g + at, of->saved + j, sums, sums + 1, c, broad, 1);
#pragma GCC unroll 2
        for (int q = 0; q < broad; q++) store(a + q * c, sum[q][0]);
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
            const T *right[TAPS] = {v, v + LANES};
            float *to[TAPS] = {of->du + (e * n + i) * c + j};
            to[1] = to[0] + LANES;
            weigh(z, i, n, right, c, 1, of->rows * s->across, to, c, tall, wide);
        }
    }
}

COLUMNS(weights, narrow, TALL, 1)
COLUMNS(weights, wide, LOW, 2)

static void weigh_strip(const Work *of) {
    static Columns *const by[] = {weights_narrow, weights_wide};
    each_column(by, of, of->c);
}

/* For each strip of an image. */
#define STRIPS(OF)                                                                               \
    for ((OF)->from = 0; (OF)->rows = (OF)->s->down - (OF)->from,                                \
        (OF)->rows = (OF)->rows < (OF)->s->strip ? (OF)->rows : (OF)->s->strip, (OF)->rows > 0;  \
         (OF)->from += (OF)->rows)

static void forward_image(Work *of) {
    const Shape *s = of->s;
    for (int64_t row = 0; row < s->height; row++)
        activate_rows(of->x + row * s->width * of->c, of->saved,
                      of->a + (s->start + row * s->pitch) * of->c, s->width, of->c);
    of->left = of->c;
    of->right = of->n;
    STRIPS(of) {
        transform(of, of->a, of->c, of->v);
        multiply(of, of->plus, of->y);
        put_outputs(of);
    }
}

static void backward_image(const T *dy, Work *of) {
    const Shape *s = of->s;
    for (int64_t row = 0; row < s->height; row++)
        memcpy(of->dy + (s->start + row * s->pitch) * of->n, dy + row * s->width * of->n,
               sizeof(T) * s->width * of->n);
    of->left = of->n;
    of->right = of->c;
    STRIPS(of) {
        transform(of, of->dy, of->n, of->v);
        multiply(of, of->x, of->g);
        put_gradients(of);
    }
    STRIPS(of) {
        transform(of, of->a, of->c, of->v);
        transform_gradient(of, of->m);
        weigh_strip(of);
    }
}

/* A row or a column of G w G'. */
INLINE void widened(const F w[3], F to[4]) {
    F ends = w[0] + w[2];
    to[0] = w[0];
    to[1] = (ends + w[1]) * 0.5f;
    to[2] = (ends - w[1]) * 0.5f;
    to[3] = w[2];
}

/* Write U of the 3x3 weights of some channels, ``step`` numbers from one element to the next. */
INLINE void put_transformed(const F w[9], T *u, int64_t step) {
    F column[3][4];
    for (int q = 0; q < 3; q++) {
        F of[3] = {w[q], w[3 + q], w[6 + q]};
        widened(of, column[q]);
    }
    for (int r = 0; r < 4; r++) {
        F of[3] = {column[0][r], column[1][r], column[2][r]}, made[4];
        widened(of, made);
        for (int q = 0; q < 4; q++) store(u + (4 * r + q) * step, made[q]);
    }
}

/* U: [16][c][n]; each thread makes a part. */
static void transform_inputs(const float *weight, T *u, int64_t c, int64_t n) {
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

/* U of the weights turned round: [16][n][c]. */
static void transform_outputs(const float *weight, T *u, int64_t c, int64_t n) {
#pragma omp for
    for (int64_t k = 0; k < n; k++)
        for (int64_t j = 0; j < c; j += LANES) {
            F w[9];
            for (int t = 0; t < 9; t++) w[t] = load_float(weight + (k * 9 + 8 - t) * c + j);
            put_transformed(w, u + k * c + j, c * n);
        }
}

/* A row or a column of G' dU G. */
INLINE void narrowed(const F u[4], F to[3]) {
    F sum = (u[1] + u[2]) * 0.5f;
    to[0] = u[0] + sum;
    to[1] = (u[1] - u[2]) * 0.5f;
    to[2] = sum + u[3];
}

/* dW: [n][9][c], from dU: [16][n][c]. */
static void put_weights(const T *du, float *dw, int64_t c, int64_t n) {
    for (int64_t k = 0; k < n; k++)
        for (int64_t j = 0; j < c; j += LANES) {
            F column[4][3];
            for (int q = 0; q < 4; q++) {
                F of[4];
                for (int r = 0; r < 4; r++) of[r] = load(du + ((4 * r + q) * n + k) * c + j);
                narrowed(of, column[q]);
            }
            for (int r = 0; r < 3; r++) {
                F of[4] = {column[0][r], column[1][r], column[2][r], column[3][r]}, made[3];
                narrowed(of, made);
                for (int q = 0; q < 3; q++) store_float(dw + (k * 9 + 3 * r + q) * c + j, made[q]);
            }
        }
}

/* again: recompute y with the saved statistics, which are only read. u: [16][c][n] */
void conv3x3_forward_float(const T *x, const T *plus, T *y, const float *gamma, const float *beta,
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
        transform_inputs(weight, u, c, n); /* ends with a barrier: the sums are complete */
#pragma omp single
        if (!again) {
            gather(sums, c);
            statistics(sums, origin, gamma, beta, running_mean, running_var, saved, images * size,
                       c, momentum, eps);
            memset(saved + 4 * c, 0, c * sizeof(float));
        }
        int64_t of_a = lines(s.pixels * c), of_v = lines(ELEMENTS * apart(&s, c));
        T *a = room(of_a + of_v + ELEMENTS * apart(&s, n));
        memset(a, 0, sizeof(T) * (of_a + of_v));
        Work of = {.s = &s, .c = c, .n = n, .w = u, .saved = saved, .a = a, .v = a + of_a,
                   .m = a + of_a + of_v};
        for (int64_t i = first * size; i < last * size; i += size) {
            of.x = x + i * c;
            of.plus = plus ? plus + i * n : 0;
            of.y = y + i * n;
            forward_image(&of);
        }
    }
}

/* alone: a convolution without BN, for which ``saved`` has constants; dgamma, dbeta are not
   written. parts: [threads - 1][n][9][c], dW of the other threads; u: [16][n][c]. Between the two
   passes dx holds g. */
void conv3x3_backward_float(const T *dy, const T *x, const T *plus, T *dx, const float *saved,
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
        transform_outputs(weight, u, c, n);
        int64_t first, last, most = c > n ? c : n;
        rows_of(images, 1, &first, &last);
        int64_t of_du = ELEMENTS * n * c, of_a = lines(s.pixels * c), of_dy = lines(s.pixels * n);
        int64_t of_v = lines(ELEMENTS * apart(&s, most));
        T *du = room(of_du + of_a + of_dy + 2 * of_v), *a = du + of_du, *dy_ = a + of_a;
        T *v = dy_ + of_dy;
        memset(du, 0, sizeof(T) * (of_du + of_a + of_dy + of_v));
        Work of = {.s = &s, .c = c, .n = n, .w = u, .saved = saved, .sums = mine, .a = a,
                   .dy = dy_, .v = v, .m = v + of_v, .du = du};
        for (int64_t i = first * size; i < last * size; i += size) {
            of.x = x + i * c;
            of.g = dx + i * c;
            backward_image(dy + i * n, &of);
        }
        put_weights(du, me ? parts + weights * (me - 1) : dw, c, n);
#pragma omp barrier
        add_parts(dw, parts, weights);
#pragma omp single
        if (!alone) {
            gather(sums, c);
            gradients(sums, saved, slope, offset, dgamma, dbeta, images * size, c);
        }
        if (!alone || plus)
            normalized(dx, x, plus, saved + 2 * c, slope, offset, first * size, last * size, c,
                       alone);
    }
}

#endif
