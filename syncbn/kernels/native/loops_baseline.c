/* For every processor: SSE2 on x86-64, NEON on aarch64. */
#define WIDTH 16
#define LOOPS baseline_loops
#include "loops.h"
