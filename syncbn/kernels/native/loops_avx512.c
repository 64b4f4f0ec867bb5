/* For x86-64 processors with AVX-512, as servers have it. */
#include "native.h"
#ifdef HAVE_X86_LOOPS
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define WIDTH 64
#define LOOPS avx512_loops
#include "loops.h"
#endif
