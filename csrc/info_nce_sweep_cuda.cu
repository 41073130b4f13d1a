// See info_nce_sweep.h.
#include <cuda.h>

#include "info_nce_sweep_kernel.h"
#include "launch_cuda.h"

namespace moco_fast {
namespace {

using namespace cuda;

constexpr const char* kOp = "info_nce";

// cuTensorMapEncodeTiled, from the driver that the runtime found: nothing links against it.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static const auto encoder = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                                  cudaEnableDefault, &result);
#else
        const cudaError_t code =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        check(code, kOp, "cudaGetDriverEntryPoint");
        if (!found) throw std::runtime_error("info_nce: the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    }();
    return encoder;
}

// Boxes of kTile rows and 64 columns of the queue, as hopper::matrix_at() describes them.
CUtensorMap queue_rows(const InfoNceSweep& args) {
    CUtensorMap map;
    const cuuint64_t sizes[] = {cuuint64_t(args.features), cuuint64_t(args.slots)};
    const cuuint64_t pitch[] = {cuuint64_t(2 * args.features)};
    const cuuint32_t box[] = {64, kTile}, steps[] = {1, 1};
    const CUresult code = tensor_map_encoder()(
        &map, args.operand == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2, const_cast<void*>(args.queue), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS)
        throw std::runtime_error("info_nce: cuTensorMapEncodeTiled: error " + std::to_string(int(code)));
    return map;
}

template <class Type, bool kMany, bool kStats>
void launch_sweep(const InfoNceSweep& args, const CudaStream& where) {
    const auto kernel = sweep<Type, kMany, kStats>;
    // Every time: it also gives a thread that is new to CUDA the context that the driver's encoder needs.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<kMany>), kOp,
          "cudaFuncSetAttribute");
    constexpr int kQueries = Shared<kMany>::kQueries;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = cluster.val.clusterDim.z = 1;
    cluster.val.clusterDim.y = kMany ? 2 : 1;
    cudaLaunchConfig_t config{};
    config.gridDim =
        dim3(unsigned((args.n + kQueries - 1) / kQueries), unsigned(kMany ? 2 * args.shares : args.shares));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes<kMany>;
    config.stream = static_cast<cudaStream_t>(where.stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, queue_rows(args), args), kOp, "cudaLaunchKernelEx");
}

template <class Type, bool kMany>
void launch_sweep(const InfoNceSweep& args, const CudaStream& where) {
    return args.ranks ? launch_sweep<Type, kMany, true>(args, where)
                      : launch_sweep<Type, kMany, false>(args, where);
}

template <class Type>
void launch_sweep(const InfoNceSweep& args, const CudaStream& where) {
    return args.n > InfoNceSweep::kFew ? launch_sweep<Type, true>(args, where)
                                       : launch_sweep<Type, false>(args, where);
}

}  // namespace

void info_nce_sweep_cuda(const InfoNceSweep& args, const CudaStream& where) {
    const OnDevice guard(where.device, kOp);
    return args.operand == DType::f16 ? launch_sweep<F16>(args, where) : launch_sweep<Bf16>(args, where);
}

}  // namespace moco_fast
