/* MicroAdam: a block of a weight at a time, whose window, error and update are found while the block is in the cache.
 *
 * Entries are rounded where torch rounds them, so a product and a sum must not be fused. */

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "storage.h"
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
static int thread_number(void) { return omp_get_thread_num(); }
#else
static int thread_number(void) { return 0; }
#endif

enum { SAMPLES = 1024, FEW = 16, LEVELS = 15 };

/* The arguments of one call, laid out as `_Call` in micro_adam.py. Of the window's `filled` rows, `row` takes this
 * gradient; the terms of a row are multiplied by its entries of `first_powers` and `second_powers`. `follows` says
 * that each operation is rounded to bfloat16, and `rest` is the entry from which on a product is rounded before it
 * is subtracted. */
typedef struct {
    int64_t param, grad, kahan_comp, dtype, rounding;
    int64_t index, value, codes, low, high, state_dtype, first_powers, second_powers;
    int64_t numel, block, kept, columns, bucket, row, filled, follows, rest;
    double noise_key, grad_scale, decay, lr, eps, first_correction, second_correction, alpha;
} MicroAdam;

/* The scratch of a thread for one block: the gradient with the error, the sums of both moments, and places and keys of the
 * entries that may be the largest. */
typedef struct {
    float *grad, *first, *second;
    int32_t *places;
    uint32_t *keys;
} Block;

/* The k-th largest of `n` keys, and in `equal` how many of those that equal it are among the k largest. */
INLINE uint32_t kth_largest(const uint32_t *keys, int n, int k, int *equal) {
    uint32_t found = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int counts[256] = {0}, digit = 255;
        for (int i = 0; i < n; i++)
            if ((keys[i] & mask) == found) counts[keys[i] >> shift & 255]++;
        for (; counts[digit] < k; digit--) k -= counts[digit];
        found |= (uint32_t)digit << shift;
        mask |= 255u << shift;
    }
    *equal = k;
    return found;
}

/* Magnitudes are in the order of their bits; what is not a number counts as infinite. */
INLINE uint32_t key_of(float x) {
    uint32_t bits = bits_of(x) & 0x7FFFFFFFu;
    return bits < 0x7F800000u ? bits : 0x7F800000u;
}

/* A key that somewhat more than k of `n` entries are likely to reach, by a sample of them. */
INLINE uint32_t likely_floor(const float *value, int n, int k, uint32_t *keys) {
    int stride = n / SAMPLES, equal;
    if (stride < 2) return 0;
    for (int i = 0; i < SAMPLES; i++) keys[i] = key_of(value[i * stride]);
    int64_t rank = 8 + 3 * (int64_t)k * SAMPLES / (2 * (int64_t)n);
    return rank < SAMPLES ? kth_largest(keys, SAMPLES, (int)rank, &equal) : 0;
}

/* Collect the entries whose keys reach `floor`, of which most runs of FEW have none. */
INLINE int reaching(const float *value, int n, uint32_t floor, Block *block) {
    int count = 0;
    for (int run = 0; run < n; run += FEW) {
        int end = (int)least(run + FEW, n), any = 0;
        _Pragma("omp simd reduction(| : any)")
        for (int i = run; i < end; i++) any |= key_of(value[i]) >= floor;
        if (!any) continue;
        for (int i = run; i < end; i++) {
            block->places[count] = i;
            block->keys[count] = key_of(value[i]);
            count += block->keys[count] >= floor;
        }
    }
    return count;
}

/* Find the places of the k largest of `n` entries, in order; of equal ones the first count. */
INLINE void find_largest(const float *value, int n, int k, Block *block) {
    int equal, found = 0, count = reaching(value, n, likely_floor(value, n, k, block->keys), block);
    if (count < k) count = reaching(value, n, 0, block);
    uint32_t least_key = kth_largest(block->keys, count, k, &equal);
    for (int i = 0; i < count && found < k; i++) {
        int is_equal = block->keys[i] == least_key && equal > 0;
        if (block->keys[i] <= least_key && !is_equal) continue;
        equal -= is_equal;
        block->places[found++] = block->places[i];
    }
}

INLINE float rounded(float x) { return from_bfloat16(to_bfloat16(x)); }

INLINE float stored(int64_t data, int64_t dtype, int64_t at) {
    return dtype == FLOAT32 ? ((const float *)data)[at] : from_bfloat16(((const uint16_t *)data)[at]);
}

INLINE void store(int64_t data, int64_t dtype, int64_t at, float x) {
    if (dtype == FLOAT32) ((float *)data)[at] = x;
    else ((uint16_t *)data)[at] = to_bfloat16(x);
}

/* Decode the error of a run of a bucket. */
INLINE void decode_error(const MicroAdam *call, int64_t at, int n, int64_t bucket, float *error) {
    const uint8_t *packed = (const uint8_t *)call->codes + at / 2;
    float low = stored(call->low, call->state_dtype, bucket);
    float unit = (stored(call->high, call->state_dtype, bucket) - low) / LEVELS;
    uint8_t codes[RUN + 1];
    SIMD for (int i = 0; i < (n + 1) / 2; i++) {
        codes[2 * i] = packed[i] >> 4;
        codes[2 * i + 1] = packed[i] & 15;
    }
    SIMD for (int i = 0; i < n; i++) error[i] = codes[i] * unit + low;
}

/* Store `n` entries from `at` on, whole buckets, as the error. */
INLINE void encode_error(const MicroAdam *call, int64_t at, int64_t n, const float *error) {
    uint8_t codes[RUN + 1];
    for (int64_t from = 0; from < n; from += call->bucket) {
        int64_t to = least(from + call->bucket, n), bucket = (at + from) / call->bucket;
        float low = error[from], high = error[from];
        _Pragma("omp simd reduction(min : low) reduction(max : high)")
        for (int64_t i = from; i < to; i++) {
            low = error[i] < low ? error[i] : low;
            high = error[i] > high ? error[i] : high;
        }
        store(call->low, call->state_dtype, bucket, low);
        store(call->high, call->state_dtype, bucket, high);
        low = stored(call->low, call->state_dtype, bucket);
        float unit = (stored(call->high, call->state_dtype, bucket) - low) / LEVELS;
        for (int64_t run = from; run < to; run += RUN) {
            int size = (int)least(RUN, to - run);
            uint8_t *packed = (uint8_t *)call->codes + (at + run) / 2;
            memset(codes, 0, sizeof codes);
            if (unit > 0) {
                SIMD for (int i = 0; i < size; i++) {
                    float level = (error[run + i] - low) / unit + 0.5f;
                    level = level < LEVELS ? level : LEVELS;
                    codes[i] = (uint8_t)(int32_t)(level > 0 ? level : 0);
                }
            }
            SIMD for (int i = 0; i < (size + 1) / 2; i++) packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
        }
    }
}

/* Load the gradient of a block, with the error, and start the first sum with NaN where the gradient is not finite. */
INLINE void accumulate(const MicroAdam *call, const Part *part, int64_t at, int64_t n, Block *block) {
    float buffer[RUN], error[RUN];
    for (int64_t from = 0; from < n; from += call->bucket) {
        int64_t to = least(from + call->bucket, n), bucket = (at + from) / call->bucket;
        for (int64_t run = from; run < to; run += RUN) {
            int size = (int)least(RUN, to - run);
            const float *grad = load_grad(part, at + run, size, buffer);
            float *sum = block->grad + run;
            decode_error(call, at + run, size, bucket, error);
            if (call->follows) {
                SIMD for (int i = 0; i < size; i++) sum[i] = rounded(rounded(grad[i]) + rounded(error[i]));
            } else {
                SIMD for (int i = 0; i < size; i++) sum[i] = grad[i] + error[i];
            }
        }
    }
    SIMD for (int64_t i = 0; i < n; i++) block->first[i] = block->grad[i] * 0.0f;
    memset(block->second, 0, (size_t)n * sizeof *block->second);
}

/* Move the largest entries of a block into the window, and leave out what the error must not hold. */
INLINE void push(const MicroAdam *call, int64_t n, int64_t column, int kept, Block *block) {
    int64_t to = call->row * call->columns + column;
    find_largest(block->grad, (int)n, kept, block);
    for (int i = 0; i < kept; i++) {
        int32_t place = block->places[i];
        ((int16_t *)call->index)[to + i] = (int16_t)place;
        store(call->value, call->state_dtype, to + i, block->grad[place]);
        block->grad[place] = 0;
    }
    SIMD for (int64_t i = 0; i < n; i++) block->grad[i] = fabsf(block->grad[i]) <= 0x1p126f ? block->grad[i] : 0.0f;
}

INLINE void add_window(const MicroAdam *call, int64_t column, int kept, Block *block) {
    for (int64_t row = 0; row < call->filled; row++) {
        const int16_t *index = (const int16_t *)call->index + row * call->columns + column;
        float first = ((const float *)call->first_powers)[row], second = ((const float *)call->second_powers)[row];
        for (int i = 0; i < kept; i++) {
            float value = stored(call->value, call->state_dtype, row * call->columns + column + i);
            block->first[index[i]] += value * first;
            block->second[index[i]] += value * second * value;
        }
    }
}

/* Update the weights of a block; with alpha, `block->grad` holds the error. */
INLINE void update(const MicroAdam *call, const Part *part, int64_t at, int64_t n, const Block *block) {
    const float decay = (float)call->decay, lr = (float)call->lr, eps = (float)call->eps, alpha = (float)call->alpha;
    const float first_correction = (float)call->first_correction, second_correction = (float)call->second_correction;
    float buffer[RUN], step[RUN];
    for (int64_t run = 0; run < n; run += RUN) {
        int size = (int)least(RUN, n - run);
        float *value = load_param(part, at + run, size, buffer);
        const float *first = block->first + run, *second = block->second + run, *error = block->grad + run;
        SIMD for (int i = 0; i < size; i++) step[i] =
            first[i] * first_correction / (sqrtf(second[i] * second_correction) + eps);
        if (!call->follows) {
            if (alpha > 0) SIMD for (int i = 0; i < size; i++) step[i] += error[i] * alpha;
            SIMD for (int i = 0; i < size; i++) value[i] = value[i] * decay - step[i] * lr;
        } else {
            SIMD for (int i = 0; i < size; i++) step[i] = rounded(step[i]);
            if (alpha > 0) SIMD for (int i = 0; i < size; i++) step[i] = rounded(step[i] + rounded(error[i] * alpha));
            SIMD for (int i = 0; i < size; i++) {
                float moved = step[i] * lr;
                value[i] = rounded(value[i] * decay) - (at + run + i < call->rest ? moved : rounded(moved));
            }
        }
        store_param(part, at + run, size, value);
    }
}

CLONES static void step_block(const MicroAdam *call, const Part *part, int64_t number, Block *block) {
    int64_t at = number * call->block, n = least(call->block, call->numel - at), column = number * call->kept;
    int kept = (int)least(call->kept, call->columns - column);
    accumulate(call, part, at, n, block);
    push(call, n, column, kept, block);
    encode_error(call, at, n, block->grad);
    add_window(call, column, kept, block);
    if (call->alpha > 0) {
        for (int64_t from = 0; from < n; from += call->bucket)
            for (int64_t run = from; run < least(from + call->bucket, n); run += RUN) {
                int size = (int)least(RUN, least(from + call->bucket, n) - run);
                decode_error(call, at + run, size, (at + from) / call->bucket, block->grad + run);
            }
    }
    update(call, part, at, n, block);
    if (call->alpha > 0) {
        const float left = (float)(1 - call->alpha);
        SIMD for (int64_t i = 0; i < n; i++) block->grad[i] *= left;
        if (call->follows) SIMD for (int64_t i = 0; i < n; i++) block->grad[i] = rounded(block->grad[i]);
        encode_error(call, at, n, block->grad);
    }
}

/* Step a weight. Returns 0, or 1 without having changed anything when there is no memory for its blocks. */
int hf_lowmem_micro_adam(const MicroAdam *call, int threads) {
    int64_t size = least(call->block, call->numel), blocks = parts_of(call->numel, call->block);
    threads = (int)least(threads, blocks);
    int64_t entries = (size > SAMPLES ? size : SAMPLES) + 1; /* a place is written before it is known to count */
    float *memory = malloc((size_t)(5 * entries * threads) * sizeof *memory);
    if (!memory) return 1;
    Part part = {0};
    part.param = call->param, part.grad = call->grad, part.kahan_comp = call->kahan_comp;
    part.dtype = call->dtype, part.rounding = call->rounding;
    part.noise_key = call->noise_key, part.grad_scale = call->grad_scale;
    _Pragma("omp parallel num_threads(threads)")
    {
        float *own = memory + 5 * entries * thread_number();
        Block block = {own, own + entries, own + 2 * entries, (int32_t *)(own + 3 * entries),
                       (uint32_t *)(own + 4 * entries)};
        _Pragma("omp for schedule(dynamic)")
        for (int64_t number = 0; number < blocks; number++) step_block(call, &part, number, &block);
    }
    free(memory);
    return 0;
}
