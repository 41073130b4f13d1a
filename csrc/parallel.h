// OpenMP where the compiler has it, one thread where not, and scratch memory that is never zeroed in vain.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

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

// Aligned to a cache line and uninitialised: the thread that writes a page first also maps it.
struct ScratchDelete {
    void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <class T>
using Scratch = std::unique_ptr<T[], ScratchDelete>;

template <class T>
Scratch<T> make_scratch(std::size_t count) {
    return Scratch<T>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64))));
}

}  // namespace moco_fast
