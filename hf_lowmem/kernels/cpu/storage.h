/* How weights and state are stored, and how runs of entries are loaded and stored.
 *
 * Temporaries of a run stay in the first cache; float32 tensors are worked on where they are.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(NO_CLONES)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")

enum { LANES = 8, RUN = 256, AHEAD = 4 * RUN, UNIT = 1 << 16, FUSED = 1 << 21, LEAST_ROWS = 64 };
enum Dtype { FLOAT32, BFLOAT16, CODES };
enum Rounding { NEAREST, STOCHASTIC, KAHAN };
enum Rule { ADAMW_FULL, ADAMW_MEAN, SIGNUM };

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Uints __attribute__((vector_size(4 * LANES), aligned(4)));

/* A code map in lines, as dynamic_map.py has it: of counts by their exponents, and of values by decades. */
typedef struct {
    Floats slopes, intercepts;
    float starts[LANES];
    Floats count_slopes, count_intercepts;
    Ints last_counts;
    int32_t first_count;
} Map;

/* A full moment: `absmax` holds the scale of each block of codes. A row of codes ends with a block, which may be short:
 * a part's runs of columns are then its rows. Where no block is short, each is a row. */
typedef struct {
    void *data;
    float *absmax;
    int64_t dtype, block_size, row;
    const Map *map;
} Moment;

/* The tables that the caller fills, one row per part; columns.py says what their columns are. */
typedef struct { int64_t PART_COLUMNS; } PartRow;
typedef struct { double SCALAR_COLUMNS; } ScalarRow;

/* A part of a weight: its rows of both tables, and what they stand for. `means` holds one number per group, or one per
 * group and column; `averaged` says that it holds this step's gradient already. A factored part has `row_means`, one per
 * group and row, beside those of its columns. */
typedef struct {
    struct { int64_t PART_COLUMNS; };
    struct { double SCALAR_COLUMNS; };
    Moment first, second;
    float *means, *row_means;
    int averaged;
} Part;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts_of(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

#ifdef __clang__
INLINE Floats pick(Floats table, Ints index) {
    Floats picked;
    for (int i = 0; i < LANES; i++) picked[i] = table[index[i] & (LANES - 1)];
    return picked;
}
#else
#define pick __builtin_shuffle /* of the index modulo LANES */
#endif

INLINE float finite_or_zero(float x) { return (bits_of(x) & 0x7F800000u) == 0x7F800000u ? 0.0f : x; }

/* Intel's processors stop fetching by themselves at every page. AMD's go on, and are slowed down by our fetches. */
static int fetches = 1;

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((constructor)) static void ask_the_processor(void) {
    __builtin_cpu_init();
    fetches = !__builtin_cpu_is("amd");
}
#endif

INLINE void fetch_ahead(const void *data, int64_t dtype, int64_t at, int n) {
    if (!fetches) return;
    int64_t size = dtype == FLOAT32 ? 4 : dtype == BFLOAT16 ? 2 : 1;
    const char *next = (const char *)data + (at + AHEAD) * size;
    for (int64_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(next + byte, 0);
}

/* ------------------------------------------------------------------------------------------------ numbers as stored */

INLINE float from_bfloat16(uint16_t x) { return float_of((uint32_t)x << 16); }

INLINE uint16_t to_bfloat16(float x) { /* nearest, ties to even */
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

INLINE uint32_t hashed(uint32_t place, uint32_t key) {
    uint32_t x = place * 0x9E3779B1u + key;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x >> 16;
}

/* A unit in the last place of a bfloat16, as rounding.py's last_place. */
INLINE float last_place(float x) {
    float unit = float_of(bits_of(x) & 0x7F800000u) * 0x1p-7f;
    return unit < 0x1p-126f ? 0x1p-126f : unit;
}

INLINE float *load(void *data, int64_t dtype, int64_t at, int n, float *buffer) {
    if (dtype == FLOAT32) return (float *)data + at;
    const uint16_t *from = (const uint16_t *)data + at;
    SIMD for (int i = 0; i < n; i++) buffer[i] = from_bfloat16(from[i]);
    return buffer;
}

INLINE const float *load_grad(const Part *part, int64_t at, int n, float *buffer) {
    const float *grad = load((void *)part->grad, part->dtype, at, n, buffer);
    const float scale = (float)part->grad_scale;
    if (scale == 1.0f) return grad;
    SIMD for (int i = 0; i < n; i++) buffer[i] = grad[i] * scale;
    return buffer;
}

INLINE float *load_param(const Part *part, int64_t at, int n, float *buffer) {
    float *value = load((void *)part->param, part->dtype, at, n, buffer);
    if (part->rounding == KAHAN) {
        const int16_t *comp = (const int16_t *)part->kahan_comp + at;
        SIMD for (int i = 0; i < n; i++) value[i] += last_place(value[i]) * ((float)comp[i] * 0x1p-16f);
    }
    return value;
}

INLINE void store_param(const Part *part, int64_t at, int n, const float *value) {
    if (part->dtype == FLOAT32) return; /* in place */
    uint16_t *to = (uint16_t *)part->param + at;
    if (part->rounding == STOCHASTIC) {
        uint32_t key = (uint32_t)(int64_t)part->noise_key, first = (uint32_t)(part->start + at);
        SIMD for (int i = 0; i < n; i++) {
            uint32_t bits = bits_of(value[i]), finite = (bits & 0x7F800000u) != 0x7F800000u;
            uint32_t noisy = (bits + hashed(first + (uint32_t)i, key)) >> 16;
            to[i] = (uint16_t)(finite ? noisy : to_bfloat16(value[i]));
        }
        return;
    }
    SIMD for (int i = 0; i < n; i++) to[i] = to_bfloat16(value[i]);
    if (part->rounding == KAHAN) {
        int16_t *comp = (int16_t *)part->kahan_comp + at;
        SIMD for (int i = 0; i < n; i++) {
            float stored = from_bfloat16(to[i]);
            float fraction = nearbyintf((value[i] - stored) / last_place(stored) * 0x1p16f);
            fraction = fraction > 32767.0f ? 32767.0f : fraction;
            fraction = fraction < -32768.0f ? -32768.0f : fraction;
            comp[i] = (int16_t)finite_or_zero(fraction);
        }
    }
}

/* A table of 256 entries would be looked up one by one, as gather instructions take longer still; one of 8 is picked
 * from at once. Both functions work on LANES entries of `value`, which has room for LANES - 1 past its end. */
INLINE void decode(const uint8_t *codes, int n, float scale, const Map *map, float *value) {
    const Floats slopes = map->slopes, intercepts = map->intercepts;
    const int32_t first_count = map->first_count;
    /* Doubled: 0 and 2.0f both have an exponent of 0 modulo 8, so counts 0 and 1 share a line. */
    SIMD for (int i = 0; i < n; i++) value[i] = (float)(2 * (codes[i] + first_count));
    for (int i = 0; i < n; i += LANES) {
        Floats *const at = (Floats *)(value + i);
        const Ints exponent = (Ints)*at >> 23, sign = (Ints)*at & INT32_MIN;
        *at = (*at * pick(slopes, exponent) + (Floats)((Ints)pick(intercepts, exponent) ^ sign)) * scale;
    }
}

INLINE void encode(const float *value, int n, float absmax, const Map *map, uint8_t *codes) {
    const float inverse = 1.0f / (absmax < 0x1p-126f ? 0x1p-126f : absmax);
    const Floats slopes = map->count_slopes, intercepts = map->count_intercepts;
    const Ints last_counts = map->last_counts;
    int32_t found[RUN];
    for (int i = 0; i < n; i += LANES) {
        const Floats x = *(const Floats *)(value + i) * inverse, size = (Floats)((Ints)x & INT32_MAX);
        const Ints sign = (Ints)x >> 31;
        Ints decade = {0};
        for (int next = 1; next < LANES; next++) decade -= size >= map->starts[next];
        Ints count = __builtin_convertvector(size * pick(slopes, decade) + pick(intercepts, decade), Ints);
        const Ints last = pick(last_counts, decade), below = count < last;
        count = (count & below) | (last & ~below);
        *(Ints *)(found + i) =
            (Ints)((Uints)(count ^ sign) - (Uints)(sign + map->first_count)); /* past n, it may wrap */
    }
    /* The magnitude of -1 is that of the top code, which has no negative. */
    SIMD for (int i = 0; i < n; i++) codes[i] = (uint8_t)(found[i] > 0 ? found[i] : 0);
}

INLINE float largest_of(const float *value, int n) {
    int32_t largest = 0; /* the bits of magnitudes are in their order */
    _Pragma("omp simd reduction(max : largest)")
    for (int i = 0; i < n; i++) {
        int32_t bits = (int32_t)(bits_of(value[i]) & 0x7FFFFFFFu);
        largest = bits > largest ? bits : largest;
    }
    return float_of((uint32_t)largest);
}

/* The number of the block that a run begins with. */
INLINE int64_t first_block(const Moment *moment, int64_t at) {
    if (moment->dtype != CODES) return 0;
    int64_t row = at / moment->row, column = at % moment->row;
    if (moment->row == moment->block_size) return row; /* divisions are slow */
    return row * parts_of(moment->row, moment->block_size) + column / moment->block_size;
}

/* A run of a moment holds whole blocks, those from `scale`, and a short one only where its row ends. */
INLINE float *load_moment(const Moment *moment, int64_t at, int64_t scale, int n, float *buffer) {
    if (moment->dtype != CODES) return load(moment->data, moment->dtype, at, n, buffer);
    const uint8_t *codes = (const uint8_t *)moment->data + at;
    int size = (int)moment->block_size;
    for (int block = 0; block < n; block += size)
        decode(codes + block, (int)least(size, n - block), moment->absmax[scale++], moment->map, buffer + block);
    return buffer;
}

INLINE void store_moment(const Moment *moment, int64_t at, int64_t scale, int n, float *value) {
    if (moment->dtype == FLOAT32) return; /* in place */
    if (moment->dtype == BFLOAT16) {
        uint16_t *to = (uint16_t *)moment->data + at;
        SIMD for (int i = 0; i < n; i++) to[i] = to_bfloat16(value[i]);
        return;
    }
    uint8_t *codes = (uint8_t *)moment->data + at;
    for (int block = 0; block < n; block += (int)moment->block_size) {
        int size = (int)least(moment->block_size, n - block);
        float absmax = largest_of(value + block, size);
        if (finite_or_zero(absmax) != absmax) {
            SIMD for (int i = block; i < block + size; i++) value[i] = finite_or_zero(value[i]);
            absmax = largest_of(value + block, size);
        }
        moment->absmax[scale++] = absmax;
        encode(value + block, size, absmax, moment->map, codes + block);
    }
}
