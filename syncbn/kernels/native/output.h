/* y = act((x - mean) * scale + shift + residual), element by element.
 *
 * The gradient asks for the sign of this output again: both take it from `preactivation`, whose operations are rounded
 * one by one (no contraction), so both see the same bits, with any vector width. */

#define preactivation NAME(preactivation)
#define output_step NAME(output_step)
#define output_row NAME(output_row)
#define output_matrix NAME(output_matrix)
#define row_output NAME(row_output)
#define row_output_of NAME(row_output_of)
#define column_output NAME(column_output)
#define column_output_of NAME(column_output_of)

INLINE vec preactivation(vec x, vec mean, vec scale, vec shift, const ELEMENT *residual, int64_t n) {
    vec y = (x - mean) * scale + shift;
    return residual == NULL ? y : y + load_n(residual, n);
}

/* n elements, whose per-channel values are in vectors; `valid` is NULL where all are. */
INLINE void output_step(ELEMENT *y, const ELEMENT *x, const ELEMENT *residual, const bits *valid, int64_t n, vec mean,
                        vec scale, vec shift, bool relu) {
    vec v = load_n(x, n);
    if (valid != NULL) v = clean(v, *valid);
    v = preactivation(v, mean, scale, shift, residual, n);
    if (relu) v = keep(~(v <= 0), v);
    store_n(y, v, n);
}

/* The positions of one sample and channel. */
INLINE void output_row(ELEMENT *y, const ELEMENT *x, const ELEMENT *residual, const uint8_t *mask, int64_t length,
                       REAL mean, REAL scale, REAL shift, bool relu) {
    vec m = splat(mean), a = splat(scale), b = splat(shift);
    int64_t i = 0;
    for (; i < length; i += LANES) {
        int64_t n = length - i < LANES ? length - i : LANES;
        bits valid;
        if (mask != NULL) valid = valid_lanes(mask + i, n);
        const ELEMENT *r = residual == NULL ? NULL : residual + i;
        if (n == LANES)
            output_step(y + i, x + i, r, mask == NULL ? NULL : &valid, LANES, m, a, b, relu);
        else
            output_step(y + i, x + i, r, mask == NULL ? NULL : &valid, n, m, a, b, relu);
    }
}

INLINE void row_output_of(const Pass *pass, const Box *box, const ELEMENT *residual, const uint8_t *mask, bool relu) {
    const REAL *mean = (const REAL *)pass->mean + box->first_channel;
    const REAL *scale = (const REAL *)pass->scale + box->first_channel;
    const REAL *shift = (const REAL *)pass->shift + box->first_channel;
    /* Backwards: the end of x was read last, and is in the cache. */
    for (int64_t n = box->samples - 1; n >= 0; n--) {
        const uint8_t *m = mask == NULL ? NULL : mask + box->mask_start + n * box->mask_step;
        for (int64_t c = box->channels - 1; c >= 0; c--) {
            int64_t at = box->start + n * box->sample_step + c * box->channel_step;
            output_row((ELEMENT *)pass->y + at, (const ELEMENT *)pass->x + at, residual == NULL ? NULL : residual + at, m,
                       box->positions, mean[c], scale[c], shift[c], relu);
        }
    }
}

static void row_output(const Pass *pass, const Box *box) {
    const ELEMENT *residual = pass->residual;
    if (pass->mask != NULL)
        row_output_of(pass, box, residual, pass->mask, pass->relu);
    else if (residual == NULL && !pass->relu)
        row_output_of(pass, box, NULL, NULL, false);
    else if (residual == NULL)
        row_output_of(pass, box, NULL, NULL, true);
    else if (!pass->relu)
        row_output_of(pass, box, residual, NULL, false);
    else
        row_output_of(pass, box, residual, NULL, true);
}

/* `count` matrix rows from element `at` on. */
INLINE void output_matrix(const Pass *pass, const Box *box, const ELEMENT *residual, const bits *valid, bool relu,
                          int64_t at, int64_t count, int64_t width) {
    const REAL *mean = (const REAL *)pass->mean + box->first_channel;
    const REAL *scale = (const REAL *)pass->scale + box->first_channel;
    const REAL *shift = (const REAL *)pass->shift + box->first_channel;
    const ELEMENT *x = (const ELEMENT *)pass->x + at;
    ELEMENT *y = (ELEMENT *)pass->y + at;
    for (int64_t c = 0; c < width; c += LANES) {
        int64_t n = width - c < LANES ? width - c : LANES;
        vec m = load_real(mean + c), a = load_real(scale + c), b = load_real(shift + c);
        for (int64_t j = 0; j < count; j++) {
            int64_t i = j * box->sample_step + c;
            const ELEMENT *r = residual == NULL ? NULL : residual + at + i;
            if (n == LANES)
                output_step(y + i, x + i, r, valid, LANES, m, a, b, relu);
            else
                output_step(y + i, x + i, r, valid, n, m, a, b, relu);
        }
    }
}

INLINE void column_output_of(const Pass *pass, const Box *box, const ELEMENT *residual, const uint8_t *mask, bool relu) {
    int64_t step = box->sample_step, row = box->samples;
    if (box->tail > 0) output_matrix(pass, box, residual, NULL, relu, box->start + row * step, 1, box->tail);
    if (mask != NULL) {
        for (row--; row >= 0; row--) {
            bits valid = (bits){0} - (BITS)(mask[box->mask_start + row] != 0);
            output_matrix(pass, box, residual, &valid, relu, box->start + row * step, 1, box->channels);
        }
        return;
    }
    for (; row >= 4; row -= 4)
        output_matrix(pass, box, residual, NULL, relu, box->start + (row - 4) * step, 4, box->channels);
    for (row--; row >= 0; row--)
        output_matrix(pass, box, residual, NULL, relu, box->start + row * step, 1, box->channels);
}

static void column_output(const Pass *pass, const Box *box) {
    const ELEMENT *residual = pass->residual;
    if (pass->mask != NULL)
        column_output_of(pass, box, residual, pass->mask, pass->relu);
    else if (residual == NULL && !pass->relu)
        column_output_of(pass, box, NULL, NULL, false);
    else if (residual == NULL)
        column_output_of(pass, box, NULL, NULL, true);
    else if (!pass->relu)
        column_output_of(pass, box, residual, NULL, false);
    else
        column_output_of(pass, box, residual, NULL, true);
}
