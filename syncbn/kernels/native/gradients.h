/* The two passes of the backward. With d = x - mean, and g the output's gradient, zero where the rectifier is shut,
 *
 *     sums:   sum g        sum g * d
 *     input:  scale * (g - grad_mean) - slope * d + offset        at padded positions  scale * g
 *
 * Sums run in REAL over at most RUN elements, and in double over runs. */

#define behind_relu NAME(behind_relu)
#define sums_step NAME(sums_step)
#define sums_row NAME(sums_row)
#define row_sums NAME(row_sums)
#define row_sums_of NAME(row_sums_of)
#define sums_matrix NAME(sums_matrix)
#define column_sums NAME(column_sums)
#define column_sums_of NAME(column_sums_of)
#define fold_sums NAME(fold_sums)
#define gradient_step NAME(gradient_step)
#define Vectors NAME(Vectors)
#define vectors_at NAME(vectors_at)
#define vectors_of NAME(vectors_of)
#define row_gradient NAME(row_gradient)
#define row_gradient_of NAME(row_gradient_of)
#define gradient_matrix NAME(gradient_matrix)
#define column_gradient NAME(column_gradient)
#define column_gradient_of NAME(column_gradient_of)
#define operand NAME(operand)

/* Per-channel values of the channels in a vector. */
typedef struct {
    vec mean, scale, shift, grad_mean, slope, offset;
} Vectors;

/* The values of one channel, in all lanes. */
INLINE Vectors vectors_of(const Pass *pass, int64_t channel, bool relu, bool input) {
    Vectors v;
    v.mean = splat(((const REAL *)pass->mean)[channel]);
    if (relu || input) v.scale = splat(((const REAL *)pass->scale)[channel]);
    if (relu) v.shift = splat(((const REAL *)pass->shift)[channel]);
    if (input) {
        v.grad_mean = splat(((const REAL *)pass->grad_mean)[channel]);
        v.slope = splat(((const REAL *)pass->slope)[channel]);
        v.offset = splat(((const REAL *)pass->offset)[channel]);
    }
    return v;
}

/* The values of the channels from `channel` on. */
INLINE Vectors vectors_at(const Pass *pass, int64_t channel, bool relu, bool input) {
    Vectors v;
    v.mean = load_real((const REAL *)pass->mean + channel);
    if (relu || input) v.scale = load_real((const REAL *)pass->scale + channel);
    if (relu) v.shift = load_real((const REAL *)pass->shift + channel);
    if (input) {
        v.grad_mean = load_real((const REAL *)pass->grad_mean + channel);
        v.slope = load_real((const REAL *)pass->slope + channel);
        v.offset = load_real((const REAL *)pass->offset + channel);
    }
    return v;
}

INLINE vec behind_relu(vec g, vec x, const Vectors *v, const ELEMENT *residual, int64_t n, REAL limit) {
    return keep(~(preactivation(x, v->mean, v->scale, v->shift, residual, n) <= limit), g);
}

INLINE const ELEMENT *operand(const void *tensor, int64_t at) {
    return tensor == NULL ? NULL : (const ELEMENT *)tensor + at;
}

/* (g, g * d) of n elements. */
INLINE void sums_step(const Pass *pass, int64_t at, int64_t n, const bits *valid, const Vectors *v, bool relu,
                      bool residual, vec *total, vec *dot) {
    vec x = load_n(operand(pass->x, at), n), g = load_n(operand(pass->grad, at), n);
    if (valid != NULL) x = clean(x, *valid);
    if (relu) g = behind_relu(g, x, v, residual ? operand(pass->residual, at) : NULL, n, (REAL)pass->limit);
    *total = g;
    *dot = g * (x - v->mean);
}

/* A run of one channel: at most RUN positions. */
INLINE void sums_row(const Pass *pass, int64_t at, const uint8_t *mask, int64_t length, const Vectors *v, bool relu,
                     bool residual, double *total, double *dot) {
    vec t[4] = {{0}}, q[4] = {{0}}, g, p;
    int64_t i = 0;
    if (mask == NULL) {
        for (; i + 4 * LANES <= length; i += 4 * LANES) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                sums_step(pass, at + i + j * LANES, LANES, NULL, v, relu, residual, &g, &p);
                t[j] += g;
                q[j] += p;
            }
        }
    }
    for (; i + LANES <= length; i += LANES) {
        bits valid;
        if (mask != NULL) valid = valid_lanes(mask + i, LANES);
        sums_step(pass, at + i, LANES, mask == NULL ? NULL : &valid, v, relu, residual, &g, &p);
        t[0] += g;
        q[0] += p;
    }
    if (i < length) {
        int64_t n = length - i;
        bits valid;
        if (mask != NULL) valid = valid_lanes(mask + i, n);
        sums_step(pass, at + i, n, mask == NULL ? NULL : &valid, v, relu, residual, &g, &p);
        t[1] += keep(first_lanes(n), g);
        q[1] += keep(first_lanes(n), p);
    }
    *total += (double)sum_lanes((t[0] + t[1]) + (t[2] + t[3]));
    *dot += (double)sum_lanes((q[0] + q[1]) + (q[2] + q[3]));
}

INLINE void row_sums_of(const Pass *pass, const Box *box, Sums *sums, bool relu, bool residual, bool masked) {
    for (int64_t c = 0; c < box->channels; c++) sums->first[c] = sums->second[c] = 0;
    for (int64_t n = 0; n < box->samples; n++) {
        const uint8_t *mask = masked ? pass->mask + box->mask_start + n * box->mask_step : NULL;
        for (int64_t c = 0; c < box->channels; c++) {
            Vectors v = vectors_of(pass, box->first_channel + c, relu, false);
            int64_t at = box->start + n * box->sample_step + c * box->channel_step;
            for (int64_t s = 0; s < box->positions; s += RUN) {
                int64_t length = box->positions - s < RUN ? box->positions - s : RUN;
                sums_row(pass, at + s, masked ? mask + s : NULL, length, &v, relu, residual, sums->first + c,
                         sums->second + c);
            }
        }
    }
}

static void row_sums(const Pass *pass, const Box *box, Sums *sums) {
    if (pass->mask != NULL)
        row_sums_of(pass, box, sums, pass->relu, pass->residual != NULL, true);
    else if (!pass->relu)
        row_sums_of(pass, box, sums, false, false, false);
    else if (pass->residual == NULL)
        row_sums_of(pass, box, sums, true, false, false);
    else
        row_sums_of(pass, box, sums, true, true, false);
}

/* Sums of `count` matrix rows from element `at` on, added to `total` and `dot`. */
INLINE void sums_matrix(const Pass *pass, const Box *box, int64_t at, int count, int64_t width, const bits *valid,
                        bool relu, bool residual, REAL *total, REAL *dot) {
    for (int64_t c = 0; c < width; c += LANES) {
        int64_t n = width - c < LANES ? width - c : LANES;
        Vectors v = vectors_at(pass, box->first_channel + c, relu, false);
        vec t[4], q[4];
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) {
            int64_t i = at + j * box->sample_step + c;
            if (n == LANES)
                sums_step(pass, i, LANES, valid, &v, relu, residual, &t[j], &q[j]);
            else
                sums_step(pass, i, n, valid, &v, relu, residual, &t[j], &q[j]);
        }
#pragma GCC unroll 4
        for (int half = count / 2; half > 0; half /= 2)
            for (int j = 0; j < half; j++) {
                t[j] += t[j + half];
                q[j] += q[j + half];
            }
        store_real(total + c, load_real(total + c) + t[0]);
        store_real(dot + c, load_real(dot + c) + q[0]);
    }
}

INLINE void fold_sums(int64_t width, REAL *total, REAL *dot, double *wide_total, double *wide_dot) {
    for (int64_t c = 0; c < width; c++) {
        wide_total[c] += (double)total[c];
        wide_dot[c] += (double)dot[c];
        total[c] = dot[c] = 0;
    }
}

INLINE void column_sums_of(const Pass *pass, const Box *box, Sums *sums, bool relu, bool residual, bool masked) {
    REAL *total = sums->scratch, *dot = total + sums->scratch_step;
    int64_t width = box->channels, row = 0;
    for (int64_t c = 0; c < width; c++) {
        sums->first[c] = sums->second[c] = 0;
        total[c] = dot[c] = 0;
    }
    while (row < box->samples) {
        int64_t end = box->samples - row < COLUMN_RUN ? box->samples : row + COLUMN_RUN;
        for (; !masked && row + 4 <= end; row += 4)
            sums_matrix(pass, box, box->start + row * box->sample_step, 4, width, NULL, relu, residual, total, dot);
        for (; row < end; row++) {
            bits valid;
            if (masked) valid = (bits){0} - (BITS)(pass->mask[box->mask_start + row] != 0);
            sums_matrix(pass, box, box->start + row * box->sample_step, 1, width, masked ? &valid : NULL, relu,
                        residual, total, dot);
        }
        fold_sums(width, total, dot, sums->first, sums->second);
    }
    if (box->tail > 0) {
        sums_matrix(pass, box, box->start + row * box->sample_step, 1, box->tail, NULL, relu, residual, total, dot);
        fold_sums(box->tail, total, dot, sums->first, sums->second);
    }
}

static void column_sums(const Pass *pass, const Box *box, Sums *sums) {
    if (pass->mask != NULL)
        column_sums_of(pass, box, sums, pass->relu, pass->residual != NULL, true);
    else if (!pass->relu)
        column_sums_of(pass, box, sums, false, false, false);
    else if (pass->residual == NULL)
        column_sums_of(pass, box, sums, true, false, false);
    else
        column_sums_of(pass, box, sums, true, true, false);
}

/* n elements of the input gradient, and of g. */
INLINE void gradient_step(const Pass *pass, int64_t at, int64_t n, const bits *valid, const Vectors *v, bool relu,
                          bool residual, bool input) {
    vec given = load_n(operand(pass->x, at), n), g = load_n(operand(pass->grad, at), n);
    vec x = valid == NULL ? given : clean(given, *valid);
    if (relu) {
        g = behind_relu(g, x, v, residual ? operand(pass->residual, at) : NULL, n, (REAL)pass->limit);
        if (pass->g != NULL) store_n((ELEMENT *)pass->g + at, g, n);
    }
    if (!input) return;
    vec dx = (g - v->grad_mean) * v->scale - (x - v->mean) * v->slope + v->offset;
    if (valid != NULL) dx = keep(*valid | (given - given == 0), choose(*valid, dx, g * v->scale));
    store_n((ELEMENT *)pass->y + at, dx, n);
}

INLINE void row_gradient_of(const Pass *pass, const Box *box, bool relu, bool residual, bool masked, bool input) {
    for (int64_t n = box->samples - 1; n >= 0; n--) { /* backwards, as `row_output_of` */
        const uint8_t *mask = masked ? pass->mask + box->mask_start + n * box->mask_step : NULL;
        for (int64_t c = box->channels - 1; c >= 0; c--) {
            Vectors v = vectors_of(pass, box->first_channel + c, relu, input);
            int64_t at = box->start + n * box->sample_step + c * box->channel_step, i = 0;
            bits valid;
            for (; i + LANES <= box->positions; i += LANES) {
                if (masked) valid = valid_lanes(mask + i, LANES);
                gradient_step(pass, at + i, LANES, masked ? &valid : NULL, &v, relu, residual, input);
            }
            if (i == box->positions) continue;
            int64_t rest = box->positions - i;
            if (masked) valid = valid_lanes(mask + i, rest);
            gradient_step(pass, at + i, rest, masked ? &valid : NULL, &v, relu, residual, input);
        }
    }
}

static void row_gradient(const Pass *pass, const Box *box) {
    bool residual = pass->residual != NULL;
    if (pass->mask != NULL || pass->y == NULL)
        if (pass->mask != NULL)
            row_gradient_of(pass, box, pass->relu, residual, true, pass->y != NULL);
        else
            row_gradient_of(pass, box, true, residual, false, false);
    else if (!pass->relu)
        row_gradient_of(pass, box, false, false, false, true);
    else if (!residual)
        row_gradient_of(pass, box, true, false, false, true);
    else
        row_gradient_of(pass, box, true, true, false, true);
}

INLINE void gradient_matrix(const Pass *pass, const Box *box, int64_t at, int count, int64_t width, const bits *valid,
                            bool relu, bool residual, bool input) {
    for (int64_t c = 0; c < width; c += LANES) {
        int64_t n = width - c < LANES ? width - c : LANES;
        Vectors v = vectors_at(pass, box->first_channel + c, relu, input);
        for (int j = 0; j < count; j++) {
            int64_t i = at + j * box->sample_step + c;
            if (n == LANES)
                gradient_step(pass, i, LANES, valid, &v, relu, residual, input);
            else
                gradient_step(pass, i, n, valid, &v, relu, residual, input);
        }
    }
}

INLINE void column_gradient_of(const Pass *pass, const Box *box, bool relu, bool residual, bool masked, bool input) {
    int64_t step = box->sample_step, row = box->samples, width = box->channels;
    if (box->tail > 0)
        gradient_matrix(pass, box, box->start + row * step, 1, box->tail, NULL, relu, residual, input);
    for (; !masked && row >= 4; row -= 4)
        gradient_matrix(pass, box, box->start + (row - 4) * step, 4, width, NULL, relu, residual, input);
    for (row--; row >= 0; row--) {
        bits valid;
        if (masked) valid = (bits){0} - (BITS)(pass->mask[box->mask_start + row] != 0);
        gradient_matrix(pass, box, box->start + row * step, 1, width, masked ? &valid : NULL, relu, residual, input);
    }
}

static void column_gradient(const Pass *pass, const Box *box) {
    bool residual = pass->residual != NULL;
    if (pass->mask != NULL)
        column_gradient_of(pass, box, pass->relu, residual, true, pass->y != NULL);
    else if (pass->y == NULL)
        column_gradient_of(pass, box, true, residual, false, false);
    else if (!pass->relu)
        column_gradient_of(pass, box, false, false, false, true);
    else if (!residual)
        column_gradient_of(pass, box, true, false, false, true);
    else
        column_gradient_of(pass, box, true, true, false, true);
}
