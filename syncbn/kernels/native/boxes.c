/* How a tensor is divided among threads: by its geometry and their number alone, so results repeat. */
#include "native.h"

/* Rows of columns are joined to about this many values, and to whole vectors: longer loops. */
#define JOINED_WIDTH 128
#define LINE 16 /* elements: boxes begin at multiples, as far as they can */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* How many rows of columns to join; at least four rows are left. */
static int64_t joined_rows(int64_t rows, int64_t channels) {
    if (channels == 0 || channels >= 2 * JOINED_WIDTH || (channels % LINE == 0 && channels >= JOINED_WIDTH / 2)) return 1;
    int64_t joined = 1;
    while (joined * channels % LINE != 0 || joined * channels < JOINED_WIDTH) joined *= 2;
    while (joined > 1 && rows / joined < 4) joined /= 2;
    return joined;
}

/* Cuts `length` into at most `parts` of equal size, up to rounding to a multiple of `unit`. */
static int64_t piece(int64_t length, int64_t parts, int64_t unit) {
    int64_t size = (length + parts - 1) / parts;
    return (size + unit - 1) / unit * unit;
}

static void split_columns(const Geometry *g, bool masked, int threads, Boxes *boxes) {
    int64_t rows = g->samples * g->positions;
    int64_t joined = boxes->joined = masked ? 1 : joined_rows(rows, g->channels);
    int64_t width = joined * g->channels, whole = rows / joined;
    Box all = {.samples = whole, .channels = width, .positions = 1, .sample_step = width, .channel_step = 1, .mask_step = 1};
    boxes->by_channel = whole < 4 * threads && joined == 1 && width >= 2 * LINE * threads;
    if (boxes->by_channel) {
        int64_t size = piece(width, threads, LINE);
        for (int64_t c = 0; c < width; c += size) {
            Box *box = &boxes->box[boxes->count++];
            *box = all;
            box->channels = least(size, width - c);
            box->first_channel = box->start = c;
        }
        return;
    }
    int64_t size = whole < 4 * threads ? whole : piece(whole, threads, 1);
    for (int64_t row = 0; row < whole; row += size) {
        Box *box = &boxes->box[boxes->count++];
        *box = all;
        box->samples = least(size, whole - row);
        box->start = row * width;
        box->mask_start = row;
    }
    boxes->box[boxes->count - 1].tail = rows % joined * g->channels;
}

static void split_rows(const Geometry *g, int threads, Boxes *boxes) {
    int64_t samples = g->samples, channels = g->channels, positions = g->positions;
    Box all = {.samples = samples, .channels = channels, .positions = positions, .sample_step = channels * positions,
               .channel_step = positions, .mask_step = positions};
    boxes->joined = 1;
    boxes->by_channel = channels >= 4 * threads;
    bool by_sample = !boxes->by_channel && samples >= threads;
    bool by_position = !boxes->by_channel && !by_sample && positions >= 4 * LINE * threads;
    int64_t length = boxes->by_channel ? channels : by_sample ? samples : positions;
    int64_t size = boxes->by_channel || by_sample ? piece(length, threads, 1)
                   : by_position                  ? piece(length, threads, LINE)
                                                  : length;
    for (int64_t i = 0; i < length; i += size) {
        Box *box = &boxes->box[boxes->count++];
        int64_t part = least(size, length - i);
        *box = all;
        if (boxes->by_channel) {
            box->channels = part;
            box->first_channel = i;
            box->start = i * positions;
        } else if (by_sample) {
            box->samples = part;
            box->start = i * all.sample_step;
            box->mask_start = i * positions;
        } else {
            box->positions = part;
            box->start = box->mask_start = i;
        }
    }
}

void split(const Geometry *g, bool masked, int threads, Boxes *boxes) {
    boxes->count = 0;
    boxes->joined = 1;
    boxes->by_channel = false;
    if (g->samples == 0 || g->channels == 0 || g->positions == 0) return;
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    if (g->columns)
        split_columns(g, masked, threads, boxes);
    else
        split_rows(g, threads, boxes);
}
