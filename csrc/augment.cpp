// Views of images on the CPU: threads and the instruction set.
#include "augment.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "augment_isa.h"
#include "cpu_features.h"
#include "memory.h"
#include "parallel.h"

namespace moco_fast {

void augment(const Augment& a) {
    if (a.count < 1 || (a.channels != 1 && a.channels != 3) || a.height < 1 || a.width < 1 || a.size < 1 ||
        a.dtype == DType::f64)
        throw std::invalid_argument("augment: no kernel for " + std::to_string(a.count) + " images of " +
                                    std::to_string(a.channels) + " x " + std::to_string(a.height) + " x " +
                                    std::to_string(a.width) + " and size " + std::to_string(a.size));
    const AugmentIsa& isa = MOCO_FAST_SELECTED(kAugment);
    const int threads = int(std::min<int64_t>(std::max(1, a.threads), a.count));
    const auto bytes = std::size_t(a.count * a.channels * a.size * a.size * bytes_of(a.dtype));
    const int64_t each = ceil_div(isa.scratch(a), 16) * 16;
    const auto scratch = make_scratch<float>(std::size_t(threads * each));
    expect_writes(a.out, bytes);
    // Views cost more or less: not all are blurred, nor are all crops as large.
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < a.count; ++i) isa.view(a, i, &scratch[std::size_t(thread_index() * each)]);
}

}  // namespace moco_fast
