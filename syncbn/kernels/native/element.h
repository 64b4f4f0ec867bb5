/* One data type: ELEMENT in memory, REAL in arithmetic, LANES of them in a vector. Included once per data type, with
 * DTYPE and WIDTH (bytes of a vector register) defined; every name gets the data type's suffix. */
#undef SUFFIX
#undef ELEMENT
#undef REAL
#undef BITS
#undef LANES
#if DTYPE == FLOAT64
#define SUFFIX _float64
#define ELEMENT double
#define REAL double
#define BITS int64_t
#define LANES (WIDTH / 8)
#elif DTYPE == FLOAT32
#define SUFFIX _float32
#define ELEMENT float
#define REAL float
#define BITS int32_t
#define LANES (WIDTH / 4)
#else
#if DTYPE == BFLOAT16
#define SUFFIX _bfloat16
#else
#define SUFFIX _float16
#endif
#define ELEMENT uint16_t
#define REAL float
#define BITS int32_t
#define LANES (WIDTH / 4)
#endif

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, SUFFIX)
#define INLINE static inline __attribute__((always_inline))

#define vec NAME(vec)
#define bits NAME(bits)
#define loose NAME(loose)
#define halves NAME(halves)
#define bytes NAME(bytes)
#define lanes NAME(lanes)
#define splat NAME(splat)
#define words NAME(words)
#define widen NAME(widen)
#define narrow NAME(narrow)
#define load NAME(load)
#define load_some NAME(load_some)
#define load_n NAME(load_n)
#define store NAME(store)
#define store_some NAME(store_some)
#define store_n NAME(store_n)
#define keep NAME(keep)
#define choose NAME(choose)
#define first_lanes NAME(first_lanes)
#define valid_lanes NAME(valid_lanes)
#define clean NAME(clean)
#define sum_lanes NAME(sum_lanes)
#define load_real NAME(load_real)
#define store_real NAME(store_real)
#define to_double NAME(to_double)

typedef REAL vec __attribute__((vector_size(WIDTH)));
typedef BITS bits __attribute__((vector_size(WIDTH)));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef REAL loose __attribute__((vector_size(WIDTH), aligned(sizeof(REAL)), may_alias)); /* anywhere in memory */

INLINE vec splat(REAL value) { return value - (vec){0}; }

INLINE bits lanes(void) {
    bits numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

INLINE bits first_lanes(int64_t n) { return lanes() < (BITS)n; }

/* v where the lane is set, else zero. */
INLINE vec keep(bits set, vec v) { return (vec)((bits)v & set); }

INLINE vec choose(bits set, vec a, vec b) { return (vec)(((bits)a & set) | ((bits)b & ~set)); }

INLINE vec load_real(const REAL *p) { return *(const loose *)p; }

INLINE void store_real(REAL *p, vec v) { *(loose *)p = v; }

#if DTYPE == FLOAT32 || DTYPE == FLOAT64

INLINE vec load(const ELEMENT *p) { return load_real(p); }

INLINE void store(ELEMENT *p, vec v) { store_real(p, v); }

#else

typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(WIDTH)));

INLINE words widen(const ELEMENT *p) {
#if defined(__AVX512F__) && WIDTH == 64
    return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__) && WIDTH == 32
    return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    return __builtin_convertvector(*(const halves *)p, words);
#endif
}

INLINE void narrow(ELEMENT *p, words w) {
#if defined(__AVX512F__) && WIDTH == 64
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)w));
#else
    *(halves *)p = __builtin_convertvector(w, halves);
#endif
}

#if DTYPE == BFLOAT16

INLINE vec load(const ELEMENT *p) { return (vec)(widen(p) << 16); }

/* Rounds to the nearest, halves to even. */
INLINE void store(ELEMENT *p, vec v) {
    words u = (words)v;
    words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    rounded = (words)choose(v != v, (vec)((words){0} + 0x7fc0), (vec)rounded);
    narrow(p, rounded);
}

#elif defined(__F16C__) && WIDTH == 32

INLINE vec load(const ELEMENT *p) { return (vec)_mm256_cvtph_ps((__m128i)*(const halves *)p); }

INLINE void store(ELEMENT *p, vec v) { *(halves *)p = (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }

#elif defined(__AVX512F__) && WIDTH == 64

INLINE vec load(const ELEMENT *p) { return (vec)_mm512_cvtph_ps((__m256i)*(const halves *)p); }

INLINE void store(ELEMENT *p, vec v) { *(halves *)p = (halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }

#else

INLINE vec load(const ELEMENT *p) {
    words h = widen(p), a = h & 0x7fff;
    words wide = (a << 13) + ((words){0} + (112u << 23)); /* exponents have other biases */
    wide += (words)(a >= 0x7c00) & (112u << 23);          /* infinity and NaN keep the largest exponent */
    vec small = __builtin_convertvector((bits)a, vec) * 0x1p-24f;
    return (vec)((words)choose((bits)(a < 0x400), small, (vec)wide) | ((h & 0x8000) << 16));
}

/* Rounds to the nearest, halves to even. */
INLINE void store(ELEMENT *p, vec v) {
    words u = (words)v, a = u & 0x7fffffff;
    words normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
    words small = (words)((vec)a + 0.5f) - 0x3f000000; /* the last place of one half is that of the subnormals */
    words h = (words)choose((bits)(a < 0x38800000), (vec)small, (vec)normal);
    words large = 0x7c00 + ((words)(a > 0x7f800000) & 0x200);
    h = (words)choose((bits)(a >= 0x47800000), (vec)large, (vec)h);
    narrow(p, h | ((u >> 16) & 0x8000));
}

#endif
#endif

/* Masked loads and stores, where there are any. AddressSanitizer does not look into them. */
#undef MASKED
#ifdef __SANITIZE_ADDRESS__
#define MASKED 0
#elif defined(__AVX512F__) && WIDTH == 64
#define MASKED 512
#elif defined(__AVX2__) && WIDTH == 32
#define MASKED 256
#else
#define MASKED 0
#endif

/* The first elements at p, 0 < n < LANES of them, then zeros. */
INLINE vec load_some(const ELEMENT *p, int64_t n) {
#if MASKED == 512 && DTYPE == FLOAT32
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif MASKED == 512 && DTYPE == FLOAT64
    return (vec)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif MASKED == 256 && DTYPE == FLOAT32
    return (vec)_mm256_maskload_ps(p, (__m256i)first_lanes(n));
#elif MASKED == 256 && DTYPE == FLOAT64
    return (vec)_mm256_maskload_pd(p, (__m256i)first_lanes(n));
#elif MASKED == 512
    halves some = (halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return load((const ELEMENT *)&some);
#elif DTYPE == FLOAT32 && WIDTH == 16
    return (vec){p[0], n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, 0};
#else
    ELEMENT buffer[LANES] = {0};
    for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
    return load(buffer);
#endif
}

INLINE void store_some(ELEMENT *p, vec v, int64_t n) {
#if MASKED == 512 && DTYPE == FLOAT32
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif MASKED == 512 && DTYPE == FLOAT64
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif MASKED == 256 && DTYPE == FLOAT32
    _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v);
#elif MASKED == 256 && DTYPE == FLOAT64
    _mm256_maskstore_pd(p, (__m256i)first_lanes(n), (__m256d)v);
#elif MASKED == 512
    halves all;
    store((ELEMENT *)&all, v);
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)all);
#elif DTYPE == FLOAT32 && WIDTH == 16
    p[0] = v[0];
    if (n > 1) p[1] = v[1];
    if (n > 2) p[2] = v[2];
#else
    ELEMENT buffer[LANES];
    store(buffer, v);
    for (int64_t i = 0; i < n; i++) p[i] = buffer[i];
#endif
}

/* Loops call these with the constant LANES, and once at the end of a row with fewer. */
INLINE vec load_n(const ELEMENT *p, int64_t n) { return n == LANES ? load(p) : load_some(p, n); }

INLINE void store_n(ELEMENT *p, vec v, int64_t n) {
    if (n == LANES)
        store(p, v);
    else
        store_some(p, v, n);
}

/* Which of the next n positions are valid; not those behind them. */
INLINE bits valid_lanes(const uint8_t *mask, int64_t n) {
    uint8_t some[16] = {0};
    if (n < LANES) {
        for (int64_t i = 0; i < n; i++) some[i] = mask[i];
        mask = some;
    }
#if defined(__AVX512F__) && WIDTH == 64 && LANES == 16
    return (bits)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)mask)) != 0;
#elif defined(__AVX2__) && WIDTH == 32 && LANES == 8
    return (bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)mask)) != 0;
#else
    return __builtin_convertvector(*(const bytes *)mask, bits) != 0;
#endif
}

/* x, or zero where it is neither valid nor finite. */
INLINE vec clean(vec x, bits valid) { return keep(valid | (x - x == 0), x); }

INLINE REAL sum_lanes(vec v) {
#ifdef __clang__
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
#else
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lanes() ^ half);
#endif
    return v[0];
}

INLINE double to_double(const ELEMENT *p) { return load_some(p, 1)[0]; }
