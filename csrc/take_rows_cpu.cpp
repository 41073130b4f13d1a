#include <algorithm>
#include <cstring>

#include "memory.h"
#include "parallel.h"
#include "take_rows.h"

namespace moco_fast {

void take_rows(const TakeRows& a) {
    // Below this many bytes one thread is done before the others wake.
    constexpr int64_t kParallelBytes = 1 << 20;
    expect_writes(a.out, std::size_t(a.count * a.bytes));
#pragma omp parallel for num_threads(std::max(1, a.threads)) \
    schedule(static) if (a.count * a.bytes > kParallelBytes)
    for (int64_t i = 0; i < a.count; ++i)
        std::memcpy(a.out + i * a.bytes, a.rows + a.index[i] * a.bytes, std::size_t(a.bytes));
}

}  // namespace moco_fast
