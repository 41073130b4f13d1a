// What the losses on the CPU do with a finished softmax, one query at a time, in fp64.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"

namespace moco_fast {

constexpr double kLog2E = 1.4426950408889634;

struct CrossEntropy {
    double loss;   // logsumexp over positive and negatives, minus the positive's logit
    double total;  // all exponentials above the maximum: that of the positive and `sum`
};

// From the largest cosine, positive included, and the negatives' sum of exp((s - max) / T).
static inline CrossEntropy cross_entropy(float max, float sum, float positive, double temperature) {
    const double gap =
        (double(max) - double(positive)) / temperature;  // >= 0; 0 where the positive is on top
    const double total = double(sum) + std::exp(-gap);
    // log1p keeps a tiny loss exact; a negative above the positive makes total >= 1 and its logarithm safe.
    return {gap > 0 ? gap + std::log(total) : std::log1p(double(sum)) + gap, total};
}

// dx = (d - x^ (x^ . d)) / |x| for the gradient d to x^ = x / max(|x|, 1e-12); no projection where the norm
// was clamped. `d_hat(c)` and `x_hat(c)` give element c.
template <class Gradient, class Unit>
static inline void through_norm(int64_t features, float norm, const Gradient& d_hat, const Unit& x_hat,
                                float* dx) {
    const double radial =
        norm < kNormFloor ? 0 : sum_of(features, [&](int64_t c) { return d_hat(c) * double(x_hat(c)); });
    const double inverse = 1.0 / clamp_norm(norm);
    for (int64_t c = 0; c < features; ++c) dx[c] = float((d_hat(c) - radial * double(x_hat(c))) * inverse);
}

}  // namespace moco_fast
