/* BN, ReLU and a 3x3 convolution of stride 1 (products.h) for bf16 with AMX, image by image. For
   other processors and numbers winograd.c has it, with fewer products.

   An image is copied to a buffer with a border of zeros, of which two columns lie between any two
   rows: pitch = width + 2 pixels. So the nine pixels that an output sees are three runs of three,
   and with the image taken as one line, the pixels at one tap are the image shifted by a constant.
   Where it is stored in pairs that begin with even pixels, no pair has pixels of two rows. */

#include "products.h"

#if defined PRODUCTS && AMX

#define TAPS 3                     /* in a row of a tile of dW */
#define HIGH(TALL_) (TALL / TALL_) /* tiles at once: as many as make 16 rows */

typedef struct {
    int64_t height, width, pitch;
    int64_t start;  /* place of the first pixel inside the border */
    int64_t pixels; /* with the border, and a few more zeros that the last pairs reach into */
    int64_t filled; /* pairs of pixels from the first to the last, with the borders between rows */
    int64_t pairs;  /* the same rounded up, by zeros, to a multiple of EVEN */
    int tall;       /* pixels of a row per tile */
} Shape;

static Shape shape_of(int64_t height, int64_t width) {
    int64_t pitch = width + 2, filled = height * pitch / PAIR;
    int64_t pairs = (filled + EVEN - 1) / EVEN * EVEN, pixels = PAIR * pairs + 2 * pitch + 6;
    int tall = width % TALL ? LOW : TALL;
    return (Shape){height, width, pitch, pitch + 2, pixels, filled, pairs, tall};
}

struct Work {
    const Shape *s;
    int64_t c, n;
    const T *x, *plus, *w;
    T *y, *g;
    const float *saved;
    double *sums;
    float *dw;
    T *dy;             /* buffer for dy of an image */
    const T *dy_pairs; /* dy in pairs */
    T *a, *a_pairs[PAIR]; /* activated image; in pairs that begin with even or with odd pixels */
};

/* Place of a pixel of the image in the buffer, counted from the first pixel. */
INLINE int64_t place(const Shape *s, int64_t pixel) {
    return pixel + pixel / s->width * (s->pitch - s->width);
}

/* ``high`` tiles of sums, over the nine pixels around each of ``tall``, beginning at ``pixel``. */
INLINE void around(F sum[][TALL][WIDE], const T *image, int64_t pixel, const Shape *s,
                   int64_t channels, const T *w, int64_t columns, int tall, int wide,
                   int high) {
    int64_t upper_left = s->start - s->pitch - 1;
    clear(sum, tall, wide, high);
    for (int row = 0; row < 3; row++) {
        const T *left[2], *right[WIDE] = {w, w + PAIR * LANES};
        for (int h = 0; h < high; h++)
            left[h] = image + (upper_left + place(s, pixel + h * tall) + row * s->pitch) * channels;
        tile(sum, left, channels, right, columns, 3 * channels / PAIR, tall, wide, high);
        w += 3 * channels * columns;
    }
    done(sum, wide, high);
}

/* y of tiles, beginning at ``pixel``. */
INLINE void output(const Work *of, int64_t pixel, int64_t j, int tall, int wide, int high) {
    F sum[2][TALL][WIDE];
    around(sum, of->a, pixel, of->s, of->c, of->w + PAIR * j, of->n, tall, wide, high);
    for (int h = 0; h < high; h++) {
        int64_t i = (pixel + h * tall) * of->n + j;
        put(sum[h], of->plus ? of->plus + i : 0, of->y + i, of->n, tall, wide);
    }
}

/* y of an image. */
INLINE void outputs(const Work *of, int64_t j, int tall, int wide) {
    int64_t pixel = 0, size = of->s->height * of->s->width;
    for (; pixel + HIGH(tall) * tall <= size; pixel += HIGH(tall) * tall)
        output(of, pixel, j, tall, wide, HIGH(tall));
    if (pixel < size) output(of, pixel, j, tall, wide, 1);
}

COLUMNS(outputs, low_narrow, LOW, 1)
COLUMNS(outputs, narrow, TALL, 1)
COLUMNS(outputs, low_wide, LOW, 2)
COLUMNS(outputs, wide, TALL, 2)

static void forward_image(const Work *of) {
    static Columns *const low[] = {outputs_low_narrow, outputs_low_wide};
    static Columns *const high[] = {outputs_narrow, outputs_wide};
    const Shape *s = of->s;
    for (int64_t row = 0; row < s->height; row++)
        activate_rows(of->x + row * s->width * of->c, of->saved,
                      of->a + (s->start + row * s->pitch) * of->c, s->width, of->c);
    each_column(s->tall < TALL ? low : high, of, of->n);
}

/* again: recompute y with the saved statistics, which are only read. */
void conv3x3_forward_bf16(const T *x, const T *plus, T *y, const float *gamma, const float *beta,
                          const float *weight, float *running_mean, float *running_var,
                          float *saved, double *sums, T *w, int64_t images, int64_t height,
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
        pack_inputs(weight, w, 9 * c, n); /* ends with a barrier: the sums are complete */
        if (!again)
            settle(sums, origin, gamma, beta, running_mean, running_var, saved, images * size, c,
                   momentum, eps);
        T *a = room(s.pixels * c);
        memset(a, 0, sizeof(T) * s.pixels * c);
        Work of = {.s = &s, .c = c, .n = n, .w = w, .saved = saved, .a = a};
        begin(s.tall);
        for (int64_t i = first * size; i < last * size; i += size) {
            of.x = x + i * c;
            of.plus = plus ? plus + i * n : 0;
            of.y = y + i * n;
            forward_image(&of);
        }
        end();
    }
}

/* g, its sums, and a of tiles, beginning at ``pixel``. */
INLINE void gradient(const Work *of, int64_t pixel, int64_t j, F *total, F *product, int tall,
                     int wide, int high) {
    const Shape *s = of->s;
    F sum[2][TALL][WIDE];
    around(sum, of->dy, pixel, s, of->n, of->w + PAIR * j, of->c, tall, wide, high);
    for (int h = 0; h < high; h++) {
        int64_t i = (pixel + h * tall) * of->c + j;
        T *a = of->a_pairs[0] + (s->start + place(s, pixel + h * tall)) * of->c + PAIR * j;
        let_through(sum[h], of->x + i, of->g + i, of->saved + j, total, product, of->c, tall, wide);
        put_pairs(sum[h], a, of->c, tall, wide);
    }
}

/* g, its sums, and a in pairs, of an image. */
INLINE void gradients_of(const Work *of, int64_t j, int tall, int wide) {
    F total[WIDE], product[WIDE];
    for (int v = 0; v < wide; v++) total[v] = product[v] = (F){0};
    int64_t pixel = 0, size = of->s->height * of->s->width;
    for (; pixel + HIGH(tall) * tall <= size; pixel += HIGH(tall) * tall)
        gradient(of, pixel, j, total, product, tall, wide, HIGH(tall));
    if (pixel < size) gradient(of, pixel, j, total, product, tall, wide, 1);
    widen_both(of->sums + j, total, product, of->c, wide);
}

COLUMNS(gradients_of, low_narrow, LOW, 1)
COLUMNS(gradients_of, narrow, TALL, 1)
COLUMNS(gradients_of, low_wide, LOW, 2)
COLUMNS(gradients_of, wide, TALL, 2)

/* Pairs that begin with an odd pixel, from those that begin with an even one. */
static void between(const T *even, T *odd, const Shape *s, int64_t c) {
    for (int64_t i = (s->start - 2) * c; i < (s->start + 2 * s->filled) * c; i += 2 * LANES)
        *(U_ *)(odd + i) = *(const U_ *)(even + i) >> 16 | *(const U_ *)(even + i + 2 * c) << 16;
}

/* dW of all outputs and taps: for each tap the image is shifted. */
INLINE void weights(const Work *of, int64_t j, int tall, int wide) {
    const Shape *s = of->s;
    int64_t c = of->c;
    for (int64_t i = 0; i < of->n; i += tall)
        for (int row = 0; row < 3; row++) {
            const T *right[TAPS];
            float *to[TAPS];
            for (int tap = 0; tap < TAPS; tap++) {
                int64_t moved = s->start + (row - 1) * s->pitch + tap - 1;
                right[tap] = of->a_pairs[moved % PAIR] + (moved - moved % PAIR) * c + PAIR * j;
                to[tap] = of->dw + (i * 9 + row * 3 + tap) * c + j;
            }
            weigh(of->dy_pairs, i, of->n, right, c, s->pairs, to, 9 * c, tall, TAPS);
        }
}

COLUMNS(weights, of_tile, TALL, 1)

static void backward_image(const T *dy, Work *of, T *pairs) {
    static Columns *const low[] = {gradients_of_low_narrow, gradients_of_low_wide};
    static Columns *const high[] = {gradients_of_narrow, gradients_of_wide};
    const Shape *s = of->s;
    int64_t n = of->n;
    for (int64_t row = 0; row < s->height; row++)
        memcpy(of->dy + (s->start + row * s->pitch) * n, dy + row * s->width * n,
               sizeof(T) * s->width * n);
    begin(s->tall);
    each_column(s->tall < TALL ? low : high, of, of->c);
    lay_pairs(of->dy + s->start * n, pairs, s->pairs, n);
    of->dy_pairs = pairs;
    between(of->a_pairs[0], of->a_pairs[1], s, of->c);
    begin(TALL);
    for (int64_t j = 0; j < of->c; j += LANES) weights_of_tile(of, j);
}

/* alone: a convolution without BN, for which ``saved`` has constants; dgamma, dbeta are not
   written. parts: [threads - 1][n][9][c], dW of the other threads. Between the two passes dx
   holds g. */
void conv3x3_backward_bf16(const T *dy, const T *x, const T *plus, T *dx, const float *saved,
                           const float *weight, float *dgamma, float *dbeta, float *dw,
                           float *parts, double *sums, T *w, int64_t images, int64_t height,
                           int64_t width, int64_t c, int64_t n, int threads, int alone) {
    Shape s = shape_of(height, width);
    int64_t size = height * width, weights = n * 9 * c;
    float slope[MOST] = {0}, offset[MOST] = {0};
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num();
        double *mine = sums + 2 * c * me;
        float *dw_ = me ? parts + weights * (me - 1) : dw;
        memset(mine, 0, 2 * c * sizeof(double));
        memset(dw_, 0, weights * sizeof(float));
        pack_outputs(weight, w, c, n, 9);
        int64_t first, last;
        rows_of(images, 1, &first, &last);
        int64_t of_dy = lines(s.pixels * n), of_a = lines(s.pixels * c);
        T *dy_ = room(of_dy + PAIR * (of_a + s.pairs * n));
        T *even = dy_ + of_dy, *dy_pairs = even + PAIR * of_a;
        memset(dy_, 0, sizeof(T) * (of_dy + PAIR * of_a));
        Work of = {.s = &s, .c = c, .n = n, .w = w, .saved = saved, .sums = mine, .dw = dw_,
                   .dy = dy_};
        for (int odd = 0; odd < PAIR; odd++) of.a_pairs[odd] = even + odd * of_a;
        for (int64_t i = first * size; i < last * size; i += size) {
            of.x = x + i * c;
            of.g = dx + i * c;
            backward_image(dy + i * n, &of, dy_pairs);
        }
        end();
        finish(dw, parts, weights, sums, saved, slope, offset, dgamma, dbeta, dx, x, plus,
               images * size, first * size, last * size, c, alone);
    }
}

#endif
