/* BN, ReLU and a 3x3 convolution of stride 1 (products.h), image by image.

   An image lies aside with a border of zeros, two columns of which end a row and begin the next:
   pitch = width + 2 pixels. So the nine that an output sees are three runs of three pixels; and
   along the image as one line, those at one tap are the image moved by a constant. Where it lies by
   pairs of pixels, from an even one on, none has pixels of two rows. */

#include "products.h"

#ifdef __AVX512BF16__

#define MOST_HIGH (AMX ? 2 : 1)
#define HIGH(TALL_) (AMX ? TALL / TALL_ : 1) /* tiles at once: of AMX's, those that make 16 rows */

typedef struct {
    int64_t height, width, pitch;
    int64_t start;  /* of the first pixel that is no border */
    int64_t pixels; /* with the border, and a few more zeros that the last pairs reach into */
    int64_t pairs;  /* of pixels from the first to the last, with the borders between rows */
    int64_t filled; /* of these, those before the zeros that fill up the last of a sum */
    int tall;       /* pixels of a row that a tile takes */
} Shape;

static Shape shape_of(int64_t height, int64_t width) {
    int64_t pitch = width + 2, filled = height * pitch / 2;
    int64_t pairs = (filled + EVEN - 1) / EVEN * EVEN, pixels = 2 * pairs + 2 * pitch + 6;
    Shape s = {height, width, pitch, pitch + 2, pixels, pairs, filled, width % 16 ? 8 : 16};
    return s;
}

/* Where a pixel of the image lies, from the first on. */
INLINE int64_t place(const Shape *s, int64_t pixel) {
    return pixel + pixel / s->width * (s->pitch - s->width);
}

/* Tiles of sums over the nine pixels around each of ``tall``, from one pixel on. */
INLINE void around(F sum[][TALL][WIDE], const uint16_t *image, int64_t pixel, const Shape *s,
                   int64_t channels, const uint16_t *w, int64_t columns, int tall, int wide,
                   int high) {
    int64_t upper_left = s->start - s->pitch - 1;
    clear(sum, tall, wide, high);
    for (int row = 0; row < 3; row++) {
        const uint16_t *left[MOST_HIGH], *right[WIDE] = {w, w + 2 * LANES};
        for (int h = 0; h < high; h++)
            left[h] = image + (upper_left + place(s, pixel + h * tall) + row * s->pitch) * channels;
        tile(sum, left, channels, 2, right, columns, 3 * channels / 2, tall, wide, high);
        w += 3 * channels * columns;
    }
    done(sum, wide, high);
}

/* y of tiles from a pixel on, as below. */
INLINE void output(int64_t pixel, int64_t j, const uint16_t *a, const uint16_t *w,
                   const uint16_t *plus, uint16_t *y, const Shape *s, int64_t c, int64_t n,
                   int tall, int wide, int high) {
    F sum[MOST_HIGH][TALL][WIDE];
    around(sum, a, pixel, s, c, w + 2 * j, n, tall, wide, high);
    for (int h = 0; h < high; h++) {
        int64_t i = (pixel + h * tall) * n + j;
        put(sum[h], plus ? plus + i : 0, y + i, n, tall, wide);
    }
}

/* Columns j on of y of an image; a: the image activated. */
INLINE void outputs(int64_t j, const uint16_t *a, const uint16_t *w, const uint16_t *plus,
                    uint16_t *y, const Shape *s, int64_t c, int64_t n, int tall, int wide) {
    int64_t pixel = 0, size = s->height * s->width;
    for (; pixel + HIGH(tall) * tall <= size; pixel += HIGH(tall) * tall)
        output(pixel, j, a, w, plus, y, s, c, n, tall, wide, HIGH(tall));
    if (pixel < size) output(pixel, j, a, w, plus, y, s, c, n, tall, wide, 1);
}

static void forward_image(const uint16_t *x, const uint16_t *w, const uint16_t *plus, uint16_t *y,
                          const float *saved, uint16_t *a, const Shape *s, int64_t c, int64_t n) {
    for (int64_t row = 0; row < s->height; row++)
        activate_rows(x + row * s->width * c, saved, a + (s->start + row * s->pitch) * c, s->width,
                      c);
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
            memset(saved + 4 * c, 0, c * sizeof(float));
        }
        uint16_t a[s.pixels * c] __attribute__((aligned(64)));
        memset(a, 0, sizeof a);
        begin(s.tall);
        for (int64_t i = first * size; i < last * size; i += size)
            forward_image(x + i * c, w, plus ? plus + i * n : 0, y + i * n, saved, a, &s, c, n);
        end();
    }
}

/* g, its sums and a of tiles from a pixel on, as below. */
INLINE void gradient(int64_t pixel, int64_t j, const uint16_t *dy, const uint16_t *w,
                     const uint16_t *x, uint16_t *g, uint16_t *a, const float *saved, F *total,
                     F *product, const Shape *s, int64_t c, int64_t n, int tall, int wide,
                     int high) {
    F sum[MOST_HIGH][TALL][WIDE];
    around(sum, dy, pixel, s, n, w + 2 * j, c, tall, wide, high);
    for (int h = 0; h < high; h++) {
        int64_t i = (pixel + h * tall) * c + j;
        let_through(sum[h], x + i, g + i, saved + j, total, product, c, tall, wide);
        put_pairs(sum[h], a + (s->start + place(s, pixel + h * tall)) * c + 2 * j, c, tall, wide);
    }
}

/* g, its sums, and a by pairs, of columns j on of an image; dy with its border. */
INLINE void gradients_of(int64_t j, const uint16_t *dy, const uint16_t *w, const uint16_t *x,
                         uint16_t *g, uint16_t *a, const float *saved, double *sums,
                         const Shape *s, int64_t c, int64_t n, int tall, int wide) {
    F total[WIDE], product[WIDE];
    for (int v = 0; v < wide; v++) total[v] = product[v] = (F){0};
    int64_t pixel = 0, size = s->height * s->width;
    for (; pixel + HIGH(tall) * tall <= size; pixel += HIGH(tall) * tall)
        gradient(pixel, j, dy, w, x, g, a, saved, total, product, s, c, n, tall, wide, HIGH(tall));
    if (pixel < size)
        gradient(pixel, j, dy, w, x, g, a, saved, total, product, s, c, n, tall, wide, 1);
    widen_both(sums + j, total, product, c, wide);
}

/* Pairs that begin with an odd pixel, from those that begin with an even one. */
static void between(const uint16_t *even, uint16_t *odd, const Shape *s, int64_t c) {
    for (int64_t i = (s->start - 2) * c; i < (s->start + 2 * s->filled) * c; i += 2 * LANES)
        *(U_ *)(odd + i) = *(const U_ *)(even + i) >> 16 | *(const U_ *)(even + i + 2 * c) << 16;
}

/* Room for one image: dy, and by pairs without the border; a by pairs, even and odd. */
typedef struct {
    uint16_t *dy, *dy_two, *a[2];
} Room;

/* dW of outputs i on and columns j on, of all taps: at each the image is moved. */
INLINE void weights(int64_t i, int64_t j, const Room *room, float *dw, const Shape *s, int64_t c,
                    int64_t n, int tall, int wide) {
    for (int row = 0; row < 3; row++) {
        const uint16_t *right[3];
        float *to[3];
        for (int tap = 0; tap < 3; tap++) {
            int64_t moved = s->start + (row - 1) * s->pitch + tap - 1;
            right[tap] = room->a[moved % 2] + (moved - moved % 2) * c + 2 * j;
            to[tap] = dw + (i * 9 + row * 3 + tap) * c + j;
        }
        if (AMX) {
            weigh(room->dy_two, i, n, right, c, s->pairs, to, 9 * c, tall, 3);
            continue;
        }
        for (int tap = 0; tap < 3; tap++) {
            const uint16_t *both[2] = {right[tap], right[tap] + 2 * LANES};
            float *to_both[2] = {to[tap], to[tap] + LANES};
            weigh(room->dy_two, i, n, both, c, s->pairs, to_both, 9 * c, tall, wide);
        }
    }
}

static void backward_image(const uint16_t *dy, const uint16_t *x, const uint16_t *w, uint16_t *g,
                           const float *saved, double *sums, float *dw, const Room *room,
                           const Shape *s, int64_t c, int64_t n) {
    for (int64_t row = 0; row < s->height; row++)
        memcpy(room->dy + (s->start + row * s->pitch) * n, dy + row * s->width * n,
               2 * s->width * n);
    begin(s->tall);
    int64_t j = 0;
    for (; j + 2 * LANES <= c; j += 2 * LANES)
        if (s->tall < TALLEST(2))
            gradients_of(j, room->dy, w, x, g, room->a[0], saved, sums, s, c, n, 8, 2);
        else
            gradients_of(j, room->dy, w, x, g, room->a[0], saved, sums, s, c, n, TALLEST(2), 2);
    for (; j < c; j += LANES)
        if (s->tall < TALL)
            gradients_of(j, room->dy, w, x, g, room->a[0], saved, sums, s, c, n, 8, 1);
        else
            gradients_of(j, room->dy, w, x, g, room->a[0], saved, sums, s, c, n, TALL, 1);

    lay_pairs(room->dy + s->start * n, room->dy_two, s->pairs, n);
    between(room->a[0], room->a[1], s, c);
    begin(TALL);
    for (j = 0; !AMX && j + 2 * LANES <= c; j += 2 * LANES)
        for (int64_t i = 0; i < n; i += TALLEST(2))
            weights(i, j, room, dw, s, c, n, TALLEST(2), 2);
    for (; j < c; j += LANES)
        for (int64_t i = 0; i < n; i += TALL) weights(i, j, room, dw, s, c, n, TALL, 1);
}

/* alone: a convolution without BN, by what is ``saved`` of no BN; dgamma, dbeta are not written.
   parts: [threads - 1][n][9][c], of dW by the other threads. dx has g between the two passes. */
void conv3x3_backward(const uint16_t *dy, const uint16_t *x, const uint16_t *plus, uint16_t *dx,
                      const float *saved, const float *weight, float *dgamma, float *dbeta,
                      float *dw, float *parts, double *sums, uint16_t *w, int64_t images,
                      int64_t height, int64_t width, int64_t c, int64_t n, int threads,
                      int alone) {
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
        uint16_t dy_[s.pixels * n] __attribute__((aligned(64)));
        uint16_t dy_two[s.pairs * 2 * n] __attribute__((aligned(64)));
        uint16_t even[s.pixels * c] __attribute__((aligned(64)));
        uint16_t odd[s.pixels * c] __attribute__((aligned(64)));
        memset(dy_, 0, sizeof dy_);
        memset(even, 0, sizeof even);
        memset(odd, 0, sizeof odd);
        Room room = {dy_, dy_two, {even, odd}};
        for (int64_t i = first * size; i < last * size; i += size)
            backward_image(dy + i * n, x + i * c, w, dx + i * c, saved, mine, dw_, &room, &s, c, n);
        end();
#pragma omp barrier
        add_parts(dw, parts, weights);
#pragma omp single
        if (!alone) {
            gather(sums, c);
            gradients(sums, saved, slope, offset, dgamma, dbeta, images * size, c);
        }
        if (!alone || plus)
            normalized(dx, x, plus, saved + 2 * c, slope, offset, first * size, last * size, c);
    }
}

#endif
