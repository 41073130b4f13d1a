// Rows against the columns of one batch on the CPU: the two passes that contrast and nt_xent are made of.
//
// X (D, R, C) and Y (D, M, C) are unit rows, s_ij = x_i . y_j. Every row of X has at most one positive
// column; the others are its negatives, except its own where the columns are the rows themselves. With max_i
// the largest cosine of a row and total_i its sum of exp((s - max_i)/T), both with the positive:
//   first pass    the loss, and g_i = sum_j p_ij y_j,  p_ij = exp((s_ij - max_i)/T) / total_i
//   second pass   g_i = sum_j p_ji y_j, of columns that were the rows of a first pass
//                 g_i = sum_j (p_ij + p_ji) y_j, where the columns are the rows themselves
// over the negatives j. The positive's part, (1 - p) y with 1 - p = l / (l + e) and never a subtraction, the
// temperature and the norms make dx of g. Neither the R x M similarities nor their transpose reach memory.
//
// Cost of a pass: 2 R M C FLOPs, 4 with a gradient, and R M exponentials, 2 R M of paired rows in the second.
// Scratch: the unit rows, and per thread 8 bytes per element of a block of at most 256 rows.
//
// A block of rows meets all columns in their order, whatever thread does it: bitwise the same for any number
// of threads. A NaN or infinity in a row makes the losses it enters NaN.
#pragma once

#include <cstdint>

#include "memory.h"
#include "unit_rows.h"

namespace moco_fast {

// What a first pass found of every row, (D, R).
struct Softmaxes {
    explicit Softmaxes(const UnitRows& x);

    Scratch<float> max;    // largest cosine
    Scratch<float> share;  // 1 / total
    Scratch<float> miss;   // 1 - p of the positive
};

struct Pairing {
    // The positive of row i is column i + shift: beyond the ends there is none. Paired rows are their own
    // columns, meet themselves not, and have as positive the row half of all of them further on, in a circle.
    int64_t shift;
    bool paired;

    int64_t positive(int64_t row, int64_t columns) const;  // or -1
};

// dx (D, R, C), of the sum of the losses, may be null in the first pass. Both throw std::invalid_argument for
// a temperature that is not positive and finite.
void first_pass(const UnitRows& x, const UnitRows& y, const Pairing& pairing, double temperature,
                Softmaxes& of_x, float* loss, float* dx, int threads);
void second_pass(const UnitRows& x, const UnitRows& y, const Pairing& pairing, double temperature,
                 const Softmaxes& of_y, float* dx, int threads);

}  // namespace moco_fast
