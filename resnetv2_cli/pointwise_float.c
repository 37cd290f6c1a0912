/* pointwise.c for float. */

#define FLOATS
#include "pointwise.c"
