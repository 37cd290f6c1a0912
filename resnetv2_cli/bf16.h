/* Factors of bf16 (products.h), which the processor multiplies in pairs. */

typedef uint16_t T;
typedef U P;   /* a vector of pairs */
typedef U_ P_;
#define PAIR 2

INLINE F dot(F sum, P a, P b) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

INLINE void copy(const T *from, T *to) { *(H_ *)to = *(const H_ *)from; }

/* Two vectors as bf16, one after the other. */
INLINE U both(F first, F other) {
    return (U)_mm512_cvtne2ps_pbh((__m512)other, (__m512)first);
}

/* The two halves interleaved: pairs of one number from each. */
INLINE U woven(U both) {
    static const uint16_t order[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                              21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                              11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (U)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)both);
}

/* Two vectors as bf16, interleaved: pairs of one number from each. */
INLINE P joined(const F part[PAIR]) { return woven(both(part[0], part[1])); }

INLINE void store_row(T *p, const F *x, int wide) {
    if (wide == 2)
        *(U_ *)p = both(x[0], x[1]);
    else
        store_bf16(p, x[0]);
}

/* The numbers at low and at high, interleaved. */
INLINE P pairs(const T *low, const T *high) {
    __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low));
    return woven((U)_mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *)high), 1));
}

/* The pair at p, sixteen times. */
INLINE P spread(const T *p) {
    uint32_t both;
    memcpy(&both, p, sizeof both);
    return (U)_mm512_set1_epi32(both);
}
