/* patches.c for float. */

#define FLOATS
#include "patches.c"
