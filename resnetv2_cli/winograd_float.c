/* winograd.c for tensors of float. */

#define FLOATS
#include "winograd.c"
