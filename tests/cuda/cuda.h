// The part of CUDA's driver interface that describes matrices to the copy engine, on the CPU.
#pragma once

#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

// Rows of 16-bit values, of which boxes are copied, swizzled.
struct CUtensorMap {
    const char* rows;
    uint64_t columns, count, pitch;
    uint32_t box_columns, box_rows;
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* rows,
                                       const cuuint64_t* sizes, const cuuint64_t* pitch,
                                       const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
    const bool possible = rank == 2 && reinterpret_cast<uintptr_t>(rows) % 16 == 0 && pitch[0] % 16 == 0 &&
                          sizes[0] > 0 && sizes[1] > 0 && box[0] * 2 <= 128 && box[1] <= 256 &&
                          steps[0] == 1 && steps[1] == 1 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    if (!possible) return CUDA_ERROR_INVALID_VALUE;
    *map = {static_cast<const char*>(rows), sizes[0], sizes[1], pitch[0], box[0], box[1]};
    return CUDA_SUCCESS;
}
