/* Batch normalization, ReLU and an addition, in training, forward and backward:

     y = f(scale x + shift, plus)     f: their sum, with ReLU BEFORE it, AFTER it or nowhere

   ``plus`` may be null: nothing is added, and ReLU is not AFTER. Each function exists for bf16
   (T = uint16_t) and for float. A thread takes the same rows in both passes, so that the second
   finds in its cache what the first brought there. */

#include "vectors.h"

enum { BEFORE = 1, AFTER = 2 }; /* where ReLU is, if anywhere */

#define FORWARD(NAME, T, LOAD, STORE)                                                            \
    void NAME(const T *x, const T *plus, T *y, const float *gamma, const float *beta,            \
              float *running_mean, float *running_var, float *saved, double *sums, int64_t rows, \
              int64_t c, double momentum, double eps, int relu, int threads) {                   \
        float origin[MOST];                                                                      \
        for (int64_t j = 0; j < c; j += LANES)                                                   \
            *(F_ *)(origin + j) = LOAD(x + j);                                                   \
        _Pragma("omp parallel num_threads(threads)") {                                           \
            double *mine = sums + 2 * c * omp_get_thread_num();                                  \
            memset(mine, 0, 2 * c * sizeof(double));                                             \
            int64_t first, last;                                                                 \
            rows_of(rows, 1, &first, &last);                                                     \
            for (int64_t b = first; b < last; b += BLOCK) {                                      \
                int64_t end = b + BLOCK < last ? b + BLOCK : last;                               \
                for (int64_t j = 0; j < c; j += LANES) {                                         \
                    F o = *(F_ *)(origin + j);                                                   \
                    F s[4] = {0}, q[4] = {0};                                                    \
                    int64_t r = b;                                                               \
                    for (; r + 4 <= end; r += 4)                                                 \
                        for (int k = 0; k < 4; k++) {                                            \
                            soon(x + (r + k) * c + j);                                           \
                            F v = LOAD(x + (r + k) * c + j);                                     \
                            v -= o;                                                              \
                            s[k] += v;                                                           \
                            q[k] += v * v;                                                       \
                        }                                                                        \
                    for (; r < end; r++) {                                                       \
                        F v = LOAD(x + r * c + j);                                               \
                        v -= o;                                                                  \
                        s[0] += v;                                                               \
                        q[0] += v * v;                                                           \
                    }                                                                            \
                    widen(mine + j, (s[0] + s[1]) + (s[2] + s[3]));                              \
                    widen(mine + c + j, (q[0] + q[1]) + (q[2] + q[3]));                          \
                }                                                                                \
            }                                                                                    \
            _Pragma("omp barrier") _Pragma("omp single") {                                       \
                gather(sums, c);                                                                 \
                statistics(sums, origin, gamma, beta, running_mean, running_var, saved, rows, c, \
                           momentum, eps);                                                       \
            }                                                                                    \
            APPLY(x, plus, y, saved, first, last, c, relu, LOAD, STORE)                          \
        }                                                                                        \
    }

#define APPLY(X, PLUS, Y, SAVED, FIRST, LAST, C, RELU, LOAD, STORE)                              \
    for (int64_t b = FIRST; b < LAST; b += BLOCK) {                                              \
        int64_t end = b + BLOCK < LAST ? b + BLOCK : LAST;                                       \
        for (int64_t j = 0; j < C; j += LANES) {                                                 \
            F scale = *(F_ *)(SAVED + 2 * C + j), shift = *(F_ *)(SAVED + 3 * C + j);            \
            for (int64_t r = b; r < end; r++) {                                                  \
                soon((X) + r * C + j);                                                           \
                soon(Y + r * C + j);                                                             \
                if (PLUS) soon(PLUS + r * C + j);                                                \
                F v = scale * LOAD((X) + r * C + j) + shift;                                     \
                if (RELU == BEFORE) v = only(v, ~(U)(v < 0));                                    \
                if (PLUS) v += LOAD(PLUS + r * C + j);                                           \
                if (RELU == AFTER) v = only(v, ~(U)(v < 0));                                     \
                STORE(Y + r * C + j, v);                                                         \
            }                                                                                    \
        }                                                                                        \
    }

/* Recompute y of a forward pass without plus, from x and what was saved. */
#define AGAIN(NAME, T, LOAD, STORE)                                                              \
    void NAME(const T *x, T *y, const float *saved, int64_t rows, int64_t c, int relu,           \
              int threads) {                                                                     \
        _Pragma("omp parallel num_threads(threads)") {                                           \
            int64_t first, last;                                                                 \
            rows_of(rows, 1, &first, &last);                                                     \
            APPLY(x, (const T *)0, y, saved, first, last, c, relu, LOAD, STORE)                  \
        }                                                                                        \
    }

/* g, the gradient that ReLU lets pass: where it does is seen from x (v), or from y if AFTER. */
#define PASSED(G, R, LOAD)                                                                       \
    if (relu == BEFORE) G = only(G, ~(U)(scale * v + shift <= 0));                               \
    if (relu == AFTER) G = only(G, ~(U)(LOAD(y + (R) * c + j) <= 0));

/* dx, dgamma and dbeta, from the gradient of y. If ReLU is AFTER, this needs y, and writes dplus
   too; otherwise dplus is dy. */
#define BACKWARD(NAME, T, LOAD, STORE)                                                           \
    void NAME(const T *dy, const T *x, const T *y, T *dx, T *dplus, const float *saved,          \
              float *dgamma, float *dbeta, double *sums, int64_t rows, int64_t c, int relu,      \
              int threads) {                                                                     \
        float slope[MOST], offset[MOST];                                                         \
        _Pragma("omp parallel num_threads(threads)") {                                           \
            double *mine = sums + 2 * c * omp_get_thread_num();                                  \
            memset(mine, 0, 2 * c * sizeof(double));                                             \
            int64_t first, last;                                                                 \
            rows_of(rows, 1, &first, &last);                                                     \
            for (int64_t b = first; b < last; b += BLOCK) {                                      \
                int64_t end = b + BLOCK < last ? b + BLOCK : last;                               \
                for (int64_t j = 0; j < c; j += LANES) {                                         \
                    F mean = *(F_ *)(saved + j), scale = *(F_ *)(saved + 2 * c + j);             \
                    F shift = *(F_ *)(saved + 3 * c + j);                                        \
                    F s[4] = {0}, q[4] = {0};                                                    \
                    int64_t r = b;                                                               \
                    for (; r + 4 <= end; r += 4)                                                 \
                        for (int k = 0; k < 4; k++) {                                            \
                            soon(x + (r + k) * c + j);                                           \
                            soon(dy + (r + k) * c + j);                                          \
                            F v = LOAD(x + (r + k) * c + j), g = LOAD(dy + (r + k) * c + j);     \
                            PASSED(g, r + k, LOAD)                                               \
                            s[k] += g;                                                           \
                            q[k] += g * (v - mean);                                              \
                        }                                                                        \
                    for (; r < end; r++) {                                                       \
                        F v = LOAD(x + r * c + j), g = LOAD(dy + r * c + j);                     \
                        PASSED(g, r, LOAD)                                                       \
                        s[0] += g;                                                               \
                        q[0] += g * (v - mean);                                                  \
                    }                                                                            \
                    widen(mine + j, (s[0] + s[1]) + (s[2] + s[3]));                              \
                    widen(mine + c + j, (q[0] + q[1]) + (q[2] + q[3]));                          \
                }                                                                                \
            }                                                                                    \
            _Pragma("omp barrier") _Pragma("omp single") {                                       \
                gather(sums, c);                                                                 \
                gradients(sums, saved, slope, offset, dgamma, dbeta, rows, c);                   \
            }                                                                                    \
            for (int64_t b = first; b < last; b += BLOCK) {                                      \
                int64_t end = b + BLOCK < last ? b + BLOCK : last;                               \
                for (int64_t j = 0; j < c; j += LANES) {                                         \
                    F scale = *(F_ *)(saved + 2 * c + j), shift = *(F_ *)(saved + 3 * c + j);    \
                    F m = *(F_ *)(slope + j), o = *(F_ *)(offset + j);                           \
                    for (int64_t r = b; r < end; r++) {                                          \
                        soon(x + r * c + j);                                                     \
                        soon(dy + r * c + j);                                                    \
                        soon(dx + r * c + j);                                                    \
                        F v = LOAD(x + r * c + j), g = LOAD(dy + r * c + j);                     \
                        PASSED(g, r, LOAD)                                                       \
                        F d = scale * g + (m * v + o);                                           \
                        STORE(dx + r * c + j, d);                                                \
                        if (relu == AFTER) STORE(dplus + r * c + j, g);                          \
                    }                                                                            \
                }                                                                                \
            }                                                                                    \
        }                                                                                        \
    }

FORWARD(forward_bf16, uint16_t, load_bf16, store_bf16)
FORWARD(forward_float, float, load_float, store_float)
AGAIN(again_bf16, uint16_t, load_bf16, store_bf16)
AGAIN(again_float, float, load_float, store_float)
BACKWARD(backward_bf16, uint16_t, load_bf16, store_bf16)
BACKWARD(backward_float, float, load_float, store_float)

/* Floats per vector of the processor. */
int lanes(void) { return LANES; }
