/* Everything per channel behind the exchange, in double and in a fixed order: equal bits on all ranks, whatever their
 * processors. (Contraction to fused operations is off for all files.) */
#include <math.h>
#include <string.h>

#include "native.h"

static double at_least_one(double n) { return n < 1 ? 1 : n; }

/* The sum of the parts, in rank order. */
void add_up(const Parts *parts, int64_t width, double *sums) {
    memcpy(sums, parts->rows, (size_t)width * sizeof(double));
    for (int64_t rank = 1; rank < parts->count; rank++) {
        const double *part = parts->rows + rank * parts->step;
        for (int64_t i = 0; i < width; i++) sums[i] += part[i];
    }
}

static double sum_first(const Parts *parts) {
    double n = 0;
    for (int64_t rank = 0; rank < parts->count; rank++) n += parts->rows[rank * parts->step];
    return n;
}

/* From sums of x and x^2: m2 = Q - S * mean, not below zero where rounding would take it there; NaN stays. */
static double merge_raw(const Parts *parts, int64_t channels, double *mean, double *m2) {
    double n = sum_first(parts), divisor = at_least_one(n);
    Parts rest = *parts;
    rest.rows++;
    add_up(&rest, channels, mean);
    rest.rows += channels;
    add_up(&rest, channels, m2);
    for (int64_t c = 0; c < channels; c++) {
        double total = mean[c];
        mean[c] = total / divisor;
        double left = m2[c] - mean[c] * total;
        m2[c] = left < 0 ? 0 : left;
    }
    return n;
}

/* Count, mean and sum of squared deviations of the union of all ranks' batches; see syncbn/memory.py. */
double merge(const Parts *parts, int64_t channels, double *mean, double *m2) {
    if (parts->raw) return merge_raw(parts, channels, mean, m2);
    const double *part = parts->rows;
    double n = part[0];
    memcpy(mean, part + 1, (size_t)channels * sizeof(double));
    memcpy(m2, part + 1 + channels, (size_t)channels * sizeof(double));
    for (int64_t rank = 1; rank < parts->count; rank++) {
        part += parts->step;
        const double *other_mean = part + 1, *other_m2 = other_mean + channels;
        double united = n + part[0], share = part[0] / at_least_one(united), factor = n * share;
        for (int64_t c = 0; c < channels; c++) {
            double delta = other_mean[c] - mean[c];
            mean[c] = mean[c] + delta * share;
            m2[c] = (m2[c] + other_m2[c]) + delta * delta * factor;
        }
        n = united;
    }
    return n;
}

static double value_at(const void *vector, int64_t dtype, int64_t i) {
    return dtype == FLOAT64 ? ((const double *)vector)[i] : (double)((const float *)vector)[i];
}

static void put(void *vector, int64_t dtype, int64_t i, double value) {
    if (dtype == FLOAT64)
        ((double *)vector)[i] = value;
    else
        ((float *)vector)[i] = (float)value;
}

static bool fits(double value, int64_t dtype) { return dtype == FLOAT64 ? isfinite(value) : isfinite((float)value); }

/* From `from` towards `to`; from whichever is nearer, so that with a momentum of one the result is `to` itself. */
static double moved(double from, double to, double momentum) {
    return momentum < 0.5 ? from + momentum * (to - from) : to - (to - from) * (1 - momentum);
}

/* Counts a batch, and moves the statistics towards it; see `update_running_stats` in syncbn/memory.py. */
void move_running(const Running *running, int64_t channels, double n, const double *mean, const double *m2) {
    if (!(n > 0)) return;
    double momentum = running->momentum;
    if (running->batches != NULL) ++*running->batches;
    if (isnan(momentum))
        momentum = running->batches == NULL ? 0 : *running->batches < 1 ? 1 : 1 / (double)*running->batches;
    if (running->mean == NULL || running->var == NULL) return;
    double divisor = at_least_one(n - 1);
    for (int64_t c = 0; c < channels; c++) {
        double var = m2[c] / divisor;
        if (!fits(mean[c], running->mean_dtype) || !fits(var, running->var_dtype)) continue;
        double old_mean = value_at(running->mean, running->mean_dtype, c);
        double old_var = value_at(running->var, running->var_dtype, c);
        put(running->mean, running->mean_dtype, c, moved(old_mean, mean[c], momentum));
        put(running->var, running->var_dtype, c, moved(old_var, var, momentum));
    }
}

void read_vector(const Vector *vector, int64_t channels, double otherwise, double *values) {
    for (int64_t c = 0; c < channels; c++)
        values[c] = vector->data == NULL ? otherwise : value_at(vector->data, vector->dtype, c);
}

void write_vector(const double *values, int64_t channels, int64_t dtype, void *to) {
    for (int64_t c = 0; c < channels; c++) put(to, dtype, c, values[c]);
}
