#include <stdexcept>

#include "contrast.h"
#include "pairs.h"

namespace moco_fast {

void contrast(const Contrast& a) {
    if (a.first < 0 || a.first > a.keys - a.queries)
        throw std::invalid_argument("contrast: first must be in [0, M - N]");
    const UnitRows q(a.q, a.dtype, a.problems, a.queries, a.features, a.threads);
    const UnitRows k(a.k, a.dtype, a.problems, a.keys, a.features, a.threads);
    Softmaxes found(q);
    first_pass(q, k, {a.first, false}, a.temperature, found, a.loss, a.dq, a.threads);
    if (a.dk) second_pass(k, q, {-a.first, false}, a.temperature, found, a.dk, a.threads);
}

}  // namespace moco_fast
