/* The operations of the seam: vectors of the channels first, then passes over the tensors in parallel boxes. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

/* Vectors with one value per channel: double, and real, joined as the boxes are. */
typedef struct {
    void *memory;
    double *wide[5];
    void *real[6];
} Workspace;

static int64_t real_dtype(const Call *call) { return call->geometry.dtype == FLOAT64 ? FLOAT64 : FLOAT32; }

static size_t real_size(const Call *call) { return call->geometry.dtype == FLOAT64 ? sizeof(double) : sizeof(float); }

static const Loops *loops_of(const Call *call) {
    return &(*call->loops)[call->geometry.dtype][call->geometry.columns != 0];
}

static size_t padded(size_t bytes) { return (bytes + SLACK + 63) / 64 * 64; }

static bool make_workspace(Workspace *work, const Call *call, const Boxes *boxes) {
    size_t channels = (size_t)call->geometry.channels;
    size_t wide = padded(channels * sizeof(double)), real = padded(channels * (size_t)boxes->joined * real_size(call));
    char *memory = aligned_alloc(64, 5 * wide + 6 * real);
    work->memory = memory;
    if (memory == NULL) return false;
    for (int i = 0; i < 5; i++) work->wide[i] = (double *)(memory + (size_t)i * wide);
    for (int i = 0; i < 6; i++) work->real[i] = memory + 5 * wide + (size_t)i * real;
    return true;
}

/* A vector of a workspace as passes read it: rounded, and repeated for joined rows. */
static const void *round_to(void *real, const double *values, const Call *call, const Boxes *boxes) {
    int64_t channels = call->geometry.channels;
    size_t bytes = (size_t)channels * real_size(call);
    write_vector(values, channels, real_dtype(call), real);
    for (int64_t j = 1; j < boxes->joined; j++) memcpy((char *)real + (size_t)j * bytes, real, bytes);
    return real;
}

static void for_boxes(void (*loop)(const Pass *, const Box *), const Pass *pass, const Boxes *boxes) {
    if (boxes->count == 1) {
        loop(pass, &boxes->box[0]);
        return;
    }
#pragma omp parallel for num_threads(boxes->count) schedule(static, 1)
    for (int i = 0; i < boxes->count; i++) loop(pass, &boxes->box[i]);
}

static void sum_boxes(void (*loop)(const Pass *, const Box *, Sums *), const Pass *pass, const Boxes *boxes, Sums *sums) {
    if (boxes->count == 1) {
        loop(pass, &boxes->box[0], &sums[0]);
        return;
    }
#pragma omp parallel for num_threads(boxes->count) schedule(static, 1)
    for (int i = 0; i < boxes->count; i++) loop(pass, &boxes->box[i], &sums[i]);
}

/* Room for the sums of all boxes, in one block; NULL without memory. */
static void *make_sums(const Call *call, const Boxes *boxes, Sums *sums) {
    size_t size = 0;
    for (int i = 0; i < boxes->count; i++) {
        size_t width = (size_t)boxes->box[i].channels;
        size += 2 * padded(width * sizeof(double)) + 3 * padded(width * real_size(call));
    }
    char *memory = aligned_alloc(64, size + 64), *next = memory;
    if (memory == NULL) return NULL;
    for (int i = 0; i < boxes->count; i++) {
        size_t width = (size_t)boxes->box[i].channels;
        size_t wide = padded(width * sizeof(double)), real = padded(width * real_size(call));
        sums[i].first = (double *)next;
        sums[i].second = (double *)(next + wide);
        sums[i].scratch = next + 2 * wide;
        sums[i].scratch_step = (int64_t)(real / real_size(call));
        next += 2 * wide + 3 * real;
    }
    return memory;
}

/* Merges the moments of a box into (mean, m2) of `n` elements per channel. */
static void merge_box(const Box *box, const Sums *sums, int64_t joined, double *n, double *mean, double *m2) {
    int64_t channels = box->channels / joined;
    for (int64_t j = 0; j < joined; j++)
        for (int64_t c = 0; c < channels; c++) {
            int64_t from = j * channels + c, to = box->first_channel + c;
            double count = sums->count + (from < box->tail), united = n[to] + count;
            if (count == 0) continue;
            if (n[to] == 0) {
                mean[to] = sums->first[from];
                m2[to] = sums->second[from];
            } else {
                double delta = sums->first[from] - mean[to], share = count / united;
                mean[to] += delta * share;
                m2[to] += sums->second[from] + delta * delta * (n[to] * share);
            }
            n[to] = united;
        }
}

bool pack_moments(const Call *call, const Pass *pass, bool raw, double *payload) {
    int64_t channels = call->geometry.channels;
    double *mean = payload + 1, *m2 = mean + channels;
    memset(payload, 0, (size_t)(2 * channels + 1) * sizeof(double));
    Boxes boxes;
    split(&call->geometry, pass->mask != NULL, call->threads, &boxes);
    if (boxes.count == 0) return true;
    Sums sums[MOST_THREADS];
    Workspace work;
    void *memory = make_sums(call, &boxes, sums);
    if (memory == NULL || !make_workspace(&work, call, &boxes)) {
        free(memory);
        return false;
    }
    double *n = work.wide[0];
    memset(n, 0, (size_t)channels * sizeof(double));
    sum_boxes(loops_of(call)->moments, pass, &boxes, sums);
    for (int i = 0; i < boxes.count; i++) merge_box(&boxes.box[i], &sums[i], boxes.joined, n, mean, m2);
    payload[0] = n[0];
    if (raw)
        for (int64_t c = 0; c < channels; c++) {
            double total = n[c] * mean[c];
            m2[c] += total * mean[c];
            mean[c] = total;
        }
    free(work.memory);
    free(memory);
    return true;
}

/* The vectors of the output: (x - mean) * scale + shift, with what rounding takes from the mean put into the shift.
 * Leaves scale in wide[0] and that remainder in wide[1]. */
static void output_vectors(Workspace *work, const Call *call, const Boxes *boxes, const Affine *affine, Pass *pass) {
    int64_t channels = call->geometry.channels;
    const double *mean = affine->stats, *invstd = mean + channels;
    double *scale = work->wide[0], *rest = work->wide[1], *shift = work->wide[2];
    read_vector(&affine->weight, channels, 1, scale);
    read_vector(&affine->bias, channels, 0, shift);
    for (int64_t c = 0; c < channels; c++) {
        scale[c] *= invstd[c];
        rest[c] = real_dtype(call) == FLOAT64 ? 0 : mean[c] - (double)(float)mean[c];
        shift[c] -= rest[c] * scale[c];
    }
    pass->mean = round_to(work->real[0], mean, call, boxes);
    pass->scale = round_to(work->real[1], scale, call, boxes);
    pass->shift = round_to(work->real[2], shift, call, boxes);
}

static bool all_finite(const double *values, int64_t count) {
    double defect = 0; /* NaN if one of them is not finite */
    for (int64_t i = 0; i < count; i++) defect += values[i] - values[i];
    return defect == 0;
}

bool normalize_shared(const Call *call, Pass *pass, const Parts *parts, const Vector *weight, const Vector *bias,
                      double eps, const Running *running, double *stats, double *m2, bool *finite) {
    int64_t channels = call->geometry.channels;
    double *mean = stats, *invstd = stats + channels;
    Boxes boxes;
    Workspace work;
    split(&call->geometry, pass->mask != NULL, call->threads, &boxes);
    if (!make_workspace(&work, call, &boxes)) return false;
    if (m2 == NULL) m2 = work.wide[3];
    double n = merge(parts, channels, mean, m2);
    stats[2 * channels] = n;
    *finite = all_finite(mean, channels) && all_finite(m2, channels);
    move_running(running, channels, n, mean, m2);
    double divisor = n < 1 ? 1 : n;
    for (int64_t c = 0; c < channels; c++) invstd[c] = 1 / sqrt(m2[c] / divisor + eps);
    if (boxes.count > 0) {
        Affine affine = {stats, *weight, *bias};
        output_vectors(&work, call, &boxes, &affine, pass);
        for_boxes(loops_of(call)->output, pass, &boxes);
    }
    free(work.memory);
    return true;
}

bool pack_gradient_sums(const Call *call, Pass *pass, const Affine *affine, double *payload) {
    int64_t channels = call->geometry.channels;
    const double *invstd = affine->stats + channels;
    double *total = payload, *dot = payload + channels;
    memset(payload, 0, (size_t)(2 * channels) * sizeof(double));
    Boxes boxes;
    split(&call->geometry, pass->mask != NULL, call->threads, &boxes);
    if (boxes.count == 0) return true;
    Sums sums[MOST_THREADS];
    Workspace work;
    void *memory = make_sums(call, &boxes, sums);
    if (memory == NULL || !make_workspace(&work, call, &boxes)) {
        free(memory);
        return false;
    }
    output_vectors(&work, call, &boxes, affine, pass);
    sum_boxes(loops_of(call)->gradient_sums, pass, &boxes, sums);
    for (int i = 0; i < boxes.count; i++) {
        int64_t width = boxes.box[i].channels / boxes.joined, first = boxes.box[i].first_channel;
        for (int64_t j = 0; j < boxes.joined; j++)
            for (int64_t c = 0; c < width; c++) {
                total[first + c] += sums[i].first[j * width + c];
                dot[first + c] += sums[i].second[j * width + c];
            }
    }
    const double *rest = work.wide[1];
    for (int64_t c = 0; c < channels; c++) dot[c] = (dot[c] - rest[c] * total[c]) * invstd[c];
    free(work.memory);
    free(memory);
    return true;
}

/* The vectors of the input gradient: (g - grad_mean) * scale - (x - mean) * slope + offset, with what rounding takes
 * from the two means put into the offset. */
static void gradient_vectors(Workspace *work, const Call *call, const Boxes *boxes, const Affine *affine,
                             const Parts *parts, Pass *pass) {
    int64_t channels = call->geometry.channels;
    const double *invstd = affine->stats + channels, *scale = work->wide[0], *rest = work->wide[1];
    double n = affine->stats[2 * channels], divisor = n < 1 ? 1 : n;
    double *grad_mean = work->wide[2], *slope = work->wide[3], *offset = work->wide[4];
    Parts dots = *parts;
    dots.rows += channels;
    add_up(parts, channels, grad_mean);
    add_up(&dots, channels, slope);
    for (int64_t c = 0; c < channels; c++) {
        grad_mean[c] /= divisor;
        slope[c] = slope[c] / divisor * invstd[c] * scale[c];
        double lost = real_dtype(call) == FLOAT64 ? 0 : grad_mean[c] - (double)(float)grad_mean[c];
        offset[c] = slope[c] * rest[c] - scale[c] * lost;
    }
    pass->grad_mean = round_to(work->real[3], grad_mean, call, boxes);
    pass->slope = round_to(work->real[4], slope, call, boxes);
    pass->offset = round_to(work->real[5], offset, call, boxes);
}

bool input_gradient(const Call *call, Pass *pass, const Affine *affine, const Parts *parts) {
    Boxes boxes;
    Workspace work;
    split(&call->geometry, pass->mask != NULL, call->threads, &boxes);
    if (boxes.count == 0) return true;
    if (!make_workspace(&work, call, &boxes)) return false;
    output_vectors(&work, call, &boxes, affine, pass);
    if (pass->y != NULL) gradient_vectors(&work, call, &boxes, affine, parts, pass);
    for_boxes(loops_of(call)->gradient, pass, &boxes);
    free(work.memory);
    return true;
}
