/* FAdam in three passes over a weight, each of which the sums of the one before come before: the gradient's energy,
 * that of the natural gradient and of the natural decay, and the update.
 *
 * A weight is cut into units, whose bounds depend on its shape alone and whose sums are added up in their order. The
 * second pass goes backwards, so that it begins, as the third does, with what the pass before has left in the cache.
 */

#include <stdlib.h>

#include "storage.h"

enum Pass { SUM_GRADIENT, SUM_QUOTIENTS, UPDATE };

/* The arguments of one call, laid out as `_Call` in fadam.py. There are `count` weights, of `entries` entries each,
 * in a stack; runs are within `columns` of them. `sums` holds three numbers for each weight: the sums of g^2, n^2
 * and r^2, over the `whole` weight where this is a part of one. */
typedef struct {
    int64_t param, grad, kahan_comp, dtype, rounding;
    int64_t exp_avg, exp_avg_absmax, exp_avg_dtype, fim, fim_absmax, fim_dtype, block_size, row;
    int64_t count, entries, columns, whole, mask_decay;
    double *sums;
    const Map *maps;
    double noise_key, grad_scale, lr, beta1, keep, eps, weight_decay, clip_threshold;
} FAdam;

/* A weight of the stack as its units read it. */
typedef struct {
    Part part;
    float keep, new_2, new_1, eps, lr, decay, natural_scale, decay_scale;
    int mask_decay, has_grad;
} Weight;

INLINE float factor_of_clipping(const FAdam *fadam, double energy) {
    double ratio = sqrt(energy / (double)fadam->whole) / fadam->clip_threshold;
    return ratio > 1 ? (float)(1 / ratio) : 1.0f;
}

static Weight weight_of(const FAdam *fadam, const Part *part, const double *sums) {
    const double rms = sqrt(sums[0] / (double)fadam->whole), eps = fadam->eps * (rms < 1 ? rms : 1);
    Weight weight = {
        .part = *part,
        .keep = (float)fadam->keep,
        .new_2 = (float)(1 - fadam->keep),
        .new_1 = (float)(1 - fadam->beta1),
        .eps = (float)(eps < 1e-30 ? 1e-30 : eps),
        .lr = (float)fadam->lr,
        .decay = (float)(fadam->lr * fadam->weight_decay),
        .natural_scale = factor_of_clipping(fadam, sums[1]),
        .decay_scale = factor_of_clipping(fadam, sums[2]),
        .mask_decay = (int)fadam->mask_decay,
        .has_grad = rms > 0,
    };
    return weight;
}

/* The Fisher information of a run, of which codes hold the root. */
INLINE float *load_fisher(const Moment *moment, int64_t at, int64_t scale, int n, float *buffer) {
    float *fim = load_moment(moment, at, scale, n, buffer);
    if (moment->dtype == CODES) SIMD for (int i = 0; i < n; i++) fim[i] *= fim[i];
    return fim;
}

INLINE float updated(const Weight *weight, float fim, float grad) {
    return weight->keep * fim + weight->new_2 * (grad * grad);
}

INLINE int decays(const Weight *weight, float fim, float param) {
    return (finite_or_zero(param) == param) & (fim < INFINITY) & ((fim > 0.0f) | !weight->mask_decay);
}

/* 1 / (sqrt(fim) + eps), the reciprocal by Newton's iterations: roots and divisions take turns on one slow unit. What is
 * not finite gives no number. */
INLINE float reciprocal(float fim, float eps) {
    const float scale = sqrtf(fim) + eps;
    float found = float_of(0x7EF311C3u - bits_of(scale));
    for (int i = 0; i < 3; i++) found *= 2.0f - scale * found;
    return found;
}

INLINE float sum_squares(const float *value, int n) {
    enum { CHAINS = 4 }; /* one sum would wait for each addition */
    Floats sums[CHAINS] = {0};
    int i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)
        for (int chain = 0; chain < CHAINS; chain++) {
            const Floats x = *(const Floats *)(value + i + chain * LANES);
            sums[chain] += x * x;
        }
    const Floats both = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += both[lane];
    for (; i < n; i++) sum += value[i] * value[i];
    return sum;
}

/* Squares that are not finite count as zero: they concern their own entries. */
INLINE float sum_finite_squares(const float *value, int n) {
    float sum = sum_squares(value, n), finite = 0;
    if (finite_or_zero(sum) == sum) return sum;
    for (int i = 0; i < n; i++) finite += finite_or_zero(value[i] * value[i]);
    return finite;
}

INLINE double sum_gradient(const Weight *weight, int64_t at, int n) {
    float grads[RUN];
    fetch_ahead((const void *)weight->part.grad, weight->part.dtype, at, n);
    return sum_finite_squares(load_grad(&weight->part, at, n, grads), n);
}

INLINE void sum_quotients(const Weight *weight, int64_t at, int n, double *sums) {
    float params[RUN], grads[RUN], moments[RUN + LANES], naturals[RUN], shrunk[RUN];
    const Moment *second = &weight->part.second;
    const float *grad = load_grad(&weight->part, at, n, grads);
    const float *held = load_fisher(second, at, first_block(second, at), n, moments);
    fetch_ahead((const void *)weight->part.grad, weight->part.dtype, at, n);
    fetch_ahead(second->data, second->dtype, at, n);
    if (weight->decay == 0.0f || !weight->has_grad) {
        SIMD for (int i = 0; i < n; i++) naturals[i] =
            grad[i] * reciprocal(updated(weight, held[i], grad[i]), weight->eps);
    } else {
        const float *param = load_param(&weight->part, at, n, params);
        fetch_ahead((const void *)weight->part.param, weight->part.dtype, at, n);
        SIMD for (int i = 0; i < n; i++) {
            float fim = updated(weight, held[i], grad[i]), inverse = reciprocal(fim, weight->eps);
            naturals[i] = grad[i] * inverse;
            shrunk[i] = decays(weight, fim, param[i]) ? param[i] * inverse : 0.0f;
        }
        sums[1] += sum_squares(shrunk, n);
    }
    sums[0] += sum_finite_squares(naturals, n);
}

INLINE void update(const Weight *weight, int64_t at, int n, int in_codes) {
    float params[RUN], grads[RUN], averages[RUN + LANES], moments[RUN + LANES];
    const Part *part = &weight->part;
    const int64_t scale_at = first_block(&part->first, at); /* both moments have the same blocks */
    const float *grad = load_grad(part, at, n, grads);
    float *param = load_param(part, at, n, params), *exp_avg = load_moment(&part->first, at, scale_at, n, averages);
    float *held = load_fisher(&part->second, at, scale_at, n, moments);
    const float decay = weight->has_grad ? weight->decay * weight->decay_scale : 0.0f;
    SIMD for (int i = 0; i < n; i++) {
        float fim = updated(weight, held[i], grad[i]), root = sqrtf(fim), inverse = 1.0f / (root + weight->eps);
        exp_avg[i] += weight->new_1 * (grad[i] * inverse * weight->natural_scale - exp_avg[i]);
        float shrunk = decays(weight, fim, param[i]) ? param[i] * inverse : 0.0f;
        param[i] -= weight->lr * exp_avg[i] + decay * shrunk;
        held[i] = in_codes ? root : fim;
    }
    store_param(part, at, n, param);
    store_moment(&part->first, at, scale_at, n, exp_avg);
    store_moment(&part->second, at, scale_at, n, held);
}

/* The entries of a run, which has whole blocks of codes. */
INLINE int64_t run_size(int in_codes, int64_t block_size) { return in_codes ? RUN - RUN % block_size : RUN; }

/* Take a pass over the entries from `first` to `last` of a weight. */
CLONES static void sweep(const Weight *weight, enum Pass pass, int64_t first, int64_t last, int64_t columns,
                         double *sums) {
    const int in_codes = weight->part.second.dtype == CODES;
    const int64_t size = run_size(in_codes, weight->part.second.block_size);
    for (int64_t row = first; row < last; row += columns) {
        const int64_t end = least(row + columns, last);
        for (int64_t at = row; at < end; at += size) {
            const int n = (int)least(size, end - at);
            if (pass == SUM_GRADIENT) sums[0] += sum_gradient(weight, at, n);
            else if (pass == SUM_QUOTIENTS) sum_quotients(weight, at, n, sums);
            else update(weight, at, n, in_codes);
        }
    }
}

/* Returns 0, or 1 without having changed anything when there is no memory for the sums. */
int hf_lowmem_fadam(const FAdam *fadam, int pass, int threads) {
    const int64_t entries = fadam->entries, columns = fadam->columns;
    if (fadam->count == 0 || entries == 0) return 0; /* a shard without an entry */
    const int64_t size = run_size(fadam->fim_dtype == CODES, fadam->block_size);
    const int64_t chunk = columns > UNIT ? UNIT / size * size : parts_of(UNIT, columns) * columns;
    const int64_t units = parts_of(entries, chunk), all = fadam->count * units;
    double *sums = calloc((size_t)(2 * all), sizeof *sums);
    Weight *weights = malloc((size_t)fadam->count * sizeof *weights);
    if (!sums || !weights) {
        free(weights), free(sums);
        return 1;
    }
    Part part = {0};
    part.param = fadam->param, part.grad = fadam->grad, part.kahan_comp = fadam->kahan_comp;
    part.dtype = fadam->dtype, part.rounding = fadam->rounding;
    part.noise_key = fadam->noise_key, part.grad_scale = fadam->grad_scale;
    part.first = (Moment){(void *)fadam->exp_avg,
                          (float *)fadam->exp_avg_absmax,
                          fadam->exp_avg_dtype,
                          fadam->block_size,
                          fadam->row,
                          fadam->maps};
    part.second =
        (Moment){(void *)fadam->fim, (float *)fadam->fim_absmax, fadam->fim_dtype, fadam->block_size, fadam->row,
                 fadam->maps + 1};
    for (int64_t w = 0; w < fadam->count; w++) weights[w] = weight_of(fadam, &part, fadam->sums + 3 * w);
    _Pragma("omp parallel for schedule(dynamic) num_threads(threads) if (all > 1)")
    for (int64_t number = 0; number < all; number++) {
        const int64_t unit = pass == SUM_QUOTIENTS ? all - 1 - number : number, start = unit / units * entries;
        const int64_t first = start + unit % units * chunk, last = least(first + chunk, start + entries);
        sweep(weights + unit / units, (enum Pass)pass, first, last, columns, sums + 2 * unit);
    }
    for (int64_t w = 0; w < fadam->count && pass != UPDATE; w++) {
        double *total = fadam->sums + 3 * w + (pass == SUM_GRADIENT ? 0 : 1);
        for (int64_t unit = w * units; unit < (w + 1) * units; unit++) {
            total[0] += sums[2 * unit];
            if (pass == SUM_QUOTIENTS) total[1] += sums[2 * unit + 1];
        }
    }
    free(weights), free(sums);
    return 0;
}
