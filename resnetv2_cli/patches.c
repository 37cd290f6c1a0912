/* BN, ReLU and a convolution of stride 2 or more, of any odd size (products.h), as a product of
   matrices: a row of the left one is the patch of pixels that an output sees (im2col). What the
   patches that see a pixel contribute to its gradient is added up in an image of floats. */

#include "products.h"

#ifdef PRODUCTS

typedef struct {
    int64_t height, width, kernel, stride;
    int64_t border;          /* of zeros, around an image */
    int64_t pitch;           /* width with the border */
    int64_t across, outputs; /* of a row, of an image */
} Shape;

static Shape shape_of(int64_t height, int64_t width, int64_t kernel, int64_t stride) {
    int64_t border = kernel / 2, across = (width - 1) / stride + 1;
    int64_t outputs = across * ((height - 1) / stride + 1);
    return (Shape){height, width, kernel, stride, border, width + 2 * border, across, outputs};
}

struct Work {
    const Shape *s;
    int64_t c, n;
    int64_t seen; /* numbers in a patch */
    const T *x, *plus, *w, *dy;
    T *y, *g;
    const float *saved;
    double *sums;
    float *dw;
    T *image; /* activated, with its border */
    T *a;     /* patches of a block of outputs */
    const T *a_pairs, *dy_pairs; /* the same and dy in pairs of rows */
    int64_t rows;                /* of the block, rounded up to a multiple of TALL */
    int64_t places[BLOCK];       /* where its patches begin in the image */
    float *da;                   /* the gradient of the image */
};

/* Numbers of an image with its border. */
INLINE int64_t bordered(const Shape *s, int64_t channels) {
    return lines((s->height + 2 * s->border) * s->pitch * channels);
}

/* The place of a pixel there, counted from the first one of the border. */
INLINE int64_t place(const Shape *s, int64_t row, int64_t column) {
    return row * s->pitch + column;
}

/* Activate an image, except for rows that no output sees. */
static void activate_image(const Work *of) {
    const Shape *s = of->s;
    for (int64_t row = 0; row < s->height; row++) {
        T *to = of->image + place(s, row + s->border, s->border) * of->c;
        if ((row + s->border) % s->stride < s->kernel)
            activate_rows(of->x + row * s->width * of->c, of->saved, to, s->width, of->c);
    }
}

/* The patches of a block of outputs, from output ``first`` on; zeros after the last. */
static void see(Work *of, int64_t first) {
    const Shape *s = of->s;
    int64_t left = s->outputs - first, outputs = left < BLOCK ? left : BLOCK;
    int64_t run = s->kernel * of->c;
    T *a = of->a;
    of->rows = (outputs + TALL - 1) / TALL * TALL;
    for (int64_t i = 0; i < outputs; i++) {
        int64_t row = (first + i) / s->across, column = (first + i) % s->across;
        of->places[i] = place(s, row * s->stride, column * s->stride) * of->c;
        const T *from = of->image + of->places[i];
        for (int64_t k = 0; k < s->kernel; k++, from += s->pitch * of->c, a += run)
            for (int64_t j = 0; j < run; j += LANES) copy(from + j, a + j);
    }
    for (int64_t i = outputs; i < of->rows; i++) of->places[i] = of->places[0];
    memset(a, 0, sizeof(T) * (of->rows - outputs) * of->seen);
}

/* y of a block. */
INLINE void outputs_of(const Work *of, int64_t j, int tall, int wide) {
    for (int64_t r = 0; r < of->rows; r += tall) {
        int64_t at = r * of->n + j;
        F sum[1][TALL][WIDE];
        sums_of(sum, of->a + r * of->seen, of->seen, of->w + PAIR * j, of->n, tall, wide);
        put(sum[0], of->plus ? of->plus + at : 0, of->y + at, of->n, tall, wide);
    }
}

COLUMNS(outputs_of, narrow, TALL, 1)
COLUMNS(outputs_of, wide, AMX ? TALL : LOW, 2)

/* y of an image. */
static void forward_image(const T *plus, T *y, Work *of, T *plus_, T *y_) {
    static Columns *const by[] = {outputs_of_narrow, outputs_of_wide};
    activate_image(of);
    for (int64_t b = 0; b < of->s->outputs; b += BLOCK) {
        int64_t left = of->s->outputs - b;
        see(of, b);
        of->y = y + b * of->n;
        of->plus = plus ? plus + b * of->n : 0;
        if (of->rows <= left)
            each_column(by, of, of->n);
        else { /* the last tile reaches beyond the image */
            if (plus) of->plus = memcpy(plus_, of->plus, sizeof(T) * of->n * left);
            T *to = of->y;
            of->y = y_;
            each_column(by, of, of->n);
            memcpy(to, y_, sizeof(T) * of->n * left);
        }
    }
}

/* again: recompute y with the saved statistics, which are only read. */
void NAME(patches_forward)(const T *x, const T *plus, T *y, const float *gamma, const float *beta,
                           const float *weight, float *running_mean, float *running_var,
                           float *saved, double *sums, T *w, int64_t images, int64_t height,
                           int64_t width, int64_t c, int64_t n, int64_t kernel, int64_t stride,
                           double momentum, double eps, int threads, int again) {
    Shape s = shape_of(height, width, kernel, stride);
    int64_t size = height * width, seen = kernel * kernel * c;
    float origin[MOST];
    for (int64_t j = 0; j < c; j += LANES) store_float(origin + j, load(x + j));
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last, of_image = bordered(&s, c);
        rows_of(images, 1, &first, &last);
        if (!again)
            count(x, origin, sums + 2 * c * omp_get_thread_num(), first * size, last * size, c);
        pack_inputs(weight, w, seen, n); /* ends with a barrier: the sums are complete */
        if (!again)
            settle(sums, origin, gamma, beta, running_mean, running_var, saved, images * size, c,
                   momentum, eps);
        T *image = room(of_image + BLOCK * (seen + 2 * n)), *a = image + of_image;
        T *plus_ = a + BLOCK * seen, *y_ = plus_ + BLOCK * n;
        memset(image, 0, sizeof(T) * of_image);
        Work of = {.s = &s, .c = c, .n = n, .seen = seen, .w = w, .saved = saved, .image = image,
                   .a = a};
        begin(TALL);
        for (int64_t i = first; i < last; i++) {
            int64_t at = i * s.outputs * n;
            of.x = x + i * size * c;
            forward_image(plus ? plus + at : 0, y + at, &of, plus_, y_);
        }
        end();
    }
}

/* Add the gradient of these columns of the patches of a block to the image's. */
INLINE void add_patches(const Work *of, int64_t j, int tall, int wide) {
    const Shape *s = of->s;
    float *to[WIDE]; /* in the first patch of the image */
    for (int v = 0; v < wide; v++) {
        int64_t tap = (j + v * LANES) / of->c, in = (j + v * LANES) % of->c;
        to[v] = of->da + place(s, tap / s->kernel, tap % s->kernel) * of->c + in;
    }
    for (int64_t row = 0; row < of->rows; row += tall) {
        F sum[1][TALL][WIDE];
        sums_of(sum, of->dy + row * of->n, of->n, of->w + PAIR * j, of->seen, tall, wide);
#pragma GCC unroll 16
        for (int r = 0; r < tall; r++)
#pragma GCC unroll 2
            for (int v = 0; v < wide; v++)
                *(F_ *)(to[v] + of->places[row + r]) += sum[0][r][v];
    }
}

/* dW of these columns. */
INLINE void weights(const Work *of, int64_t j, int tall, int wide) {
    const T *a = of->a_pairs + PAIR * j, *right[WIDE] = {a, a + PAIR * LANES};
    for (int64_t i = 0; i < of->n; i += tall) {
        float *dw = of->dw + i * of->seen + j, *to[WIDE] = {dw, dw + LANES};
        weigh(of->dy_pairs, i, of->n, right, of->seen, of->rows / PAIR, to, of->seen, tall, wide);
    }
}

COLUMNS(add_patches, narrow, TALL, 1)
COLUMNS(add_patches, wide, AMX ? TALL : LOW, 2)
COLUMNS(weights, narrow, TALL, 1)
COLUMNS(weights, wide, AMX ? TALL : LOW, 2)

/* Lay the patches and dy of a block in pairs of rows. */
static void lay_block(Work *of, T *a_pairs, T *dy_pairs) {
    of->a_pairs = of->a;
    of->dy_pairs = of->dy;
#if PAIR > 1
    int64_t seen = of->seen;
    for (int64_t i = 0; i < of->rows * seen; i += 2 * seen)
        for (int64_t j = 0; j < seen; j += LANES)
            *(P_ *)(a_pairs + i + 2 * j) = pairs(of->a + i + j, of->a + i + seen + j);
    lay_pairs(of->dy, dy_pairs, of->rows / PAIR, of->n);
    of->a_pairs = a_pairs;
    of->dy_pairs = dy_pairs;
#endif
}

/* g of some pixels, beginning at ``i``, and its sums, from the gradient of a. */
INLINE void pass(const Work *of, int64_t i, const float *da, int64_t j, F *s, F *q, int tall) {
    const T *x = of->x + i * of->c + j;
    F sum[TALL][WIDE];
    for (int r = 0; r < tall; r++) sum[r][0] = load_float(da + r * of->c + j);
    let_through(sum, x, of->g + i * of->c + j, of->saved + j, s, q, of->c, tall, 1);
}

/* The same of a row of the image. */
static void pass_row(const Work *of, int64_t row) {
    const Shape *s = of->s;
    const float *da = of->da + place(s, row + s->border, s->border) * of->c;
    for (int64_t j = 0; j < of->c; j += LANES) {
        F sums[2] = {{0}, {0}};
        int64_t i = 0, start = row * s->width;
        for (; i + 4 <= s->width; i += 4)
            pass(of, start + i, da + i * of->c, j, sums, sums + 1, 4);
        for (; i < s->width; i++) pass(of, start + i, da + i * of->c, j, sums, sums + 1, 1);
        widen_both(of->sums + j, sums, sums + 1, of->c, 1);
    }
}

/* g of an image, its sums, and its part of dW. */
static void backward_image(const T *dy, Work *of, T *a_pairs, T *dy_pairs, T *dy_) {
    static Columns *const add[] = {add_patches_narrow, add_patches_wide};
    static Columns *const weigh_[] = {weights_narrow, weights_wide};
    const Shape *s = of->s;
    int64_t n = of->n;
    activate_image(of);
    memset(of->da, 0, sizeof(float) * bordered(s, of->c));
    for (int64_t b = 0; b < s->outputs; b += BLOCK) {
        int64_t left = s->outputs - b;
        see(of, b);
        of->dy = dy + b * n;
        if (of->rows > left) { /* rows of zeros add nothing */
            memset(dy_, 0, sizeof(T) * n * of->rows);
            of->dy = memcpy(dy_, of->dy, sizeof(T) * n * left);
        }
        lay_block(of, a_pairs, dy_pairs);
        each_column(add, of, of->seen);
        each_column(weigh_, of, of->seen);
    }
    for (int64_t row = 0; row < s->height; row++) pass_row(of, row);
}

/* alone: a convolution without BN, for which ``saved`` has constants; dgamma, dbeta are not
   written. parts: [threads - 1][n][kernel][kernel][c], dW of the other threads. Between the two
   passes dx holds g. */
void NAME(patches_backward)(const T *dy, const T *x, const T *plus, T *dx, const float *saved,
                            const float *weight, float *dgamma, float *dbeta, float *dw,
                            float *parts, double *sums, T *w, int64_t images, int64_t height,
                            int64_t width, int64_t c, int64_t n, int64_t kernel, int64_t stride,
                            int threads, int alone) {
    Shape s = shape_of(height, width, kernel, stride);
    int64_t size = height * width, seen = kernel * kernel * c, weights = n * seen;
    float slope[MOST] = {0}, offset[MOST] = {0};
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num();
        double *mine = sums + 2 * c * me;
        float *dw_ = me ? parts + weights * (me - 1) : dw;
        memset(mine, 0, 2 * c * sizeof(double));
        memset(dw_, 0, weights * sizeof(float));
        pack_outputs(weight, w, seen, n, 1);
        int64_t first, last, of_image = bordered(&s, c);
        rows_of(images, 1, &first, &last);
        T *image = room(of_image * (1 + sizeof(float) / sizeof(T)) + BLOCK * 2 * (seen + n));
        float *da = (float *)(image + of_image);
        T *a = (T *)(da + of_image), *a_pairs = a + BLOCK * seen, *dy_ = a_pairs + BLOCK * seen;
        T *dy_pairs = dy_ + BLOCK * n;
        memset(image, 0, sizeof(T) * of_image);
        Work of = {.s = &s, .c = c, .n = n, .seen = seen, .w = w, .saved = saved, .sums = mine,
                   .dw = dw_, .image = image, .a = a, .da = da};
        begin(TALL);
        for (int64_t i = first; i < last; i++) {
            of.x = x + i * size * c;
            of.g = dx + i * size * c;
            backward_image(dy + i * s.outputs * n, &of, a_pairs, dy_pairs, dy_);
        }
        end();
        finish(dw, parts, weights, sums, saved, slope, offset, dgamma, dbeta, dx, x, plus,
               images * size, first * size, last * size, c, alone);
    }
}

#endif
