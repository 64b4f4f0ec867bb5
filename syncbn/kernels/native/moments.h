/* Mean and sum of squared deviations of each channel, in one read.
 *
 * Sums of d = x - pivot and d^2 are taken in REAL over a run of at most RUN elements of a channel, and go on in double:
 *
 *     total = sum d        square = sum d^2        mean = pivot + total / n        m2 = square - total^2 / n
 *
 * The pivot is the mean of what came before, so each run moves it; what was summed about the old one follows exactly
 * enough in double. Let n_a elements come before a run of n_b elements. Chan's formula for the union,
 *
 *     m2 = m2_a + m2_b + (mean_b - mean_a)^2 * n_a * n_b / (n_a + n_b),
 *
 * says that the run's squares about mean_a are at most 1 + n_b / n_a times what the run adds to m2. So whatever the
 * data, no more digits are lost than this factor has; where it would exceed GROWTH + 1 the run is read twice, while it
 * is in the cache, and its pivot is its own mean. */

#define GROWTH 3 /* of n_b / n_a */
#define COLUMN_RUN 512 /* rows; their sums are still in the cache when they are folded */

#define usable NAME(usable)
#define clear_sums NAME(clear_sums)
#define move_pivot NAME(move_pivot)
#define run_total NAME(run_total)
#define run_sums NAME(run_sums)
#define add_exactly NAME(add_exactly)
#define move_pivots NAME(move_pivots)
#define add_sums NAME(add_sums)
#define finish_moments NAME(finish_moments)
#define row_moments_of NAME(row_moments_of)
#define row_moments NAME(row_moments)
#define matrix_sums NAME(matrix_sums)
#define next_row NAME(next_row)
#define column_chunk NAME(column_chunk)
#define column_moments_of NAME(column_moments_of)
#define column_moments NAME(column_moments)

/* A pivot may be any finite number. */
INLINE REAL usable(double mean) { return isfinite((REAL)mean) ? (REAL)mean : 0; }

INLINE void clear_sums(int64_t channels, REAL *pivot, double *total, double *square) {
    for (int64_t c = 0; c < channels; c++) {
        total[c] = square[c] = 0;
        pivot[c] = 0;
    }
}

/* Moves a pivot, and with it the sums of `count` elements about it. */
INLINE void move_pivot(REAL *pivot, double *total, double *square, double count, double mean) {
    REAL moved = usable(mean);
    double by = (double)*pivot - (double)moved;
    *square += by * (2 * *total + count * by);
    *total += count * by;
    *pivot = moved;
}

INLINE REAL run_total(const ELEMENT *x, const uint8_t *mask, int64_t length) {
    vec a = {0}, b = {0};
    int64_t i = 0;
    if (mask != NULL) {
        for (; i + LANES <= length; i += LANES) a += keep(valid_lanes(mask + i, LANES), load(x + i));
        if (i < length) b += keep(valid_lanes(mask + i, length - i), load_some(x + i, length - i));
        return sum_lanes(a + b);
    }
    for (; i + 2 * LANES <= length; i += 2 * LANES) {
        a += load(x + i);
        b += load(x + i + LANES);
    }
    for (; i + LANES <= length; i += LANES) a += load(x + i);
    if (i < length) b += load_some(x + i, length - i);
    return sum_lanes(a + b);
}

INLINE void run_sums(const ELEMENT *x, const uint8_t *mask, int64_t length, REAL pivot, REAL *total, REAL *square) {
    vec p = splat(pivot), t[4] = {{0}}, q[4] = {{0}};
    int64_t i = 0;
    if (mask == NULL) {
        for (; i + 4 * LANES <= length; i += 4 * LANES) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                vec d = load(x + i + j * LANES) - p;
                t[j] += d;
                q[j] += d * d;
            }
        }
    }
    for (; i + LANES <= length; i += LANES) {
        vec d = load(x + i) - p;
        if (mask != NULL) d = keep(valid_lanes(mask + i, LANES), d);
        t[0] += d;
        q[0] += d * d;
    }
    if (i < length) {
        int64_t n = length - i;
        bits set = mask != NULL ? valid_lanes(mask + i, n) : first_lanes(n);
        vec d = keep(set, load_some(x + i, n) - p);
        t[1] += d;
        q[1] += d * d;
    }
    *total = sum_lanes((t[0] + t[1]) + (t[2] + t[3]));
    *square = sum_lanes((q[0] + q[1]) + (q[2] + q[3]));
}

/* The same in double, for squares that are too large for REAL; added. */
static __attribute__((noinline)) void add_exactly(const ELEMENT *x, int64_t step, const uint8_t *mask, int64_t length,
                                                  REAL pivot, double *total, double *square) {
    for (int64_t i = 0; i < length; i++) {
        if (mask != NULL && mask[i] == 0) continue;
        double d = to_double(x + i * step) - (double)pivot;
        *total += d;
        *square += d * d;
    }
}

/* Moves the pivots to the mean of the `count` elements that came before. */
INLINE void move_pivots(double count, int64_t channels, REAL *pivot, double *total, double *square) {
    double scale = 1 / count;
    for (int64_t c = 0; c < channels; c++)
        move_pivot(pivot + c, total + c, square + c, count, (double)pivot[c] + total[c] * scale);
}

/* Adds what was summed of each channel. Returns whether all squares were finite; else nothing is added. */
INLINE bool add_sums(int64_t channels, const REAL *more_total, const REAL *more_square, double *total, double *square) {
    int overflow = 0;
    for (int64_t c = 0; c < channels; c++) overflow |= !isfinite(more_square[c]);
    if (overflow) return false;
    for (int64_t c = 0; c < channels; c++) {
        total[c] += (double)more_total[c];
        square[c] += (double)more_square[c];
    }
    return true;
}

/* Moments in place of sums about the pivots. */
INLINE void finish_moments(double count, int64_t tail, int64_t channels, const REAL *pivot, double *total,
                           double *square) {
    for (int64_t c = 0; c < channels; c++) {
        double n = count + (c < tail), mean = total[c] / (n > 0 ? n : 1), m2 = square[c] - total[c] * mean;
        total[c] = (double)pivot[c] + mean;
        square[c] = m2 < 0 ? 0 : m2;
    }
}

INLINE void row_moments_of(const Pass *pass, const Box *box, Sums *sums, const uint8_t *mask) {
    double *total = sums->first, *square = sums->second, count = 0;
    REAL *pivot = sums->scratch, *more_total = pivot + sums->scratch_step, *more_square = more_total + sums->scratch_step;
    int64_t channels = box->channels, step = box->channel_step;
    clear_sums(channels, pivot, total, square);
    for (int64_t n = 0; n < box->samples; n++) {
        for (int64_t s = 0; s < box->positions; s += RUN) {
            const ELEMENT *x = (const ELEMENT *)pass->x + box->start + n * box->sample_step + s;
            int64_t length = box->positions - s < RUN ? box->positions - s : RUN;
            const uint8_t *m = mask == NULL ? NULL : mask + n * box->mask_step + s;
            int64_t valid = count_valid(m, length);
            if (valid == 0) continue;
            bool again = GROWTH * count < (double)valid;
            if (!again) move_pivots(count, channels, pivot, total, square);
            for (int64_t c = 0; c < channels; c++) {
                if (again) {
                    double mean = (double)run_total(x + c * step, m, length) / (double)valid;
                    move_pivot(pivot + c, total + c, square + c, count, mean);
                }
                run_sums(x + c * step, m, length, pivot[c], more_total + c, more_square + c);
            }
            if (!add_sums(channels, more_total, more_square, total, square))
                for (int64_t c = 0; c < channels; c++)
                    add_exactly(x + c * step, 1, m, length, pivot[c], total + c, square + c);
            count += (double)valid;
        }
    }
    sums->count = count;
    finish_moments(count, 0, channels, pivot, total, square);
}

static void row_moments(const Pass *pass, const Box *box, Sums *sums) {
    if (pass->mask == NULL)
        row_moments_of(pass, box, sums, NULL);
    else
        row_moments_of(pass, box, sums, pass->mask + box->mask_start);
}

/* Sums of `count` matrix rows about the pivots, added to `total` and `square`; without `square`, plain sums. */
INLINE void matrix_sums(const ELEMENT *const *x, int count, int64_t width, const REAL *pivot, REAL *total,
                        REAL *square) {
    for (int64_t c = 0; c < width; c += LANES) {
        int64_t n = width - c < LANES ? width - c : LANES;
        vec t[8], q[8];
#pragma GCC unroll 8
        for (int j = 0; j < count; j++) {
            vec d = n == LANES ? load(x[j] + c) : load_some(x[j] + c, n);
            if (square != NULL) {
                d -= load_real(pivot + c);
                q[j] = d * d;
            }
            t[j] = d;
        }
#pragma GCC unroll 4
        for (int half = count / 2; half > 0; half /= 2)
            for (int j = 0; j < half; j++) {
                t[j] += t[j + half];
                if (square != NULL) q[j] += q[j + half];
            }
        store_real(total + c, load_real(total + c) + t[0]);
        if (square != NULL) store_real(square + c, load_real(square + c) + q[0]);
    }
}

/* The next valid matrix row of a box; its number is moved behind it. */
INLINE const ELEMENT *next_row(const ELEMENT *x, const uint8_t *mask, int64_t step, int64_t *row) {
    if (mask != NULL)
        while (mask[*row] == 0) ++*row;
    return x + (*row)++ * step;
}

/* Sums of the next `count` valid rows, set; returns the number of the row behind them. */
static int64_t column_chunk(const ELEMENT *x, const uint8_t *mask, int64_t step, int64_t row, int64_t count,
                            int64_t width, const REAL *pivot, REAL *total, REAL *square) {
    const ELEMENT *rows[8];
    memset(total, 0, (size_t)width * sizeof(REAL));
    if (square != NULL) memset(square, 0, (size_t)width * sizeof(REAL));
    for (; count >= 8; count -= 8) {
        for (int j = 0; j < 8; j++) rows[j] = next_row(x, mask, step, &row);
        if (square != NULL)
            matrix_sums(rows, 8, width, pivot, total, square);
        else
            matrix_sums(rows, 8, width, pivot, total, NULL);
    }
    for (; count > 0; count--) {
        rows[0] = next_row(x, mask, step, &row);
        if (square != NULL)
            matrix_sums(rows, 1, width, pivot, total, square);
        else
            matrix_sums(rows, 1, width, pivot, total, NULL);
    }
    return row;
}

/* Moments of `count` valid rows. */
INLINE void column_moments_of(const ELEMENT *x, const uint8_t *mask, int64_t step, int64_t count, int64_t width,
                              Sums *sums) {
    double *total = sums->first, *square = sums->second;
    REAL *pivot = sums->scratch, *more_total = pivot + sums->scratch_step, *more_square = more_total + sums->scratch_step;
    int64_t row = 0;
    for (int64_t done = 0; done < count;) {
        int64_t chunk = done == 0 ? 8 : GROWTH * done;
        if (chunk > COLUMN_RUN) chunk = COLUMN_RUN;
        if (chunk > count - done) chunk = count - done;
        if (done == 0) {
            column_chunk(x, mask, step, row, chunk, width, pivot, more_total, NULL);
            for (int64_t c = 0; c < width; c++) pivot[c] = usable((double)more_total[c] / (double)chunk);
        } else {
            move_pivots((double)done, width, pivot, total, square);
        }
        int64_t end = column_chunk(x, mask, step, row, chunk, width, pivot, more_total, more_square);
        if (!add_sums(width, more_total, more_square, total, square))
            for (int64_t c = 0; c < width; c++)
                add_exactly(x + row * step + c, step, mask == NULL ? NULL : mask + row, end - row, pivot[c], total + c,
                            square + c);
        row = end;
        done += chunk;
    }
}

static void column_moments(const Pass *pass, const Box *box, Sums *sums) {
    const ELEMENT *x = (const ELEMENT *)pass->x + box->start;
    const uint8_t *mask = pass->mask == NULL ? NULL : pass->mask + box->mask_start;
    int64_t count = count_valid(mask, box->samples);
    double *total = sums->first, *square = sums->second;
    REAL *pivot = sums->scratch;
    clear_sums(box->channels, pivot, total, square);
    if (mask == NULL)
        column_moments_of(x, NULL, box->sample_step, count, box->channels, sums);
    else
        column_moments_of(x, mask, box->sample_step, count, box->channels, sums);
    sums->count = (double)count;
    for (int64_t c = 0; c < box->tail; c++) /* one more row, of joined ones */
        add_exactly(x + count * box->sample_step + c, 1, NULL, 1, pivot[c], total + c, square + c);
    finish_moments((double)count, box->tail, box->channels, pivot, total, square);
}
