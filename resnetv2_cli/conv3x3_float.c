/* conv3x3.c for float; without AVX-512 PyTorch's convolutions are faster. */

#ifdef __AVX512F__
#define FLOATS
#include "conv3x3.c"
#endif
