/* conv3x3.c for float. */

#define FLOATS
#include "conv3x3.c"
