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

// A unit row, of which every lane of a warp holds four columns, and the norm it had.
struct UnitRow {
    float x[4] = {0, 0, 0, 0}, norm;
};

__device__ __forceinline__ UnitRow unit_row(const void* rows, int64_t row, const InfoNceSweep& args) {
    UnitRow unit;
    const int column = int(threadIdx.x) % 32 * 4;
    if (row < args.n && column < args.features) {
        cuda::with_type(args.dtype, [&](auto type) {
            using T = decltype(type);
            if constexpr (sizeof(T) < 8) {
                struct alignas(4 * sizeof(T)) Four {
                    T x[4];
                };
                const T* from = static_cast<const T*>(rows) + row * args.features + column;
                const Four four = *reinterpret_cast<const Four*>(from);
#pragma unroll
                for (int i = 0; i < 4; ++i) unit.x[i] = cuda::widen(four.x[i]);
            }
        });
    }
    float top = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) top = fmaxf(top, fabsf(unit.x[i]));
    top = largest_of<32>(top);
    const float scale = top > 0 && top < INFINITY ? top : 1.0f;  // squares do not overflow
#pragma unroll
    for (int i = 0; i < 4; ++i) squares += (unit.x[i] / scale) * (unit.x[i] / scale);
    unit.norm = scale * sqrtf(sum_over<32>(squares));
    const float divisor = unit.norm < 1e-12f ? 1e-12f : unit.norm;  // a NaN stays
#pragma unroll
    for (int i = 0; i < 4; ++i) unit.x[i] /= divisor;
    return unit;
}

// Normalises the queries of a block, all warps that multiply together. Of all blocks that hold them one
// writes what is known of them.
template <class Type, bool kMany, bool kStats>
__device__ __forceinline__ void prepare(Shared<kMany>& shared, const InfoNceSweep& args) {
    constexpr int kQueries = Shared<kMany>::kQueries, kRows = kQueries / 8;
    const int warp = (int(threadIdx.x) - kGroup) / 32, lane = int(threadIdx.x) % 32;
    const bool writes = blockIdx.y == 0;
#pragma unroll 4
    for (int i = 0; i < kRows; ++i) {
        const int here = warp * kRows + i;
        const int64_t row = int64_t(blockIdx.x) * kQueries + here;
        const UnitRow q = unit_row(args.q, row, args);
        // Swizzled as matrix_at() has it: 16 lanes write half of the row, two of them 16 bytes.
        const int at = here * kBoxBytes + ((lane % 16 / 2) ^ (here % 8)) * 16 + lane % 2 * 8;
        const uint2 rounded = {Type::pair(q.x[0], q.x[1]), Type::pair(q.x[2], q.x[3])};
        *reinterpret_cast<uint2*>(shared.q[lane / 16] + at) = rounded;
        if (kStats || writes) {
            const UnitRow k = unit_row(args.k, row, args);
            float pos = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) pos += q.x[j] * k.x[j];
            pos = sum_over<32>(pos);
            if (lane == 0) {
                shared.pos[here] = pos;
                if (writes && row < args.n) {
                    args.q_norm[row] = q.norm;
                    args.k_norm[row] = k.norm;
                    args.pos[row] = pos;
                }
            }
        }
    }
    publish_writes();
    sync_warps(3, 2 * kGroup);
}

}  // namespace
}  // namespace moco_fast
