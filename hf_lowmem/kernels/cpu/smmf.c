/* SMMF: one pass over a weight in its square view, by the old factors of both moments.
 *
 * The pass updates the weight and the signs, and finds the sums of the rows and of the columns of both new moments, of
 * which the caller makes the new factors. A square is cut into groups of rows, whose bounds depend on its sides alone
 * and which no byte of the signs crosses; each group has column sums of its own, which are added up in their order.
 */

#include <stdlib.h>

#include "storage.h"

enum { GROUPS = 64, WORD = 32 }; /* the most groups of rows; the signs that are loaded and stored at once */

/* The arguments of one call, laid out as `_Call` in smmf.py: addresses, and the numbers of a step. The factors and
 * sums of one square follow those of the one before; its signs begin with a byte. */
typedef struct {
    int64_t param, grad, kahan_comp, dtype, rounding;
    uint8_t *signs;
    const float *row, *col, *row_sq, *col_sq;
    float *row_sums, *col_sums, *row_sums_sq, *col_sums_sq;
    int64_t count, n, m, mask_zeros, rounds_decay;
    double noise_key, grad_scale, decay, lr, eps, beta1, beta2;
} Smmf;

/* A place where the signs of a group are written; bits that do not fill four bytes yet wait in `pending`. */
typedef struct {
    uint8_t *to;
    uint64_t pending;
    int count;
} Writer;

/* The sign bits to flip of n magnitudes, from bit number `bit` of the signs on; it writes whole words of 32. */
INLINE void load_flips(const uint8_t *signs, int64_t bit, int n, uint32_t *flips) {
    const Uints first = {31, 30, 29, 28, 27, 26, 25, 24}, none = {0};
    const int shift = (int)(bit & 7), held = (int)parts_of(n + shift, 8);
    uint8_t bytes[RUN / 8 + 8];
    memcpy(bytes, signs + bit / 8, (size_t)held);
    memset(bytes + held, 0, 8);
    for (int i = 0; i < n; i += WORD) {
        uint64_t found;
        memcpy(&found, bytes + i / 8, 8);
        const Uints word = none + (uint32_t)(found >> shift);
        for (int j = 0; j < WORD; j += LANES)
            *(Uints *)(flips + i + j) = ~(word << (first - (uint32_t)j)) & 0x80000000u;
    }
}

/* Append the signs of n moments, which has room for a whole number of words. */
INLINE void store_signs(Writer *writer, float *moments, int n) {
    const Uints first = {1, 2, 4, 8, 16, 32, 64, 128};
    const Floats zero = {0};
    memset(moments + n, 0, (size_t)(-n & (WORD - 1)) * sizeof *moments);
    for (int i = 0; i < n; i += WORD) {
        Uints bits = {0};
        for (int j = 0; j < WORD; j += LANES)
            bits |= (Uints)(*(const Floats *)(moments + i + j) > zero) & (first << (uint32_t)j);
        uint64_t pairs[4];
        memcpy(pairs, &bits, sizeof bits);
        const uint64_t joined = pairs[0] | pairs[1] | pairs[2] | pairs[3];
        writer->pending |= (uint64_t)(uint32_t)(joined | joined >> 32) << writer->count;
        writer->count += (int)least(WORD, n - i);
        if (writer->count < WORD) return;
        const uint32_t word = (uint32_t)writer->pending;
        memcpy(writer->to, &word, 4);
        writer->to += 4, writer->pending >>= WORD, writer->count -= WORD;
    }
}

/* Step n entries of a row, from number `bit` of the square and number `at` of the weight on, whose factors are `row`
 * and `col`. Adds to the sums; what is not finite counts as zero there, as it concerns its own entry. */
INLINE void step_run(const Smmf *smmf, const Part *part, const uint8_t *signs, Writer *writer, int64_t bit, int64_t at,
                     int n, float row, float row_sq, const float *col, const float *col_sq, float *sums,
                     float *col_sums, float *col_sums_sq) {
    float params[RUN], grads[RUN], moments[RUN];
    uint32_t flips[RUN];
    const float *grad = load_grad(part, at, n, grads);
    float *param = load_param(part, at, n, params);
    load_flips(signs, bit, n, flips);
    const float decay = (float)smmf->decay, lr = (float)smmf->lr, eps = (float)smmf->eps;
    const float new_1 = (float)(1 - smmf->beta1), new_2 = (float)(1 - smmf->beta2);
    const uint32_t never = smmf->mask_zeros ? 0 : 1;
    float sum = 0, sum_sq = 0;
    _Pragma("omp simd reduction(+ : sum, sum_sq)")
    for (int i = 0; i < n; i++) {
        float old = float_of(bits_of(row * col[i]) ^ flips[i]);
        old = (grad[i] != 0) | never ? old : 0.0f;
        float exp_avg = old + new_1 * grad[i], exp_avg_sq = row_sq * col_sq[i] + new_2 * (grad[i] * grad[i]);
        float square = finite_or_zero(exp_avg_sq), size = square == exp_avg_sq ? fabsf(exp_avg) : 0.0f;
        float decayed = param[i] * decay;
        decayed = smmf->rounds_decay ? from_bfloat16(to_bfloat16(decayed)) : decayed;
        param[i] = decayed - lr * (exp_avg / (sqrtf(exp_avg_sq) + eps));
        moments[i] = exp_avg;
        sum += size, sum_sq += square;
        col_sums[i] += size, col_sums_sq[i] += square;
    }
    sums[0] += sum, sums[1] += sum_sq;
    store_signs(writer, moments, n);
    store_param(part, at, n, param);
}

/* Step the rows of square number `square` from `first` to `last`; `col_sums` has room for the columns of both moments. */
CLONES static void step_rows(const Smmf *smmf, const Part *part, int64_t square, int64_t first, int64_t last,
                             float *col_sums) {
    const int64_t n = smmf->n, m = smmf->m;
    const float *col = smmf->col + square * m, *col_sq = smmf->col_sq + square * m;
    uint8_t *signs = smmf->signs + square * parts_of(n * m, 8);
    Writer writer = {signs + first * m / 8, 0, 0};
    memset(col_sums, 0, (size_t)(2 * m) * sizeof *col_sums);
    for (int64_t i = first; i < last; i++) {
        const int64_t number = square * n + i;
        const float row = (float)smmf->beta1 * smmf->row[number], row_sq = (float)smmf->beta2 * smmf->row_sq[number];
        float sums[2] = {0};
        for (int64_t j = 0; j < m; j += RUN)
            step_run(smmf, part, signs, &writer, i * m + j, number * m + j, (int)least(RUN, m - j), row, row_sq,
                     col + j, col_sq + j, sums, col_sums + j, col_sums + m + j);
        smmf->row_sums[number] = sums[0];
        smmf->row_sums_sq[number] = sums[1];
    }
    for (; writer.count > 0; writer.count -= 8, writer.pending >>= 8) *writer.to++ = (uint8_t)writer.pending;
}

/* Add up the column sums of all groups of a square, in their order. */
CLONES static void add_up(const Smmf *smmf, int64_t square, int64_t groups, const float *col_sums) {
    const int64_t m = smmf->m;
    float *const sums = smmf->col_sums + square * m, *const sums_sq = smmf->col_sums_sq + square * m;
    for (int64_t group = 0; group < groups; group++, col_sums += 2 * m) {
        SIMD for (int64_t j = 0; j < m; j++) sums[j] += col_sums[j];
        SIMD for (int64_t j = 0; j < m; j++) sums_sq[j] += col_sums[m + j];
    }
}

/* Returns 0, or 1 without having changed anything when there is no memory for the sums. */
int hf_lowmem_smmf(const Smmf *smmf, int threads) {
    const int64_t n = smmf->n, m = smmf->m, count = smmf->count;
    const int64_t wanted = least(parts_of(n * m, UNIT), GROUPS), rows = parts_of(parts_of(n, wanted), 8) * 8;
    const int64_t groups = parts_of(n, rows), batch = least(count, GROUPS / groups); /* squares taken at once */
    float *col_sums = malloc((size_t)(batch * groups * 2 * m) * sizeof *col_sums);
    if (!col_sums) return 1;
    Part part = {0};
    part.param = smmf->param, part.grad = smmf->grad, part.kahan_comp = smmf->kahan_comp;
    part.dtype = smmf->dtype, part.rounding = smmf->rounding;
    part.noise_key = smmf->noise_key, part.grad_scale = smmf->grad_scale;
    _Pragma("omp parallel num_threads(threads) if (count * n * m > UNIT)")
    for (int64_t first = 0; first < count; first += batch) {
        const int64_t squares = least(batch, count - first);
        _Pragma("omp for schedule(dynamic)")
        for (int64_t unit = 0; unit < squares * groups; unit++) {
            const int64_t group = unit % groups, start = group * rows;
            step_rows(smmf, &part, first + unit / groups, start, least(start + rows, n), col_sums + unit * 2 * m);
        }
        _Pragma("omp for")
        for (int64_t square = 0; square < squares; square++)
            add_up(smmf, first + square, groups, col_sums + square * groups * 2 * m);
    }
    free(col_sums);
    return 0;
}
