/* H-Fac in three passes over a weight: the sums of rows and columns, the energy of the normalized gradient, the update.
 *
 * A weight is a stack of matrices, which are cut into groups of rows. Their bounds depend on the shape alone, and their
 * sums are added up in their order.
 */

#include <stdlib.h>

#include "storage.h"

enum Pass { SUM_SIDES, SUM_ENERGY, UPDATE };
enum { GROUPS = 64, COLUMN_SUMS = 1 << 20 }; /* the most groups of rows with column sums, and entries of those sums */

/* The arguments of one call, laid out as `_Call` in h_fac.py. The numbers of the rows and columns of one matrix
 * follow those of the one before. */
typedef struct {
    int64_t param, grad, kahan_comp, dtype, rounding;
    float *row_sums, *row_squares, *col_sums, *col_squares;
    const float *row_factors, *row_shifts, *col_factors, *col_shifts, *step_sizes;
    double *energies;
    int64_t count, rows, columns;
    double noise_key, grad_scale, decay;
} HFac;

/* Add n entries of a row to the sums of g and g^2; those whose square is not finite count as zero. */
INLINE void add_sides(const Part *part, int64_t at, int n, double *row, float *col_sums, float *col_squares) {
    float grads[RUN], finite[RUN], sum = 0, square = 0;
    const float *grad = load_grad(part, at, n, grads);
    fetch_ahead((const void *)part->grad, part->dtype, at, n);
    _Pragma("omp simd reduction(+ : sum, square)")
    for (int i = 0; i < n; i++) sum += grad[i], square += grad[i] * grad[i];
    if (finite_or_zero(square) != square) {
        sum = square = 0;
        for (int i = 0; i < n; i++) {
            finite[i] = finite_or_zero(grad[i] * grad[i]) == grad[i] * grad[i] ? grad[i] : 0.0f;
            sum += finite[i], square += finite[i] * finite[i];
        }
        grad = finite;
    }
    SIMD for (int i = 0; i < n; i++) {
        col_sums[i] += grad[i];
        col_squares[i] += grad[i] * grad[i];
    }
    row[0] += sum, row[1] += square;
}

/* The gradient; one whose square overflows is stopped, as by an infinite second moment, and NaN and Inf are NaN. */
INLINE float stepped(float grad) { return finite_or_zero(grad * grad) == grad * grad ? grad : grad * 0.0f; }

INLINE double energy_of(const Part *part, int64_t at, int n, float row, const float *cols) {
    float grads[RUN], sum = 0;
    const float *grad = load_grad(part, at, n, grads);
    fetch_ahead((const void *)part->grad, part->dtype, at, n);
    _Pragma("omp simd reduction(+ : sum)")
    for (int i = 0; i < n; i++) {
        float normalized = stepped(grad[i]) * row * cols[i];
        sum += finite_or_zero(normalized * normalized);
    }
    return sum;
}

INLINE void update(const Part *part, int64_t at, int n, float step_size, float row, float row_shift, const float *cols,
                   const float *col_shifts) {
    float params[RUN], grads[RUN];
    const float *grad = load_grad(part, at, n, grads), decay = (float)part->decay;
    float *param = load_param(part, at, n, params);
    SIMD for (int i = 0; i < n; i++) param[i] =
        param[i] * decay - (stepped(grad[i]) * row * cols[i] * step_size + (row_shift + col_shifts[i]));
    store_param(part, at, n, param);
}

/* Take a pass over the rows from `first` to `last`, counted through all matrices; they are of one matrix. */
CLONES static void sweep(const HFac *h_fac, const Part *part, enum Pass pass, int64_t first, int64_t last,
                         float *col_sums, float *col_squares, double *energy) {
    const int64_t columns = h_fac->columns, matrix = first / h_fac->rows, from = matrix * columns;
    for (int64_t row = first; row < last; row++) {
        double sums[2] = {0};
        for (int64_t column = 0; column < columns; column += RUN) {
            const int64_t at = row * columns + column, col = from + column;
            const int n = (int)least(RUN, columns - column);
            if (pass == SUM_SIDES) add_sides(part, at, n, sums, col_sums + column, col_squares + column);
            else if (pass == SUM_ENERGY)
                *energy += energy_of(part, at, n, h_fac->row_factors[row], h_fac->col_factors + col);
            else
                update(part, at, n, h_fac->step_sizes[matrix], h_fac->row_factors[row], h_fac->row_shifts[row],
                       h_fac->col_factors + col, h_fac->col_shifts + col);
        }
        if (pass == SUM_SIDES) h_fac->row_sums[row] = (float)sums[0], h_fac->row_squares[row] = (float)sums[1];
    }
}

/* Add up the column sums of the groups of a matrix, in their order. */
CLONES static void add_up(const HFac *h_fac, int64_t matrix, int64_t groups, const float *found) {
    const int64_t columns = h_fac->columns;
    float *const sums = h_fac->col_sums + matrix * columns, *const squares = h_fac->col_squares + matrix * columns;
    for (int64_t group = 0; group < groups; group++, found += 2 * columns) {
        SIMD for (int64_t i = 0; i < columns; i++) sums[i] += found[i];
        SIMD for (int64_t i = 0; i < columns; i++) squares[i] += found[columns + i];
    }
}

/* Returns 0, or 1 without having changed anything when there is no memory for the sums. */
int hf_lowmem_h_fac(const HFac *h_fac, int pass, int threads) {
    const int64_t rows = h_fac->rows, columns = h_fac->columns, count = h_fac->count;
    if (count == 0 || rows == 0 || columns == 0) return 0; /* a shard without a row */
    int64_t groups = parts_of(rows * columns, UNIT);
    if (pass == SUM_SIDES) groups = least(groups, least(GROUPS, COLUMN_SUMS / columns) / count);
    if (groups < 1) groups = 1;
    const int64_t chunk = parts_of(rows, groups);
    groups = parts_of(rows, chunk);
    const int has_scratch = pass == SUM_SIDES && groups > 1; /* or a matrix has its sums written where they belong */
    float *scratch = has_scratch ? calloc((size_t)(count * groups * 2 * columns), sizeof *scratch) : NULL;
    double *energies = calloc((size_t)(count * groups), sizeof *energies);
    if (!energies || (has_scratch && !scratch)) {
        free(energies), free(scratch);
        return 1;
    }
    Part part = {0};
    part.param = h_fac->param, part.grad = h_fac->grad, part.kahan_comp = h_fac->kahan_comp;
    part.dtype = h_fac->dtype, part.rounding = h_fac->rounding;
    part.noise_key = h_fac->noise_key, part.grad_scale = h_fac->grad_scale, part.decay = h_fac->decay;
    _Pragma("omp parallel num_threads(threads) if (count * groups > 1)")
    {
        _Pragma("omp for schedule(dynamic)")
        for (int64_t unit = 0; unit < count * groups; unit++) {
            const int64_t matrix = unit / groups, start = matrix * rows, first = start + unit % groups * chunk;
            float *sums = scratch ? scratch + unit * 2 * columns : h_fac->col_sums + matrix * columns;
            float *squares = scratch ? sums + columns : h_fac->col_squares + matrix * columns;
            sweep(h_fac, &part, (enum Pass)pass, first, least(first + chunk, start + rows), sums, squares,
                  energies + unit);
        }
        if (scratch) {
            _Pragma("omp for")
            for (int64_t matrix = 0; matrix < count; matrix++)
                add_up(h_fac, matrix, groups, scratch + matrix * groups * 2 * columns);
        }
    }
    for (int64_t unit = 0; pass == SUM_ENERGY && unit < count * groups; unit++)
        h_fac->energies[unit / groups] += energies[unit];
    free(energies), free(scratch);
    return 0;
}
