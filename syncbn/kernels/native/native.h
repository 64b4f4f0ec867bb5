/* What the files of this folder share.
 *
 * A tensor is dense, in one of two layouts. Rows: (N, C, S) in this order, S positions side by side. Columns: (N, S, C),
 * channels side by side (channels-last, and matrices). Statistics are double. Elements are computed in the wider of
 * float and their own type, "real" below.
 *
 *   module.c      the door: Python calls with addresses and sizes
 *   operations.c  the five operations, each a few passes over the tensors
 *   statistics.c  everything per channel: merging ranks, running statistics, the vectors that passes read
 *   boxes.c       which part of a tensor each thread works on
 *   loops.h       the passes: element.h, moments.h, output.h, gradients.h, once per data type;
 *                 loops_*.c compile them once per instruction set
 */
#ifndef SYNCBN_NATIVE_H
#define SYNCBN_NATIVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FLOAT32 0
#define FLOAT64 1
#define BFLOAT16 2
#define FLOAT16 3
#define DTYPES 4

/* Longest run that is summed in float. Sums of more values with few bits (bfloat16, or far from zero) lose digits. */
#define RUN 4096
/* Bytes behind per-channel vectors that a loop may touch: one vector register. */
#define SLACK 64
#define MOST_THREADS 256

typedef struct {
    int64_t dtype, columns;
    int64_t samples, channels, positions;
} Geometry;

/* A part of a tensor, for one thread: `samples` x `channels` x `positions`. For columns, samples are matrix rows and
 * there is one position; narrow rows are joined, `channels` is then a multiple of the tensor's, and behind the last
 * whole row there may be one of `tail` elements. */
typedef struct {
    int64_t samples, channels, positions, tail;
    int64_t sample_step, channel_step, mask_step; /* elements of the tensor; elements of the mask */
    int64_t start, mask_start, first_channel;     /* where the box begins */
} Box;

typedef struct {
    int count;
    int64_t joined; /* copies of the channels in a row of columns */
    bool by_channel; /* boxes have different channels, not different elements of all channels */
    Box box[MOST_THREADS];
} Boxes;

/* The operands of a pass. Vectors are real, one value per channel, joined as the boxes are. NULL for what is absent. */
typedef struct {
    const void *x, *grad, *residual;
    const uint8_t *mask; /* one byte per sample and position, not zero where valid */
    void *y, *g;         /* the output or input gradient, and the gradient behind the rectifier */
    const void *mean, *scale, *shift;            /* output: (x - mean) * scale + shift + residual */
    const void *grad_mean, *slope, *offset;      /* gradient: (g - grad_mean) * scale - (x - mean) * slope + offset */
    bool relu;
    double limit; /* the largest value that is zero when rounded to the dtype of the output */
} Pass;

/* Two sums per channel of a box. `scratch` has room for three real vectors, `scratch_step` values apart. */
typedef struct {
    double count;
    double *first, *second;
    void *scratch;
    int64_t scratch_step;
} Sums;

/* Passes over one box: for one data type and layout. */
typedef struct {
    void (*moments)(const Pass *, const Box *, Sums *);       /* (mean, squared deviations); of valid elements */
    void (*output)(const Pass *, const Box *);                /* writes y */
    void (*gradient_sums)(const Pass *, const Box *, Sums *); /* (sum g, sum g * (x - mean)) */
    void (*gradient)(const Pass *, const Box *);              /* writes y, unless NULL, and g, unless NULL */
} Loops;

typedef Loops LoopTable[DTYPES][2]; /* by data type; rows, then columns */

extern const LoopTable baseline_loops;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAVE_X86_LOOPS 1
extern const LoopTable avx2_loops, avx512_loops;
#endif

/* boxes.c */
void split(const Geometry *, bool masked, int threads, Boxes *);

/* statistics.c */
typedef struct {
    const void *data; /* NULL for none */
    int64_t dtype;    /* FLOAT32 or FLOAT64 */
} Vector;

typedef struct {
    void *mean, *var; /* NULL for none */
    int64_t *batches; /* NULL for none */
    int64_t mean_dtype, var_dtype; /* FLOAT32 or FLOAT64 */
    double momentum;  /* NaN: the average over all batches */
} Running;

typedef struct {
    const double *rows; /* of all ranks */
    int64_t count, step;
    bool raw;
} Parts;

double merge(const Parts *, int64_t channels, double *mean, double *m2);
void add_up(const Parts *, int64_t width, double *sums);
void move_running(const Running *, int64_t channels, double n, const double *mean, const double *m2);
void read_vector(const Vector *, int64_t channels, double otherwise, double *values);
void write_vector(const double *values, int64_t channels, int64_t dtype, void *to);

/* operations.c: the seam of the kernels, on addresses. Each returns whether there was memory to work in. */
typedef struct {
    Geometry geometry;
    const LoopTable *loops;
    int threads;
} Call;

/* What the output is made of: statistics (mean, invstd, n) of the global batch, and parameters. */
typedef struct {
    const double *stats;
    Vector weight, bias;
} Affine;

bool pack_moments(const Call *, const Pass *, bool raw, double *payload);
bool normalize_shared(const Call *, Pass *, const Parts *, const Vector *weight, const Vector *bias, double eps,
                      const Running *, double *stats, double *m2, bool *finite);
bool pack_gradient_sums(const Call *, Pass *, const Affine *, double *sums);
bool input_gradient(const Call *, Pass *, const Affine *, const Parts *);

#endif
