/* Steps parts of many shapes by native.c, for the sanitizers: every buffer is exactly as large as it must be. */

#include "../../hf_lowmem/kernels/native.c"

#include <stdio.h>

static uint32_t state = 1;

static uint32_t next(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static void *filled(size_t count, size_t size) {
    uint8_t *bytes = malloc(count * size);
    for (size_t i = 0; i < count * size; i++) bytes[i] = (uint8_t)next(64); /* small floats, and codes */
    return bytes;
}

/* Of codes: `rows` rows of `columns` entries, whose last block may be short. */
static Moment moment(int64_t rows, int64_t columns, int64_t dtype, int64_t block_size, const Map *map) {
    static const size_t sizes[] = {4, 2, 1};
    void *data = filled((size_t)(rows * columns), sizes[dtype]);
    if (dtype != CODES) return (Moment){data, NULL, dtype, 1, 1, map};
    float *absmax = filled((size_t)(rows * parts_of(columns, block_size)), 4);
    return (Moment){data, absmax, dtype, block_size, columns % block_size ? columns : block_size, map};
}

int main(void) {
    const int64_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {1, 70000, 1}, {40, 3, 256}, {2, 300, 512}, {1, 4500, 480}, {2, 5, 255},
                                 {1, 500, 4304}, {3, 20, 257}, {1, 9, 65}, {1, 3, 65793}, {5, 700, 2}};
    const int64_t block_sizes[] = {32, 51, 256};
    int steps = 0;
    const Map map = {.slopes = {1e-2f}, .count_slopes = {127}, .last_counts = {127}, .first_count = -127};
    for (int shape = 0; shape < 12; shape++)
        for (int64_t variant = 0; variant < 2 * 3 * 3 * 3 * 2 * 3; variant++) {
            int64_t groups = shapes[shape][0], rows = shapes[shape][1], columns = shapes[shape][2];
            int64_t entries = groups * rows * columns, per_column = variant % 2, codec = variant / 2 % 3;
            int64_t rule = variant / 6 % 3, rounding = variant / 18 % 3, dtype = variant / 54 % 2;
            int64_t block_size = block_sizes[variant / 108];
            if (block_size > 32 && (codec != CODES || entries > 1 << 20)) continue; /* once is enough */
            if (dtype == FLOAT32 && rounding != NEAREST) continue;
            size_t size = dtype == FLOAT32 ? 4 : 2, means = (size_t)(groups * (per_column ? columns : 1));
            Part part = {
                .param = filled((size_t)entries, size), .grad = filled((size_t)entries, size),
                .kahan_comp = rounding == KAHAN ? filled((size_t)entries, 2) : NULL, .means = filled(means, 4),
                .exp_avg = moment(groups * rows, columns, codec, block_size, &map),
                .groups = groups, .inner_groups = groups, .inner_group_stride = rows * columns,
                .rows = rows, .inner_rows = rows, .inner_row_stride = columns, .columns = columns,
                .per_column = rule == ADAMW_MEAN && per_column, .dtype = dtype, .rule = rule, .rounding = rounding,
                .noise_key = -7, .grad_scale = 0.5, .decay = 0.99, .step_size = 1e-3, .eps = 1e-8, .beta1 = 0.9, .beta2 = 0.99,
            };
            if (rule == ADAMW_FULL) part.exp_avg_sq = moment(groups * rows, columns, codec == CODES ? CODES : FLOAT32, block_size, &map);
            if (hf_lowmem_step(&part, 1, 2)) return 1;
            free(part.param), free((void *)part.grad), free(part.kahan_comp), free(part.means);
            free(part.exp_avg.data), free(part.exp_avg.absmax), free(part.exp_avg_sq.data), free(part.exp_avg_sq.absmax);
            steps++;
        }
    printf("%d steps\n", steps);
    return 0;
}
