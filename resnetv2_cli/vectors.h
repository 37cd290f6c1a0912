/* What kernels.c and products.h share: work on as many channels at a time as a vector of the
   processor has floats, and the statistics of BN from sums of each thread.

   Tensors are channels last: rows (images, times height, times width) of c channels, c a multiple
   of 16. bf16 is uint16_t. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <omp.h>

#ifdef __AVX512F__
#define LANES 16
#elif defined __AVX__
#define LANES 8
#else /* SSE, NEON; for vectors longer than the processor's, gcc's code goes through memory */
#define LANES 4
#endif
#define BLOCK 64 /* rows between additions to the sums in double */
#define MOST 4096 /* channels */
#define AHEAD 8192 /* bytes */

typedef float F __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));
typedef float F_ __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t U_ __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t H_ __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* Prefetch what lies a little after a place and will be needed next: it comes from memory while
   the current numbers are computed. */
static inline void soon(const void *p) { __builtin_prefetch((const char *)p + AHEAD, 0, 2); }

static inline F load_bf16(const uint16_t *p) {
#ifdef __AVX512F__ /* one instruction; the compiler makes five of the other branch */
    return (F)((U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)) << 16);
#else
    return (F)(__builtin_convertvector(*(const H_ *)p, U) << 16);
#endif
}

static inline H to_bf16(F x) {
#ifdef __AVX512BF16__
    return (H)_mm512_cvtneps_pbh((__m512)x);
#else
    U u = (U)x, nan = (U)(x != x); /* to the nearest, ties to even; a NaN stays one */
    U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), H);
#endif
}

static inline void store_bf16(uint16_t *p, F x) { *(H_ *)p = to_bf16(x); }
static inline F load_float(const float *p) { return *(const F_ *)p; }
static inline void store_float(float *p, F x) { *(F_ *)p = x; }
static inline F only(F x, U kept) { return (F)((U)x & kept); }

static inline void widen(double *sum, F x) {
    for (int i = 0; i < LANES; i++) sum[i] += x[i];
}

/* The rows of this thread, from one multiple of ``whole`` to another. */
static inline void rows_of(int64_t rows, int64_t whole, int64_t *first, int64_t *last) {
    int64_t n = omp_get_num_threads(), i = omp_get_thread_num(), parts = (rows + whole - 1) / whole;
    *first = parts * i / n * whole;
    *last = parts * (i + 1) / n * whole;
    if (*last > rows) *last = rows;
}

/* Add the sums of all threads, in their order, to the first thread's; sums: [threads][2][c]. */
static inline void gather(double *sums, int64_t c) {
    int n = omp_get_num_threads();
    for (int t = 1; t < n; t++)
        for (int64_t j = 0; j < 2 * c; j++) sums[j] += sums[2 * c * t + j];
}

/* From sums of x - origin and of its square: update the running statistics with momentum; and
   write saved, [4][c] of mean, 1 / std, scale and shift: y = scale x + shift. */
static inline void statistics(const double *sums, const float *origin, const float *gamma,
                              const float *beta, float *running_mean, float *running_var,
                              float *saved, int64_t rows, int64_t c, double momentum,
                              double eps) {
    for (int64_t j = 0; j < c; j++) {
        double off = sums[j] / rows, var = sums[c + j] / rows - off * off;
        if (var < 0) var = 0; /* rounding; a NaN stays */
        double mean = origin[j] + off, inverse = 1 / sqrt(var + eps);
        double unbiased = var * rows / (rows - 1);
        saved[j] = mean;
        saved[c + j] = inverse;
        saved[2 * c + j] = gamma[j] * inverse;
        saved[3 * c + j] = beta[j] - mean * gamma[j] * inverse;
        running_mean[j] += momentum * (mean - running_mean[j]);
        running_var[j] += momentum * (unbiased - running_var[j]);
    }
}

/* From sums of g, the gradient that ReLU let pass, and of g (x - mean): dgamma and dbeta; and
   slope and offset: dx = scale g + slope x + offset. */
static inline void gradients(const double *sums, const float *saved, float *slope, float *offset,
                             float *dgamma, float *dbeta, int64_t rows, int64_t c) {
    for (int64_t j = 0; j < c; j++) {
        double inverse = saved[c + j], scale = saved[2 * c + j];
        double slope_ = -scale * inverse * inverse * sums[c + j] / rows;
        slope[j] = slope_;
        offset[j] = -scale * sums[j] / rows - slope_ * saved[j];
        dgamma[j] = sums[c + j] * inverse;
        dbeta[j] = sums[j];
    }
}
