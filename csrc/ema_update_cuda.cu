// See ema_update.h; how one launch serves all tensors, in multi_tensor_cuda.h.
#include "ema_update.h"
#include "multi_tensor_cuda.h"

namespace moco_fast {
namespace {

using namespace cuda;

struct NoCopy {};  // of a state that is its own target

// A block's share, V values per access and U accesses of each tensor in flight per thread.
template <int V, int U, class State, class Source, class Copy>
__device__ __forceinline__ void update(State* state, const Source* source, Copy* copy, int begin, int count,
                                       const Complement<Compute<State>>& m) {
    for (int base = begin + int(threadIdx.x) * V; base < count; base += kThreads * V * U) {
        State kept[U][V];
        Source taken[U][V];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads * V;
            if (i >= count) break;
            load(state + i, kept[u]);
            load(source + i, taken[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads * V;
            if (i >= count) break;
#pragma unroll
            for (int v = 0; v < V; ++v)
                narrow(rounded::ema(widen(kept[u][v]), widen(taken[u][v]), m.value, m.rest), kept[u][v]);
            store(state + i, kept[u]);
            if constexpr (!std::is_same_v<Copy, NoCopy>) {
                Copy rounded_once[V];
#pragma unroll
                for (int v = 0; v < V; ++v) narrow(widen(kept[u][v]), rounded_once[v]);
                store(copy + i, rounded_once);
            }
        }
    }
}

template <class State, class Source, class Copy>
__device__ __forceinline__ void update(State* state, const Source* source, Copy* copy, int count,
                                       bool vectors, const Scalar& momentum) {
    constexpr int kState = sizeof(State), kSource = sizeof(Source), kCopy = sizeof(Copy);
    constexpr int kLeast = kState < kSource ? kState : kSource;
    constexpr int kNarrowest = std::is_same_v<Copy, NoCopy> || kLeast < kCopy ? kLeast : kCopy;
    constexpr int V = 16 / kNarrowest;  // the widest type then takes two accesses of 16 bytes
    const Complement<Compute<State>> m = complement<Compute<State>>(momentum);
    const int whole = vectors ? count / V * V : 0;
    update<V, V * kState == 16 ? 4 : 2>(state, source, copy, 0, whole, m);
    update<1, 8>(state, source, copy, whole, count, m);
}

__global__ void __launch_bounds__(kThreads)
    ema_update_kernel(const __grid_constant__ Table<ema::kRoles> table, const __grid_constant__ Scalar m) {
    const Share share = share_of_block(table);
    const bool vectors = aligned<ema::kRoles>(table, share.tensor);
    const DType target = DType(table.dtype[ema::kTarget][share.tensor]);
    if (target == DType::f64)
        return update(at<double>(table, ema::kTarget, share), at<const double>(table, ema::kSource, share),
                      static_cast<NoCopy*>(nullptr), share.count, vectors, m);
    float* master = at<float>(table, ema::kMaster, share);
    with_type(DType(table.dtype[ema::kSource][share.tensor]), [&](auto s) {
        using Source = decltype(s);
        with_type(target, [&](auto t) {
            using Target = decltype(t);
            if constexpr (sizeof(Source) < 8 && sizeof(Target) < 8) {  // f64 was served above
                const Source* source = at<const Source>(table, ema::kSource, share);
                Target* to = at<Target>(table, ema::kTarget, share);
                if (master)
                    update(master, source, to, share.count, vectors, m);
                else
                    update(to, source, static_cast<NoCopy*>(nullptr), share.count, vectors, m);
            }
        });
    });
}

}  // namespace

void ema_update_cuda(const TensorRows& rows, const Scalar& m, const CudaStream& where) {
    constexpr const char* kOp = "ema_update_";
    ema::check(rows);
    const OnDevice guard(where.device, kOp);
    for_each_table<ema::kRoles>(rows, [&](const Table<ema::kRoles>& table, int chunks) {
        launch(kOp, ema_update_kernel, chunks, where, table, m);
    });
}

}  // namespace moco_fast
