// What a block of info_nce_sweep_kernel.h holds, and how its queries get there.
#pragma once

#include "dtype_cuda.h"
#include "hopper.h"
#include "info_nce_sweep.h"

namespace moco_fast {
namespace {

using namespace hopper;

constexpr int kTile = InfoNceSweep::kTile, kWidth = InfoNceSweep::kWidth;
constexpr int kGroup = 128;                   // threads of a warp group
constexpr int kThreads = 3 * kGroup;          // fetching, and two that multiply
constexpr int kBoxBytes = 128;                // of a row in shared memory: half of its columns
constexpr int kHalfTile = kTile * kBoxBytes;  // bytes
constexpr int kStages = 6;
static_assert(kStages >= 5);    // of few queries a group holds two tiles, two apart, while it awaits the next
constexpr int kExchanged = 40;  // values of a thread for its partner

template <bool kMany>
struct Shared {
    static constexpr int kQueries = kMany ? 128 : 64;
    char q[2][kQueries * kBoxBytes];
    char tiles[kStages][2][kHalfTile];
    float pos[kQueries];
    Barrier full[kStages], empty[kStages];
};
template <bool kMany>
constexpr int kSharedBytes = sizeof(Shared<kMany>);
static_assert(kSharedBytes<true> <= 227 * 1024 && kExchanged * 2 * kGroup * 4 <= kStages * 2 * kHalfTile);

// The ring of tiles in shared memory, and how many went through it.
template <bool kMany>
struct Ring {
    Shared<kMany>& shared;
    int count = 0;

    __device__ __forceinline__ int stage(int tile) const { return (count + tile) % kStages; }
    __device__ __forceinline__ int turn(int tile) const { return (count + tile) / kStages & 1; }
};

// What a thread knows of two queries, `row` and `row + 8`, from the tiles of its side.
struct Found {
    float sums[64];  // columns 8 i + 2 (lane % 4) + {0, 1} of the first query, then of the second, for each i
    float total[2], shift[2], cosine[2];
    int above[2];
};

// Over `kLanes` neighbours of a warp.
template <int kLanes, class T>
__device__ __forceinline__ T sum_over(T x) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

template <int kLanes>
__device__ __forceinline__ float largest_of(float x) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}

// Rows that a warp normalises at a time, so that they wait for memory and for one another's lanes together.
constexpr int kBatch = 8;

// Unit rows, of which every lane of a warp holds four columns, and the norms they had.
struct UnitRows {
    float x[kBatch][4], norm[kBatch];
};

template <class Raw>
__device__ __forceinline__ void load(UnitRows& rows, const void* from, int64_t first,
                                     const InfoNceSweep& args) {
    struct alignas(4 * sizeof(Raw)) Four {
        Raw x[4];
    };
    const int column = int(threadIdx.x) % 32 * 4;
    Four loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        loaded[i] = Four{};
        const Raw* at = static_cast<const Raw*>(from) + (first + i) * args.features + column;
        if (first + i < args.n && column < args.features) loaded[i] = *reinterpret_cast<const Four*>(at);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) rows.x[i][j] = cuda::widen(loaded[i].x[j]);
}

// No branches and no divisions by element: row after row would wait.
__device__ __forceinline__ void normalise(UnitRows& rows) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
        float (&x)[4] = rows.x[i];
        const float top =
            largest_of<32>(fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3]))));
        // By an exact power of two, where squares would leave the range of fp32.
        const bool large = top > 0x1p60f && top < INFINITY, small = top < 0x1p-50f;
        const float up = large ? 0x1p-70f : small ? 0x1p100f : 1.0f;
        const float down = large ? 0x1p70f : small ? 0x1p-100f : 1.0f;
        float squares = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) squares += (x[j] * up) * (x[j] * up);
        const float norm = root_fast(sum_over<32>(squares)) * down;
        const float inverse = reciprocal_fast(norm < 1e-12f ? 1e-12f : norm);  // a NaN stays
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] *= inverse;
        rows.norm[i] = norm;
    }
}

// Normalises the queries of a block, all warps that multiply together. What is known of them is written by
// one of the blocks that hold them, another for every batch of rows.
template <class Type, class Raw, bool kMany, bool kStats>
__device__ __forceinline__ void prepare(Shared<kMany>& shared, const InfoNceSweep& args) {
    constexpr int kQueries = Shared<kMany>::kQueries;
    const int lane = int(threadIdx.x) % 32;
    for (int batch = (int(threadIdx.x) - kGroup) / 32 * (kQueries / 64), end = batch + kQueries / 64;
         batch < end; ++batch) {
        const int64_t first = int64_t(blockIdx.x) * kQueries + batch * kBatch;
        const bool writes = batch % int(gridDim.y) == int(blockIdx.y);
        UnitRows q, k;
        load<Raw>(q, args.q, first, args);
        if (kStats || writes) load<Raw>(k, args.k, first, args);
        normalise(q);
        // Swizzled as matrix_at() has it: 16 lanes write half of a row, two of them 16 bytes.
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int at = (batch * kBatch + i) * kBoxBytes + ((lane % 16 / 2) ^ i) * 16 + lane % 2 * 8;
            const uint2 rounded = {Type::pair(q.x[i][0], q.x[i][1]), Type::pair(q.x[i][2], q.x[i][3])};
            *reinterpret_cast<uint2*>(shared.q[lane / 16] + at) = rounded;
        }
        if (kStats || writes) {
            normalise(k);
            float own = 0, q_norm = 0, k_norm = 0;  // the first lanes write a row's each
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                float pos = 0;
#pragma unroll
                for (int j = 0; j < 4; ++j) pos += q.x[i][j] * k.x[i][j];
                pos = sum_over<32>(pos);
                own = lane == i ? pos : own;
                q_norm = lane == i ? q.norm[i] : q_norm;
                k_norm = lane == i ? k.norm[i] : k_norm;
            }
            if (lane < kBatch) shared.pos[batch * kBatch + lane] = own;
            if (writes && lane < kBatch && first + lane < args.n) {
                args.q_norm[first + lane] = q_norm;
                args.k_norm[first + lane] = k_norm;
                args.pos[first + lane] = own;
            }
        }
    }
    publish_writes();
    // Of many queries a group reads those that its own warps wrote.
    if constexpr (kMany)
        sync_warps(2 + int(threadIdx.x) / kGroup, kGroup);
    else
        sync_warps(3, 2 * kGroup);
}

}  // namespace
}  // namespace moco_fast
