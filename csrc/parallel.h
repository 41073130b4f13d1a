// OpenMP where the compiler has it, one thread where not.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace moco_fast {

inline int thread_index() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below this many multiplications one thread is done before the others wake.
constexpr int64_t kParallelProducts = 1 << 18;

}  // namespace moco_fast
