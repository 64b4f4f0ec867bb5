/* For x86-64 processors with AVX2. */
#include "native.h"
#ifdef HAVE_X86_LOOPS
#include <immintrin.h>
#pragma GCC target("avx2,f16c")
#define WIDTH 32
#define LOOPS avx2_loops
#include "loops.h"
#endif
