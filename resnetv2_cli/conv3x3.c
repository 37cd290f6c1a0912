/* BN, ReLU and a 3x3 convolution of stride 1 (products.h), image by image.

   An image lies aside with a border of zeros, one column of which ends a row and begins the next:
   pitch = width + 1 pixels. So the nine that an output sees are three runs of three pixels; and
   along the image as one line, those at one tap are the image moved by a constant. */

#include "products.h"

#ifdef __AVX512BF16__

typedef struct {
    int64_t height, width, pitch;
    int64_t start;  /* of the first pixel that is no border */
    int64_t pixels; /* with the border, and a few more zeros that the last pairs reach into */
    int64_t pairs;  /* of pixels from the first to the last, with the borders between rows */
    int tall;       /* pixels of a row that a tile takes */
} Shape;

static Shape shape_of(int64_t height, int64_t width) {
    int64_t pitch = width + 1, pairs = ((height * pitch + 1) / 2 + EVEN - 1) / EVEN * EVEN;
    int64_t pixels = 2 * pairs + 2 * pitch + 6;
    Shape s = {height, width, pitch, pitch + 1, pixels, pairs, width % 16 ? 8 : 16};
    return s;
}

/* A tile of sums over the nine pixels around each of ``tall``; at: the first's upper left. */
INLINE void around(F sum[TALL][WIDE], const uint16_t *image, int64_t at, const Shape *s,
                   int64_t channels, const uint16_t *w, int64_t columns, int tall, int wide) {
    clear(sum, tall, wide);
    for (int64_t row = 0; row < 3; row++)
        tile(sum, image + (at + row * s->pitch) * channels, channels, 2,
             w + row * 3 * channels * columns, columns, 3 * channels / 2, tall, wide);
    done(sum, wide);
}

/* Columns j on of y of an image; a: the image activated. */
INLINE void outputs(int64_t j, const uint16_t *a, const uint16_t *w, const uint16_t *plus,
                    uint16_t *y, const Shape *s, int64_t c, int64_t n, int tall, int wide) {
    for (int64_t row = 0; row < s->height; row++)
        for (int64_t col = 0; col < s->width; col += tall) {
            int64_t i = (row * s->width + col) * n + j;
            F sum[TALL][WIDE];
            around(sum, a, row * s->pitch + col, s, c, w + 2 * j, n, tall, wide);
            put(sum, plus ? plus + i : 0, y + i, n, tall, wide);
        }
}

static void forward_image(const uint16_t *x, const uint16_t *w, const uint16_t *plus, uint16_t *y,
                          const float *saved, uint16_t *a, const Shape *s, int64_t c, int64_t n) {
    const float *scale = saved + 2 * c, *shift = saved + 3 * c;
    for (int64_t row = 0; row < s->height; row++) {
        const uint16_t *from = x + row * s->width * c;
        uint16_t *to = a + (s->start + row * s->pitch) * c;
        for (int64_t i = 0; i < s->width * c; i += c) {
            int64_t j = 0;
            for (; j + 2 * LANES <= c; j += 2 * LANES)
                activate(from + i + j, scale + j, shift + j, to + i + j, 2);
            for (; j < c; j += LANES) activate(from + i + j, scale + j, shift + j, to + i + j, 1);
        }
    }
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES)
        if (s->tall < TALLEST(2))
            outputs(j, a, w, plus, y, s, c, n, 8, 2);
        else
            outputs(j, a, w, plus, y, s, c, n, TALLEST(2), 2);
    for (; j < n; j += LANES)
        if (s->tall < TALL)
            outputs(j, a, w, plus, y, s, c, n, 8, 1);
        else
            outputs(j, a, w, plus, y, s, c, n, TALL, 1);
}

/* again: with the statistics that are saved, which stay as they are. */
void conv3x3_forward(const uint16_t *x, const uint16_t *plus, uint16_t *y, const float *gamma,
                     const float *beta, const float *weight, float *running_mean,
                     float *running_var, float *saved, double *sums, uint16_t *w, int64_t images,
                     int64_t height, int64_t width, int64_t c, int64_t n, double momentum,
                     double eps, int threads, int again) {
    Shape s = shape_of(height, width);
    int64_t size = height * width;
    float origin[MOST];
    for (int64_t j = 0; j < c; j += LANES) store_float(origin + j, load_bf16(x + j));
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        rows_of(images, 1, &first, &last);
        if (!again)
            count(x, origin, sums + 2 * c * omp_get_thread_num(), first * size, last * size, c);
        pack_inputs(weight, w, 9 * c, n); /* its end is a barrier: the sums are there */
#pragma omp single
        if (!again) {
            gather(sums, c);
            statistics(sums, origin, gamma, beta, running_mean, running_var, saved, images * size,
                       c, momentum, eps);
        }
        uint16_t a[s.pixels * c] __attribute__((aligned(64)));
        memset(a, 0, sizeof a);
        begin(s.tall);
        for (int64_t i = first * size; i < last * size; i += size)
            forward_image(x + i * c, w, plus ? plus + i * n : 0, y + i * n, saved, a, &s, c, n);
        end();
    }
}

/* g, its sums and a of columns j on of an image; dy with its border. */
INLINE void gradient(int64_t j, const uint16_t *dy, const uint16_t *w, const uint16_t *x,
                     uint16_t *g, uint16_t *a, const float *saved, double *sums, const Shape *s,
                     int64_t c, int64_t n, int tall, int wide) {
    F total[WIDE], product[WIDE];
    for (int v = 0; v < wide; v++) total[v] = product[v] = (F){0};
    for (int64_t row = 0; row < s->height; row++)
        for (int64_t col = 0; col < s->width; col += tall) {
            int64_t i = (row * s->width + col) * c + j, at = row * s->pitch + col;
            F sum[TALL][WIDE];
            around(sum, dy, at, s, n, w + 2 * j, c, tall, wide);
            let_through(sum, x + i, g + i, saved + j, total, product, c, tall, wide);
#pragma GCC unroll 16
            for (int r = 0; r < tall; r++)
                store_row(a + (s->start + at + r) * c + j, sum[r], wide);
        }
    widen_both(sums + j, total, product, c, wide);
}

/* Pixels two by two, ``many`` times. */
static void by_two(const uint16_t *pixels, uint16_t *two, int64_t many, int64_t channels) {
    for (int64_t i = 0; i < 2 * many * channels; i += 2 * channels)
        for (int64_t j = 0; j < channels; j += LANES)
            *(U_ *)(two + i + 2 * j) = pairs(pixels + i + j, pixels + i + channels + j);
}

/* Room for one image; two: by two pixels, of a beginning with an even and with an odd one. */
typedef struct {
    uint16_t *dy, *dy_two, *a, *a_two[2];
} Room;

static void backward_image(const uint16_t *dy, const uint16_t *x, const uint16_t *w, uint16_t *g,
                           const float *saved, double *sums, float *dw, const Room *room,
                           const Shape *s, int64_t c, int64_t n) {
    for (int64_t row = 0; row < s->height; row++)
        memcpy(room->dy + (s->start + row * s->pitch) * n, dy + row * s->width * n,
               2 * s->width * n);
    int64_t j = 0;
    for (; j + 2 * LANES <= c; j += 2 * LANES)
        if (s->tall < TALLEST(2))
            gradient(j, room->dy, w, x, g, room->a, saved, sums, s, c, n, 8, 2);
        else
            gradient(j, room->dy, w, x, g, room->a, saved, sums, s, c, n, TALLEST(2), 2);
    for (; j < c; j += LANES)
        if (s->tall < TALL)
            gradient(j, room->dy, w, x, g, room->a, saved, sums, s, c, n, 8, 1);
        else
            gradient(j, room->dy, w, x, g, room->a, saved, sums, s, c, n, TALL, 1);

    lay_pairs(room->dy + s->start * n, room->dy_two, s->pairs, n);
    for (int odd = 0; odd < 2; odd++)
        by_two(room->a + odd * c, room->a_two[odd], s->pixels / 2 - 1, c);
    for (int64_t tap = 0; tap < 9; tap++) {
        int64_t moved = tap / 3 * s->pitch + tap % 3;
        const uint16_t *a = room->a_two[moved % 2] + moved / 2 * 2 * c;
        int deep = AMX ? s->tall : 8, deep_alone = AMX ? s->tall : TALL;
        for (j = 0; j + 2 * LANES <= c; j += 2 * LANES)
            for (int64_t i = 0; i < n; i += deep)
                weigh(room->dy_two, i, n, a + 2 * j, c, s->pairs, dw + (i * 9 + tap) * c + j,
                      9 * c, deep, 2);
        for (; j < c; j += LANES)
            for (int64_t i = 0; i < n; i += deep_alone)
                weigh(room->dy_two, i, n, a + 2 * j, c, s->pairs, dw + (i * 9 + tap) * c + j,
                      9 * c, deep_alone, 1);
    }
}

/* parts: [threads - 1][n][9][c], of dW by the other threads. dx has g between the two passes. */
void conv3x3_backward(const uint16_t *dy, const uint16_t *x, const uint16_t *plus, uint16_t *dx,
                      const float *saved, const float *weight, float *dgamma, float *dbeta,
                      float *dw, float *parts, double *sums, uint16_t *w, int64_t images,
                      int64_t height, int64_t width, int64_t c, int64_t n, int threads) {
    Shape s = shape_of(height, width);
    int64_t size = height * width, weights = n * 9 * c;
    float slope[MOST], offset[MOST];
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
        uint16_t dy_[s.pixels * n], dy_two[s.pairs * 2 * n], a[s.pixels * c];
        uint16_t even[s.pixels * c], odd[s.pixels * c];
        memset(dy_, 0, sizeof dy_);
        memset(a, 0, sizeof a);
        Room room = {dy_, dy_two, a, {even, odd}};
        begin(s.tall);
        for (int64_t i = first * size; i < last * size; i += size)
            backward_image(dy + i * n, x + i * c, w, dx + i * c, saved, mine, dw_, &room, &s, c, n);
        end();
#pragma omp barrier
        add_parts(dw, parts, weights);
#pragma omp single
        {
            gather(sums, c);
            gradients(sums, saved, slope, offset, dgamma, dbeta, images * size, c);
        }
        normalized(dx, x, plus, saved + 2 * c, slope, offset, first * size, last * size, c);
    }
}

#endif
