/* Factors of float (products.h): a pair is one number. */

typedef float T;
typedef F P;
typedef F_ P_;
#define PAIR 1

INLINE F dot(F sum, P a, P b) { return sum + a * b; }
INLINE P joined(const F part[PAIR]) { return part[0]; }
INLINE void copy(const T *from, T *to) { *(F_ *)to = *(const F_ *)from; }

INLINE void store_row(T *p, const F *x, int wide) {
    for (int v = 0; v < wide; v++) store_float(p + v * LANES, x[v]);
}

/* The number at p in each lane. gcc omits the - 0, but would compute 0 + x, which changes -0. */
INLINE P spread(const T *p) { return *p - (F){0}; }
