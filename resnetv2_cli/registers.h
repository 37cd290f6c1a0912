/* Products by vectors (products.h): sums of 8 x 2 or 16 x 1 vectors in registers; without AVX-512,
   of half as many rows. */

#define AMX 0

static void begin(int tall) {}
static void end(void) {}

INLINE void clear(F sum[][TALL][WIDE], int tall, int wide, int high) {
    for (int r = 0; r < tall; r++)
        for (int v = 0; v < wide; v++) sum[0][r][v] = (F){0};
}

/* sum[h][r][v] += left[h][r][k] right[v][k], k in pairs, for h below ``high``, which is 1 here. The
   rows of the left factor are ``stride`` numbers apart. */
INLINE void tile(F sum[][TALL][WIDE], const T *const *left, int64_t stride,
                 const T *const *right, int64_t columns, int64_t many, int tall, int wide,
                 int high) {
    const T *of[WIDE], *rows[TALL / 4]; /* every fourth */
    for (int v = 0; v < wide; v++) of[v] = right[v];
    for (int q = 0; q < tall / 4; q++) rows[q] = left[0] + 4 * q * stride;
    for (int64_t k = 0; k < many; k++) {
        P w[WIDE];
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) {
            w[v] = *(const P_ *)of[v];
            __asm__("" : "+v"(w[v])); /* or gcc reloads it for each product */
            of[v] += PAIR * columns;
        }
#pragma GCC unroll 4
        for (int q = 0; q < tall / 4; q++) {
            __asm__("" : "+r"(rows[q])); /* or gcc has an address per row, and no register left */
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                P l = spread(rows[q] + r * stride);
#pragma GCC unroll 2
                for (int v = 0; v < wide; v++)
                    sum[0][4 * q + r][v] = dot(sum[0][4 * q + r][v], w[v], l);
            }
            rows[q] += PAIR;
        }
    }
}

/* The sums are complete. */
INLINE void done(F sum[][TALL][WIDE], int wide, int high) {}

/* dW of a tile, from output i on, over ``many`` pairs of rows, added to what is there. dy: in
   pairs, as written by lay_pairs; a, dw: where each vector begins; row: numbers in a row of dw. */
INLINE void weigh(const T *dy, int64_t i, int64_t n, const T *const *a, int64_t columns,
                  int64_t many, float *const *dw, int64_t row, int tall, int wide) {
    F sum[TALL][WIDE];
    const T *left = dy + PAIR * i, *right[WIDE];
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++) {
        right[v] = a[v];
#pragma GCC unroll 16
        for (int r = 0; r < tall; r++) sum[r][v] = load_float(dw[v] + r * row);
    }
    for (int64_t k = 0; k < many; k++, left += PAIR * n) {
        P w[WIDE];
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) {
            w[v] = *(const P_ *)right[v];
            __asm__("" : "+v"(w[v]));
            right[v] += PAIR * columns;
        }
#pragma GCC unroll 16
        for (int r = 0; r < tall; r++) {
            P l = spread(left + PAIR * r);
#pragma GCC unroll 2
            for (int v = 0; v < wide; v++) sum[r][v] = dot(sum[r][v], w[v], l);
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < wide; v++)
#pragma GCC unroll 16
        for (int r = 0; r < tall; r++) store_float(dw[v] + r * row, sum[r][v]);
}

#if PAIR > 1
/* Lay ``many`` pairs of rows of n numbers as [many][n][2]. */
static void lay_pairs(const T *rows, T *to, int64_t many, int64_t n) {
    for (int64_t i = 0; i < 2 * many * n; i += 2 * n)
        for (int64_t j = 0; j < n; j += LANES)
            *(P_ *)(to + i + 2 * j) = pairs(rows + i + j, rows + i + n + j);
}
#endif
