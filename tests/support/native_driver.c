/* Steps parts of many shapes by native.c, for the sanitizers: every buffer is exactly as large as it must be. */

#include "../../hf_lowmem/kernels/cpu/native.c"

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

static const size_t sizes[] = {4, 2, 1}; /* of an entry of each dtype */

int main(void) {
    const int64_t shapes[][3] = {{1, 1, 1},     {3, 5, 7},      {1, 70000, 1}, {40, 3, 256},
                                 {2, 300, 512}, {1, 4500, 480}, {2, 5, 255},   {1, 500, 4304},
                                 {3, 20, 257},  {1, 9, 65},     {1, 3, 65793}, {5, 700, 2}};
    const int64_t block_sizes[] = {32, 51, 256};
    int steps = 0;
    const Map map = {.slopes = {1e-2f}, .count_slopes = {127}, .last_counts = {127}, .first_count = -127};
    const Map maps[] = {map, map};
    for (int shape = 0; shape < 12; shape++)
        for (int64_t variant = 0; variant < 3 * 3 * 3 * 3 * 2 * 3 * 3; variant++) {
            int64_t groups = shapes[shape][0], rows = shapes[shape][1], columns = shapes[shape][2];
            int64_t entries = groups * rows * columns, per_column = variant % 3 > 0, codec = variant / 3 % 3;
            int64_t rule = variant / 9 % 3, rounding = variant / 27 % 3, dtype = variant / 81 % 2;
            int64_t block_size = block_sizes[variant / 162 % 3];
            int factored = variant % 3 == 2, pass = (int)(variant / 486);
            if (block_size > 32 && (codec != CODES || entries > 1 << 20)) continue; /* once is enough */
            if (per_column && rule != ADAMW_MEAN) continue;
            if (pass != STEP && (rule != ADAMW_MEAN || block_size > 32)) continue;
            if (dtype == FLOAT32 && rounding != NEAREST) continue;
            size_t count = (size_t)entries, blocks = (size_t)(groups * rows * parts_of(columns, block_size));
            size_t means = (size_t)(groups * (per_column ? columns : 1));
            int64_t second = codec == CODES ? CODES : FLOAT32;
            void *param = filled(count, sizes[dtype]), *grad = filled(count, sizes[dtype]);
            void *kahan_comp = rounding == KAHAN ? filled(count, 2) : NULL;
            void *exp_avg = filled(count, sizes[codec]), *exp_avg_absmax = codec == CODES ? filled(blocks, 4) : NULL;
            void *exp_avg_sq = NULL, *exp_avg_sq_absmax = NULL, *exp_avg_sq_rows = NULL;
            if (rule == ADAMW_MEAN) exp_avg_sq = filled(means, 4);
            if (factored) exp_avg_sq_rows = filled((size_t)(groups * rows), 4);
            if (rule == ADAMW_FULL) exp_avg_sq = filled(count, sizes[second]);
            if (rule == ADAMW_FULL && codec == CODES) exp_avg_sq_absmax = filled(blocks, 4);
            PartRow row = {
                .param = (int64_t)param,
                .grad = (int64_t)grad,
                .kahan_comp = (int64_t)kahan_comp,
                .exp_avg = (int64_t)exp_avg,
                .exp_avg_absmax = (int64_t)exp_avg_absmax,
                .exp_avg_sq = (int64_t)exp_avg_sq,
                .exp_avg_sq_absmax = (int64_t)exp_avg_sq_absmax,
                .exp_avg_sq_rows = (int64_t)exp_avg_sq_rows,
                .groups = groups,
                .inner_groups = groups,
                .inner_group_stride = rows * columns,
                .rows = rows,
                .inner_rows = rows,
                .inner_row_stride = columns,
                .columns = columns,
                .per_column = rule == ADAMW_MEAN && per_column,
                .dtype = dtype,
                .exp_avg_dtype = codec,
                .exp_avg_sq_dtype = rule == ADAMW_FULL ? second : 0,
                .rule = rule,
                .rounding = rounding,
                .block_size = codec == CODES ? block_size : 1,
                .row = codec != CODES         ? 1
                       : columns % block_size ? columns
                                              : block_size,
            };
            ScalarRow scalars = {
                .decay = 0.99,
                .step_size = 1e-3,
                .eps = 1e-8,
                .new_1 = 0.1,
                .beta2 = 0.99,
                .new_2 = 0.01,
                .noise_key = -7,
                .grad_scale = 0.5,
            };
            if (hf_lowmem_step(&row, &scalars, maps, 1, pass, 2)) return 1;
            free(param), free(grad), free(kahan_comp), free(exp_avg), free(exp_avg_absmax);
            free(exp_avg_sq), free(exp_avg_sq_absmax), free(exp_avg_sq_rows);
            steps++;
        }
    printf("%d steps\n", steps);
    return 0;
}
