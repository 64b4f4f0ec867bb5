/* The passes for all data types, with vectors of WIDTH bytes, as the table LOOPS. */
#include <math.h>
#include <string.h>

#include "native.h"

static inline int64_t count_valid(const uint8_t *mask, int64_t length) {
    if (mask == NULL) return length;
    int64_t count = 0;
    for (int64_t i = 0; i < length; i++) count += mask[i] != 0;
    return count;
}

#define DTYPE FLOAT32
#include "passes.h"
#undef DTYPE
#define DTYPE FLOAT64
#include "passes.h"
#undef DTYPE
#define DTYPE BFLOAT16
#include "passes.h"
#undef DTYPE
#define DTYPE FLOAT16
#include "passes.h"
#undef DTYPE

#define BOTH_LAYOUTS(suffix)                                                                        \
    {                                                                                               \
        {row_moments##suffix, row_output##suffix, row_sums##suffix, row_gradient##suffix}, {        \
            column_moments##suffix, column_output##suffix, column_sums##suffix, column_gradient##suffix \
        }                                                                                           \
    }

#undef row_moments
#undef row_output
#undef row_sums
#undef row_gradient
#undef column_moments
#undef column_output
#undef column_sums
#undef column_gradient

const LoopTable LOOPS = {
    [FLOAT32] = BOTH_LAYOUTS(_float32),
    [FLOAT64] = BOTH_LAYOUTS(_float64),
    [BFLOAT16] = BOTH_LAYOUTS(_bfloat16),
    [FLOAT16] = BOTH_LAYOUTS(_float16),
};
