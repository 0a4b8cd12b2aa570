/* Optimizer steps on the CPU: AdamW with a full second moment, one number per group of entries or one per row and one
 * per column, and Signum.
 *
 * One call steps many weights. Each is cut into units of work whose bounds depend on its shape alone, so the result
 * is the same on any number of threads. A unit goes over its entries in runs of at most RUN.
 *
 * The caller passes tables of addresses, sizes, dtypes and numbers, whose columns columns.py declares for both.
 */

#include <float.h>
#include <stdlib.h>

#include "storage.h"

#ifdef _OPENMP
#include <omp.h>
static int thread_number(void) { return omp_get_thread_num(); }
#else
static int thread_number(void) { return 0; }
#endif

enum { STEP, APPLY, AVERAGE }; /* step.py has them too */

/* How a part is cut into units. Where the units of a group share means, their sums wait in `sums`, and `scales` holds
 * their factors of exp_avg in the update; a unit of whole groups has both in its thread's scratch. Squares are summed
 * by `sum_rows` and `sum_columns` in either case, so that a mean has the same bits. */
typedef struct {
    int64_t group_chunk, row_chunk, column_chunk;
    int64_t group_units, row_units, column_units;
    int64_t sum_rows, sum_columns;
    double *sums;
    float *scales;
} Cut;

typedef struct {
    double *sums, *some;
    float *few, *scales;
} Scratch;

/* ------------------------------------------------------------------------------------------------------- one run */

/* The root of a second moment that includes the first. */
INLINE float limited_root(float root, float momentum) { return sqrtf(root * root + momentum * momentum); }

/* Step one run. Where the second moment is a mean, exp_avg is multiplied by `scales`, one factor per column, or by
 * `scale`. Where it is factored, its root is `scale`, the row's factor, times `scales`, those of the columns. Where it
 * includes the first moment, `scales` are the roots of the columns' means, beside which `scale` is 1, or `scale` is the
 * root of the only mean. */
INLINE void step_run(const Part *part, int64_t at, int n, const float *scales, float scale) {
    float params[RUN], grads[RUN], averages[RUN + LANES], squares[RUN + LANES];
    const float *grad = load_grad(part, at, n, grads);
    const int64_t scale_at = first_block(&part->first, at); /* both moments have the same blocks */
    float *param = load_param(part, at, n, params), *exp_avg = load_moment(&part->first, at, scale_at, n, averages);
    fetch_ahead((const void *)part->param, part->dtype, at, n);
    fetch_ahead((const void *)part->grad, part->dtype, at, n);
    fetch_ahead(part->first.data, part->first.dtype, at, n);
    if (part->rule == ADAMW_FULL) fetch_ahead(part->second.data, part->second.dtype, at, n);
    const float decay = (float)part->decay, step_size = (float)part->step_size, eps = (float)part->eps;
    const float weight1 = (float)part->new_1;

    if (part->rule == ADAMW_FULL) {
        SIMD for (int i = 0; i < n; i++) exp_avg[i] += weight1 * (grad[i] - exp_avg[i]);
        float *exp_avg_sq = load_moment(&part->second, at, scale_at, n, squares);
        const float beta2 = (float)part->beta2, weight2 = (float)part->new_2;
        if (part->second.dtype == CODES) { /* they hold the root */
            SIMD for (int i = 0; i < n; i++) {
                float root = sqrtf(beta2 * (exp_avg_sq[i] * exp_avg_sq[i]) + weight2 * (grad[i] * grad[i]));
                exp_avg_sq[i] = root;
                param[i] = param[i] * decay - step_size * (exp_avg[i] / (root + eps));
            }
        } else {
            SIMD for (int i = 0; i < n; i++) {
                exp_avg_sq[i] = beta2 * exp_avg_sq[i] + weight2 * (grad[i] * grad[i]);
                param[i] = param[i] * decay - step_size * (exp_avg[i] / (sqrtf(exp_avg_sq[i]) + eps));
            }
        }
        store_moment(&part->second, at, scale_at, n, exp_avg_sq);
    } else if (part->rule == SIGNUM) {
        SIMD for (int i = 0; i < n; i++) {
            exp_avg[i] += weight1 * (grad[i] - exp_avg[i]);
            float sign = (float)((exp_avg[i] > 0) - (exp_avg[i] < 0));
            param[i] = param[i] * decay - step_size * (sign + 0.0f * exp_avg[i]); /* NaN where it is not finite */
        }
    } else if (part->momentum > 0) {
        const float momentum = (float)part->momentum;
        SIMD for (int i = 0; i < n; i++) {
            exp_avg[i] += weight1 * (grad[i] - exp_avg[i]);
            float root = limited_root(scales ? scale * scales[i] : scale, momentum * exp_avg[i]);
            param[i] = param[i] * decay - step_size * (exp_avg[i] / (root + eps));
        }
    } else if (part->row_means) {
        SIMD for (int i = 0; i < n; i++) {
            exp_avg[i] += weight1 * (grad[i] - exp_avg[i]);
            param[i] = param[i] * decay - step_size * (exp_avg[i] / (scale * scales[i] + eps));
        }
    } else if (scales) {
        SIMD for (int i = 0; i < n; i++) {
            exp_avg[i] += weight1 * (grad[i] - exp_avg[i]);
            param[i] = param[i] * decay - exp_avg[i] * scales[i];
        }
    } else {
        SIMD for (int i = 0; i < n; i++) {
            exp_avg[i] += weight1 * (grad[i] - exp_avg[i]);
            param[i] = param[i] * decay - exp_avg[i] * scale;
        }
    }
    store_param(part, at, n, param);
    store_moment(&part->first, at, scale_at, n, exp_avg);
}

/* ------------------------------------------------------------------------------------------------------- one unit */

typedef struct { int64_t first_group, last_group, first_row, last_row, first_column, last_column; } Range;

INLINE int64_t offset_of(const Part *part, int64_t group, int64_t row) {
    return group / part->inner_groups * part->outer_group_stride
           + group % part->inner_groups * part->inner_group_stride + row / part->inner_rows * part->outer_row_stride
           + row % part->inner_rows * part->inner_row_stride;
}

INLINE int run_size(const Part *part) {
    int64_t block = part->first.dtype == CODES ? part->first.block_size : 1;
    return (int)(RUN - RUN % block);
}

/* The sum of squares of a range of a group. A square that is not finite counts as zero: it concerns its own entry. */
INLINE double sum_squares(const Part *part, int64_t group, const Range *range) {
    float buffer[RUN];
    double total = 0;
    for (int64_t row = range->first_row; row < range->last_row; row++) {
        int64_t from = offset_of(part, group, row);
        for (int64_t column = range->first_column; column < range->last_column; column += RUN) {
            int n = (int)least(RUN, range->last_column - column);
            const float *grad = load_grad(part, from + column, n, buffer);
            float sum = 0;
            _Pragma("omp simd reduction(+ : sum)")
            for (int i = 0; i < n; i++) sum += finite_or_zero(grad[i] * grad[i]);
            total += sum;
        }
    }
    return total;
}

/* Add the squares of a run to `to`, and return their sum. */
INLINE float add_squares(const float *grad, int n, float *to) {
    float sum = 0;
    _Pragma("omp simd reduction(+ : sum)")
    for (int i = 0; i < n; i++) {
        float square = finite_or_zero(grad[i] * grad[i]);
        to[i] += square;
        sum += square;
    }
    return sum;
}

/* A new mean; one that float32 cannot hold stops its group, as an infinite square stops an entry of AdamW. */
INLINE float largest_finite(double mean) { return mean < (double)FLT_MAX ? (float)mean : FLT_MAX; }

/* The same for every column of a range of rows, added to `sums`. The rows' own means, where there are any, are averaged
 * on the way. */
INLINE void sum_column_squares(const Part *part, int64_t group, const Range *range, float *few, double *sums) {
    enum { FEW = 32 }; /* rows that are summed in float32 */
    const double weight = part->new_2 / (double)part->columns;
    float buffer[RUN], *row_means = part->row_means ? part->row_means + group * part->rows : NULL;
    for (int64_t first = range->first_row; first < range->last_row; first += FEW) {
        memset(few, 0, (size_t)part->columns * sizeof *few);
        for (int64_t row = first; row < least(first + FEW, range->last_row); row++) {
            int64_t from = offset_of(part, group, row);
            double row_sum = 0;
            for (int64_t column = 0; column < part->columns; column += RUN) {
                int n = (int)least(RUN, part->columns - column);
                const float *grad = load_grad(part, from + column, n, buffer);
                float *to = few + column;
                if (row_means) row_sum += add_squares(grad, n, to);
                else SIMD for (int i = 0; i < n; i++) to[i] += finite_or_zero(grad[i] * grad[i]);
            }
            if (row_means) row_means[row] = largest_finite(part->beta2 * row_means[row] + weight * row_sum);
        }
        SIMD for (int64_t column = 0; column < part->columns; column++) sums[column] += few[column];
    }
}

INLINE int64_t means_of_group(const Part *part) { return part->per_column ? part->columns : 1; }

/* Average the sums of squares of a group into its means, and compute the factors step_size / (sqrt(mean) + eps), or
 * sqrt(mean) where entries differ by their first moments; those of a factored part are sqrt(mean / the mean of all
 * entries). */
INLINE void average(const Part *part, int64_t group, const double *sums, float *scales) {
    int64_t count = means_of_group(part);
    float *means = part->means + group * count;
    const double weight = part->new_2 / (double)(part->rows * part->columns / count);
    if (!part->averaged)
        SIMD for (int64_t i = 0; i < count; i++) means[i] = largest_finite(part->beta2 * means[i] + weight * sums[i]);
    if (part->row_means) {
        double total = 0;
        for (int64_t row = 0; row < part->rows; row++) total += part->row_means[group * part->rows + row];
        const float mean = fmaxf((float)(total / (double)part->rows), 0x1p-126f); /* or a zero matrix is 0 / 0 */
        SIMD for (int64_t i = 0; i < count; i++) scales[i] = sqrtf(means[i] / mean);
    } else if (part->momentum > 0) {
        SIMD for (int64_t i = 0; i < count; i++) scales[i] = sqrtf(means[i]);
    } else {
        const float step_size = (float)part->step_size, eps = (float)part->eps;
        SIMD for (int64_t i = 0; i < count; i++) scales[i] = step_size / (sqrtf(means[i]) + eps);
    }
}

/* The step of a range of one group; `scales` are its columns' or its only one, and nothing for a rule without means. */
INLINE void step_range(const Part *part, int64_t group, const Range *range, const float *scales) {
    int size = run_size(part);
    float scale = part->per_column ? 1 : scales ? scales[0] : 0;
    for (int64_t row = range->first_row; row < range->last_row; row++) {
        int64_t from = offset_of(part, group, row);
        if (part->row_means) scale = sqrtf(part->row_means[group * part->rows + row]);
        for (int64_t column = range->first_column; column < range->last_column; column += size) {
            int n = (int)least(size, range->last_column - column);
            step_run(part, from + column, n, part->per_column ? scales + column : NULL, scale);
        }
    }
}

/* ---------------------------------------------------------------------------------------------------- cut into units */

static int shares_means(const Part *part, const Cut *cut) {
    return part->rule == ADAMW_MEAN && cut->row_units * cut->column_units > 1;
}

/* A group of up to FUSED entries is a unit, which reads its gradient twice while it is in the cache, unless that would
 * leave threads without work; `share` is how many entries each has. */
static Cut cut_of(const Part *part, int64_t share) {
    int64_t size = run_size(part), entries = part->rows * part->columns;
    Cut cut = {1, part->rows, part->columns, 0, 0, 0, part->rows, part->columns, NULL, NULL};
    if (part->rule == ADAMW_MEAN && entries <= UNIT) {
        cut.group_chunk = UNIT / entries;
    } else if (part->columns >= UNIT && !part->per_column) {
        cut.sum_rows = 1;
        cut.sum_columns = UNIT / size * size;
    } else {
        cut.sum_rows = parts_of(UNIT, part->columns);
        /* The units' sums take eight bytes a column, which is to be little beside the entries. */
        if (part->per_column && cut.sum_rows < LEAST_ROWS) cut.sum_rows = LEAST_ROWS;
    }
    if (part->rule != ADAMW_MEAN || entries > least(FUSED, share)) {
        cut.row_chunk = cut.sum_rows;
        cut.column_chunk = cut.sum_columns;
    }
    cut.group_units = parts_of(part->groups, cut.group_chunk);
    cut.row_units = parts_of(part->rows, cut.row_chunk);
    cut.column_units = parts_of(part->columns, cut.column_chunk);
    return cut;
}

static Range range_of(const Part *part, const Cut *cut, int64_t unit) {
    int64_t column = unit % cut->column_units, row = unit / cut->column_units % cut->row_units;
    int64_t group = unit / cut->column_units / cut->row_units;
    Range range = {
        group * cut->group_chunk,   least((group + 1) * cut->group_chunk, part->groups),
        row * cut->row_chunk,       least((row + 1) * cut->row_chunk, part->rows),
        column * cut->column_chunk, least((column + 1) * cut->column_chunk, part->columns),
    };
    return range;
}

/* First pass over a unit whose group has others: its sums wait for theirs. */
CLONES static void sum_unit(const Part *part, const Cut *cut, int64_t unit, Scratch scratch) {
    Range range = range_of(part, cut, unit);
    if (part->per_column)
        sum_column_squares(part, range.first_group, &range, scratch.few, cut->sums + unit * part->columns);
    else cut->sums[unit] = sum_squares(part, range.first_group, &range);
}

/* Add up what the units of each group have found. */
CLONES static void combine(const Part *part, const Cut *cut) {
    int64_t count = means_of_group(part), units = cut->row_units * cut->column_units;
    for (int64_t group = 0; group < part->groups; group++) {
        double *sums = cut->sums + group * units * count;
        for (int64_t unit = 1; unit < units; unit++)
            SIMD for (int64_t i = 0; i < count; i++) sums[i] += sums[unit * count + i];
        average(part, group, sums, cut->scales + group * count);
    }
}

/* Sum the squares of a whole group, in the order of units that share it. */
INLINE void sum_group(const Part *part, const Cut *cut, int64_t group, Scratch scratch) {
    int64_t count = means_of_group(part);
    for (int64_t row = 0; row < part->rows; row += cut->sum_rows) {
        for (int64_t column = 0; column < part->columns; column += cut->sum_columns) {
            Range range = {
                group,  group + 1,
                row,    least(row + cut->sum_rows, part->rows),
                column, least(column + cut->sum_columns, part->columns),
            };
            double *to = row + column ? scratch.some : scratch.sums;
            if (part->per_column) {
                memset(to, 0, (size_t)count * sizeof *to);
                sum_column_squares(part, group, &range, scratch.few, to);
            } else {
                *to = sum_squares(part, group, &range);
            }
            if (row + column) SIMD for (int64_t i = 0; i < count; i++) scratch.sums[i] += to[i];
        }
    }
}

/* Step a unit, or, if it only `sums`, average what its own groups have found. */
CLONES static void step_unit(const Part *part, const Cut *cut, int64_t unit, Scratch scratch, int sums) {
    if (sums && (cut->scales || part->rule != ADAMW_MEAN)) return;
    Range range = range_of(part, cut, unit);
    int64_t count = means_of_group(part);
    for (int64_t group = range.first_group; group < range.last_group; group++) {
        const float *scales = NULL;
        if (cut->scales) {
            scales = cut->scales + group * count;
        } else if (part->rule == ADAMW_MEAN) {
            if (!part->averaged) sum_group(part, cut, group, scratch);
            average(part, group, scratch.sums, scratch.scales);
            scales = scratch.scales;
        }
        if (!sums) step_range(part, group, &range, scales);
    }
}

/* -------------------------------------------------------------------------------------------------------- all units */

/* The part that unit number `unit` of all belongs to: the last whose first unit is not above it. */
static int64_t part_of(const int64_t *first_unit, int64_t parts, int64_t unit) {
    int64_t low = 0, high = parts - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (first_unit[middle] <= unit) low = middle;
        else high = middle - 1;
    }
    return low;
}

#ifdef CHECKSUM
uint32_t hf_lowmem_checksum(void) { return CHECKSUM; }
#endif

static int64_t item_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : dtype == BFLOAT16 ? 2 : 1; }

/* A full moment from its first entry in the part on. */
static Moment moment_of(const Part *part, int64_t data, int64_t absmax, int64_t dtype, const Map *map) {
    int64_t scales = part->start / part->row * parts_of(part->row, part->block_size);
    Moment moment = {
        (void *)(data + part->start * item_size(dtype)),
        dtype == CODES ? (float *)absmax + scales : NULL,
        dtype,
        part->block_size,
        part->row,
        map,
    };
    return moment;
}

/* A part from its rows in the tables, its addresses moved to the first entry. */
static Part part_from(const PartRow *row, const ScalarRow *scalars, const Map *maps, int pass) {
    Part part = {0};
    memcpy(&part, row, sizeof *row);
    memcpy(&part.decay, scalars, sizeof *scalars);
    part.first = moment_of(&part, part.exp_avg, part.exp_avg_absmax, part.exp_avg_dtype, maps);
    if (part.rule == ADAMW_FULL)
        part.second = moment_of(&part, part.exp_avg_sq, part.exp_avg_sq_absmax, part.exp_avg_sq_dtype, maps + 1);
    part.means = (float *)part.exp_avg_sq;
    part.row_means = (float *)part.exp_avg_sq_rows;
    part.averaged = pass == APPLY;
    part.param += part.start * item_size(part.dtype);
    part.grad += part.start * item_size(part.dtype);
    part.kahan_comp += part.start * (int64_t)sizeof(int16_t);
    return part;
}

/* Step all parts, of which each has a row in both tables; `maps` are those of signed and of unsigned codes. A pass is
 * a STEP; or AVERAGE, which only averages this step's gradients into the means; or APPLY, which takes the means as they
 * are. Returns 0, or 1 without having changed anything when there is no memory for the sums. */
int hf_lowmem_step(const PartRow *rows, const ScalarRow *scalars, const Map *maps, int64_t count, int pass,
                   int threads) {
    int64_t widest = 1, sums = 0, shared_scales = 0, entries = 0;
    Part *parts = malloc((size_t)count * sizeof *parts);
    Cut *cuts = malloc((size_t)count * sizeof *cuts);
    int64_t *first_unit = malloc((size_t)(count + 1) * sizeof *first_unit);
    double *all_sums = NULL;
    float *all_scales = NULL;
    if (!parts || !cuts || !first_unit) goto failed;
    for (int64_t p = 0; p < count; p++) parts[p] = part_from(rows + p, scalars + p, maps, pass);
    for (int64_t p = 0; p < count; p++) entries += parts[p].groups * parts[p].rows * parts[p].columns;
    first_unit[0] = 0;
    for (int64_t p = 0; p < count; p++) {
        cuts[p] = cut_of(parts + p, entries / threads);
        int64_t units = cuts[p].group_units * cuts[p].row_units * cuts[p].column_units;
        first_unit[p + 1] = first_unit[p] + units;
        if (parts[p].per_column && parts[p].columns > widest) widest = parts[p].columns;
        if (shares_means(parts + p, cuts + p)) {
            sums += units * means_of_group(parts + p);
            shared_scales += parts[p].groups * means_of_group(parts + p);
        }
    }
    all_sums = calloc((size_t)(sums + 2 * widest * threads), sizeof *all_sums);
    all_scales = malloc((size_t)(shared_scales + 2 * widest * threads) * sizeof *all_scales);
    if (!all_sums || !all_scales) goto failed;
    double *next_sums = all_sums + 2 * widest * threads;
    float *next_scales = all_scales + 2 * widest * threads;
    for (int64_t p = 0; p < count; p++) {
        if (!shares_means(parts + p, cuts + p)) continue;
        cuts[p].sums = next_sums, cuts[p].scales = next_scales;
        next_sums += (first_unit[p + 1] - first_unit[p]) * means_of_group(parts + p);
        next_scales += parts[p].groups * means_of_group(parts + p);
    }
    _Pragma("omp parallel num_threads(threads)")
    {
        int thread = thread_number();
        Scratch scratch = {all_sums + 2 * widest * thread, NULL, all_scales + 2 * widest * thread, NULL};
        scratch.some = scratch.sums + widest, scratch.scales = scratch.few + widest;
        if (sums) {
            _Pragma("omp for schedule(dynamic)")
            for (int64_t unit = 0; unit < first_unit[count]; unit++) {
                int64_t p = part_of(first_unit, count, unit);
                if (cuts[p].sums && pass != APPLY) sum_unit(parts + p, cuts + p, unit - first_unit[p], scratch);
            }
            _Pragma("omp for schedule(dynamic)")
            for (int64_t p = 0; p < count; p++)
                if (cuts[p].sums) combine(parts + p, cuts + p);
        }
        _Pragma("omp for schedule(dynamic)")
        for (int64_t unit = 0; unit < first_unit[count]; unit++) {
            int64_t p = part_of(first_unit, count, unit);
            step_unit(parts + p, cuts + p, unit - first_unit[p], scratch, pass == AVERAGE);
        }
    }
    free(all_scales), free(all_sums), free(first_unit), free(cuts), free(parts);
    return 0;
failed:
    free(all_scales), free(all_sums), free(first_unit), free(cuts), free(parts);
    return 1;
}
