// See sgd.h; how one launch serves all tensors, in multi_tensor_cuda.h.
#include "multi_tensor_cuda.h"
#include "sgd.h"

namespace moco_fast {
namespace {

using namespace cuda;
using namespace sgd;

using SgdTable = Table<kRoles>;

// Sums of two values over the block, for every thread; in an order that does not change.
__device__ __forceinline__ void sum_over_block(double& a, double& b) {
    __shared__ double parts[2][kThreads / 32];
    __syncthreads();  // of a sum before this one every thread has read the parts
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        a += __shfl_xor_sync(0xffffffffu, a, offset);
        b += __shfl_xor_sync(0xffffffffu, b, offset);
    }
    if (threadIdx.x % 32 == 0) {
        parts[0][threadIdx.x / 32] = a;
        parts[1][threadIdx.x / 32] = b;
    }
    __syncthreads();
    a = b = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) {
        a += parts[0][warp];
        b += parts[1][warp];
    }
}

// First pass of LARS: parts[2 * chunk], parts[2 * chunk + 1] are the squares of param and of d.
__global__ void __launch_bounds__(kThreads)
    sgd_squares_kernel(const __grid_constant__ SgdTable table, const __grid_constant__ SgdStep step,
                       double* parts) {
    const Share share = share_of_block(table);
    double params = 0, updates = 0;
    with_type(DType(table.dtype[kParam][share.tensor]), [&](auto type) {
        using T = decltype(type);
        using C = Compute<T>;
        const Numbers<C> n = numbers<C>(step, 0.0);
        const T *param = at<const T>(table, kParam, share), *grad = at<const T>(table, kGrad, share);
#pragma unroll 4
        for (int i = int(threadIdx.x); i < share.count; i += kThreads) {
            const C p = widen(param[i]);
            const double wide = double(p), d = double(decayed(p, widen(grad[i]), n));
            params += wide * wide;
            updates += d * d;
        }
    });
    sum_over_block(params, updates);
    if (threadIdx.x == 0) {
        parts[2 * int64_t(blockIdx.x)] = params;
        parts[2 * int64_t(blockIdx.x) + 1] = updates;
    }
}

// Every block adds all parts of its tensor again, which costs less than a launch in between: as many bytes as
// it updates only from 2^26 elements per tensor on.
__device__ __forceinline__ double trust_of(const SgdTable& table, const Share& share, double trust,
                                           const double* parts) {
    double params = 0, updates = 0;
    const double* own = parts + 2 * int64_t(table.first[share.tensor]);
    const int64_t chunks = (table.size[share.tensor] + kChunk - 1) / kChunk;
    for (int64_t i = threadIdx.x; i < chunks; i += kThreads) {
        params += own[2 * i];
        updates += own[2 * i + 1];
    }
    sum_over_block(params, updates);
    return trust_ratio(trust, params, updates);
}

template <class T>
struct Pointers {
    T* param;
    const T* grad;
    T *buffer, *key;
};

template <int V, int U, class T, class C>
__device__ __forceinline__ void update(const Pointers<T>& to, int begin, int count, const Numbers<C>& n,
                                       C ratio, const Complement<C>& m) {
    for (int base = begin + int(threadIdx.x) * V; base < count; base += kThreads * V * U) {
        T param[U][V], grad[U][V], buffer[U][V] = {}, key[U][V] = {};
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads * V;
            if (i >= count) break;
            load(to.param + i, param[u]);
            load<true>(to.grad + i, grad[u]);
            if (to.buffer && !n.first) load(to.buffer + i, buffer[u]);
            if (to.key) load(to.key + i, key[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int i = base + u * kThreads * V;
            if (i >= count) break;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const C p = widen(param[u][v]);
                C d = rounded::mul(ratio, decayed(p, C(widen(grad[u][v])), n));
                if (to.buffer) {
                    C state = widen(buffer[u][v]);
                    d = with_momentum(d, state, n);
                    narrow(state, buffer[u][v]);
                }
                narrow(rounded::fma(-n.lr, d, p), param[u][v]);
                narrow(rounded::ema(C(widen(key[u][v])), C(widen(param[u][v])), m.value, m.rest), key[u][v]);
            }
            store(to.param + i, param[u]);
            if (to.buffer) store(to.buffer + i, buffer[u]);
            if (to.key) store(to.key + i, key[u]);
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    sgd_kernel(const __grid_constant__ SgdTable table, const __grid_constant__ SgdStep step,
               const __grid_constant__ Scalar lr, const __grid_constant__ Scalar m, const double* parts) {
    const Share share = share_of_block(table);
    const double ratio = step.trust > 0 ? trust_of(table, share, step.trust, parts) : 1.0;
    const bool vectors = aligned<kRoles>(table, share.tensor);
    with_type(DType(table.dtype[kParam][share.tensor]), [&](auto type) {
        using T = decltype(type);
        using C = Compute<T>;
        constexpr int V = 16 / sizeof(T);
        const Pointers<T> to{at<T>(table, kParam, share), at<const T>(table, kGrad, share),
                             at<T>(table, kBuffer, share), at<T>(table, kKey, share)};
        const Numbers<C> n = numbers<C>(step, value_of(lr));
        const Complement<C> rest = complement<C>(m);
        const int whole = vectors ? share.count / V * V : 0;
        update<V, 2>(to, 0, whole, n, C(ratio), rest);
        update<1, 4>(to, whole, share.count, n, C(ratio), rest);
    });
}

}  // namespace

void sgd_step_cuda(const TensorRows& rows, const SgdStep& step, const Scalar& lr, const Scalar& m,
                   double* scratch, const CudaStream& where) {
    const char* const op = step.trust > 0 ? "LARS.step" : "SGD.step";
    const OnDevice guard(where.device, op);
    // Tables share the scratch: the stream runs their launches one after the other.
    for_each_table<kRoles>(rows, [&](const SgdTable& table, int chunks) {
        if (step.trust > 0) launch(op, sgd_squares_kernel, chunks, where, table, step, scratch);
        launch(op, sgd_kernel, chunks, where, table, step, lr, m, scratch);
    });
}

int64_t sgd_scratch_cuda(const TensorRows& rows) {
    int64_t chunks = 0;
    for (const TensorRow& row : rows) chunks += chunks_of(row.size);
    return 2 * chunks;
}

}  // namespace moco_fast
