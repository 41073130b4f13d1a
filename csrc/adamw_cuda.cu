// See adamw.h; how one launch serves all tensors, in multi_tensor_cuda.h.
#include "adamw.h"
#include "multi_tensor_cuda.h"

namespace moco_fast {
namespace {

using namespace cuda;
using namespace adamw;

using AdamwTable = Table<kRoles>;

template <class T>
struct Pointers {
    T* param;
    const T* grad;
    T *average, *square, *key;
};

template <int V, int U, class T, class C>
__device__ __forceinline__ void update(const Pointers<T>& to, int begin, int count, const Numbers<C>& n,
                                       const Complement<C>& m) {
    for (int base = begin + int(threadIdx.x) * V; base < count; base += kThreads * V * U) {
        T param[U][V], grad[U][V], average[U][V], square[U][V], key[U][V] = {};
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads * V;
            if (i >= count) break;
            load(to.param + i, param[u]);
            load<true>(to.grad + i, grad[u]);
            load(to.average + i, average[u]);
            load(to.square + i, square[u]);
            if (to.key) load(to.key + i, key[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads * V;
            if (i >= count) break;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                C first = widen(average[u][v]), second = widen(square[u][v]);
                narrow(updated(C(widen(param[u][v])), C(widen(grad[u][v])), first, second, n), param[u][v]);
                narrow(first, average[u][v]);
                narrow(second, square[u][v]);
                narrow(rounded::ema(C(widen(key[u][v])), C(widen(param[u][v])), m.value, m.rest), key[u][v]);
            }
            store(to.param + i, param[u]);
            store(to.average + i, average[u]);
            store(to.square + i, square[u]);
            if (to.key) store(to.key + i, key[u]);
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ AdamwTable table, const __grid_constant__ AdamwStep step,
                 const __grid_constant__ Scalar lr, const __grid_constant__ Scalar m) {
    const Share share = share_of_block(table);
    // Two powers in fp64 per block, not per thread.
    __shared__ double corrections[2];
    if (threadIdx.x < 2) {
        const double t = double(*static_cast<const float*>(table.data[kStep][share.tensor]));
        corrections[threadIdx.x] = -expm1(t * log(threadIdx.x == 0 ? step.beta1 : step.beta2));
    }
    __syncthreads();
    const bool vectors = aligned<kStep>(table, share.tensor);
    with_type(DType(table.dtype[kParam][share.tensor]), [&](auto type) {
        using T = decltype(type);
        using C = Compute<T>;
        constexpr int V = 16 / sizeof(T);
        const Pointers<T> to{at<T>(table, kParam, share), at<const T>(table, kGrad, share),
                             at<T>(table, kAverage, share), at<T>(table, kSquare, share),
                             at<T>(table, kKey, share)};
        const Numbers<C> n = numbers<C>(step, value_of(lr), corrections[0], corrections[1]);
        const Complement<C> rest = complement<C>(m);
        const int whole = vectors ? share.count / V * V : 0;
        update<V, V == 8 ? 1 : 2>(to, 0, whole, n, rest);
        update<1, 4>(to, whole, share.count, n, rest);
    });
}

}  // namespace

void adamw_step_cuda(const TensorRows& rows, const AdamwStep& step, const Scalar& lr, const Scalar& m,
                     const CudaStream& where) {
    constexpr const char* kOp = "AdamW.step";
    const OnDevice guard(where.device, kOp);
    for_each_table<kRoles>(rows, [&](const AdamwTable& table, int chunks) {
        launch(kOp, adamw_kernel, chunks, where, table, step, lr, m);
    });
}

}  // namespace moco_fast
