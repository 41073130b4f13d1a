// The kernel of info_nce_sweep_cuda.cu; what each instruction does, in hopper.h.
//
// A block is one warp group that has the copy engine fetch tiles of the queue, and two that multiply. Those
// normalise their queries into shared memory while the first tiles are on their way, hold products and sums
// in registers, and read a tile twice: as keys, q.n, and as values, p n. While the matrix units do one tile's
// values and the next one's keys, the exponentials of the tile between are computed; of many queries the
// groups take turns, so that one computes exponentials while the other multiplies.
//
// A share of the queue has two sides, which take its tiles in turn and add what they found at the end, each
// for half of the columns:
//   few queries (64 per block)    the two groups of a block, over the same queries;
//   many queries (128 per block)  the blocks of a cluster of two, whose groups hold 64 queries each.
// So the sums that reach memory are half, and their order is fixed.
#pragma once

#include "hopper.h"
#include "info_nce_sweep.h"
#include "info_nce_sweep_block.h"

namespace moco_fast {
namespace {

using namespace hopper;

// Cosines become exponentials; what the sums so far are to be multiplied by, if kOnline.
template <bool kOnline, bool kStats>
__device__ __forceinline__ void exponentials(float (&s)[64], Found& found, float (&rescale)[2],
                                             const InfoNceSweep& args, const float (&pos)[2], int valid) {
    if constexpr (kStats) {
#pragma unroll
        for (int i = 0; i < 64; ++i) found.cosine[i / 2 % 2] += s[i];  // beyond the queue they are zero
    }
    if (valid < kTile) {
        const int column = int(threadIdx.x) % 4 * 2;
#pragma unroll
        for (int i = 0; i < 64; ++i)
            if (column + i / 4 * 8 + i % 2 >= valid) s[i] = -INFINITY;
    }
    if constexpr (kStats) {
#pragma unroll
        for (int i = 0; i < 64; ++i) found.above[i / 2 % 2] += s[i] > pos[i / 2 % 2];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if constexpr (kOnline) {
            float top = -INFINITY;
#pragma unroll
            for (int i = 0; i < 64; i += 4) top = fmaxf(top, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
            const float grown = fmaxf(found.shift[r], largest_of<4>(top) * args.scale - args.offset);
            rescale[r] = exp2_fast(found.shift[r] - grown);
            found.total[r] *= rescale[r];
            found.shift[r] = grown;
        }
        float total = 0;
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
#pragma unroll
            for (int j = i + 2 * r; j < i + 2 * r + 2; ++j) {
                s[j] = exp2_fast(fmaf(s[j], args.scale, -found.shift[r]));
                total += s[j];
            }
        }
        found.total[r] += total;
    }
}

template <bool kMany>
__device__ __forceinline__ void release(Ring<kMany>& ring, int tile) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(&ring.shared.empty[ring.stage(tile)]);
}

// One group's pass over the `tiles` that its block streams, of which the first is tile `first` of the queue.
template <class Type, bool kMany, bool kOnline, bool kStats>
__device__ __forceinline__ void walk(Found& found, Ring<kMany>& ring, int first, int tiles,
                                     const InfoNceSweep& args, const float (&pos)[2]) {
    const int group = int(threadIdx.x) / kGroup - 1;
    // Of many queries each group holds some and takes all tiles, two apart in the queue; of few both hold
    // all and take every second.
    const int begin = kMany ? 0 : group, step = kMany ? 1 : 2;
    const uint64_t q = matrix_at(ring.shared.q[0] + (kMany ? group * 64 * kBoxBytes : 0), 0);
    constexpr int kHalfQ = sizeof ring.shared.q[0];
    float s[64], rescale[2] = {1, 1};
    uint32_t p[32];

#pragma unroll
    for (int i = 0; i < 64; ++i) found.sums[i] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        found.total[r] = found.cosine[r] = 0;
        found.above[r] = 0;
        found.shift[r] = kOnline ? -INFINITY : args.fixed_shift;
    }

    const auto take_turn = [&] {
        if constexpr (kMany) sync_warps(1 + group, 2 * kGroup);
    };
    const auto pass_turn = [&](bool last) {
        if (kMany && !(last && group == 1)) arrive_warps(2 - group, 2 * kGroup);
    };
    const auto by_keys = [&](int tile) {
        const uint64_t keys = matrix_at(ring.shared.tiles[ring.stage(tile)][0], 0);
#pragma unroll
        for (int i = 0; i < kWidth / 16; ++i)
            rows_by_rows(Type{}, s, further(q, i / 4 * kHalfQ + i % 4 * 32),
                         further(keys, i / 4 * kHalfTile + i % 4 * 32), i > 0);
        commit_products();
    };
    const auto by_values = [&](int tile) {
        const uint64_t values = matrix_at(ring.shared.tiles[ring.stage(tile)][0], kHalfTile);
#pragma unroll
        for (int i = 0; i < kTile / 16; ++i)
            registers_by_columns(Type{}, found.sums, p + 4 * i, further(values, i * 16 * kBoxBytes));
        commit_products();
    };
    const auto exponentiate = [&](int tile) {
        const int64_t row = (first + int64_t(tile) * (kMany ? 2 : 1)) * kTile;
        const int64_t left = args.slots - row;
        exponentials<kOnline, kStats>(s, found, rescale, args, pos, int(left < kTile ? left : kTile));
    };
    const auto round_exponentials = [&] {
#pragma unroll
        for (int i = 0; i < 32; ++i) p[i] = Type::pair(s[2 * i], s[2 * i + 1]);
    };

    const auto await = [&](int tile) {
        if (tile < tiles) wait(&ring.shared.full[ring.stage(tile)], ring.turn(tile));
    };

    if (begin < tiles) {
        if (kMany && group == 1) arrive_warps(1, 2 * kGroup);  // the other group is first
        await(begin);
        take_turn();
        begin_products();
        by_keys(begin);
        pass_turn(begin + step >= tiles);
        wait_products<0>();
        written_by_products(s);
        exponentiate(begin);
        round_exponentials();
        await(begin + step);
        int before = begin;
        for (int tile = begin + step; tile < tiles; before = tile, tile += step) {
            take_turn();
            begin_products();
            by_keys(tile);
            by_values(before);
            pass_turn(tile + step >= tiles);
            wait_products<1>();
            written_by_products(s);
            exponentiate(tile);
            // Here, not above: ptxas moves no arithmetic across the loop that waits for a barrier, but it
            // would move all exponentials below the products that they are to run beside.
            written_by_products(s);
            await(tile + step);
            wait_products<0>();
            written_by_products(found.sums);
            release(ring, before);
            if constexpr (kOnline) {
#pragma unroll
                for (int i = 0; i < 64; ++i) found.sums[i] *= rescale[i / 2 % 2];
            }
            round_exponentials();
        }
        begin_products();
        by_values(before);
        wait_products<0>();
        written_by_products(found.sums);
        release(ring, before);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        found.total[r] = sum_over<4>(found.total[r]);
        found.cosine[r] = sum_over<4>(found.cosine[r]);
        found.above[r] = sum_over<4>(found.above[r]);
    }
}

// Whether a fixed shift did for the sums over so many rows of the queue.
__device__ __forceinline__ bool fits(const Found& found, int64_t rows, float least) {
    const float floor = least * float(rows);
    float size[4] = {found.total[0], found.total[1], 0, 0};  // four chains of additions
#pragma unroll
    for (int i = 0; i < 64; ++i) size[i % 4] += fabsf(found.sums[i]);
    return (size[0] + size[1]) + (size[2] + size[3]) < INFINITY && found.total[0] >= floor &&
           found.total[1] >= floor;
}

// Adds what the partner, the same thread of the other side, found: its half of the columns, [32 * side, 32 *
// side + 32) of the sums, which end up in the first 32.
template <bool kMany>
__device__ __forceinline__ void meet_partner(Found& found, Shared<kMany>& shared, int side) {
    float4* const own = reinterpret_cast<float4*>(shared.tiles[0][0]) + int(threadIdx.x) - kGroup;
    constexpr int kStride = 2 * kGroup;
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        float given[4];
#pragma unroll
        for (int j = i; j < i + 4; ++j) {
            given[j - i] = side ? found.sums[j] : found.sums[32 + j];
            found.sums[j] = side ? found.sums[32 + j] : found.sums[j];
        }
        own[i / 4 * kStride] = {given[0], given[1], given[2], given[3]};
    }
    own[8 * kStride] = {found.total[0], found.total[1], found.shift[0], found.shift[1]};
    own[9 * kStride] = {found.cosine[0], found.cosine[1], __int_as_float(found.above[0]),
                        __int_as_float(found.above[1])};
    const float4* partner;
    if constexpr (kMany) {
        sync_cluster();
        partner = shared_of(1 - side, own);
    } else {
        sync_warps(1, 2 * kGroup);
        partner = side ? own - kGroup : own + kGroup;
    }
    const float4 sizes = partner[8 * kStride], counts = partner[9 * kStride];
    const float total[2] = {sizes.x, sizes.y}, shift[2] = {sizes.z, sizes.w},
                cosine[2] = {counts.x, counts.y};
    const int above[2] = {__float_as_int(counts.z), __float_as_int(counts.w)};
    float scale[2], partner_scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float top = fmaxf(found.shift[r], shift[r]);
        scale[r] = exp2_fast(found.shift[r] - top);
        partner_scale[r] = exp2_fast(shift[r] - top);
        found.shift[r] = top;
        found.total[r] = found.total[r] * scale[r] + total[r] * partner_scale[r];
        found.cosine[r] += cosine[r];
        found.above[r] += above[r];
    }
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        const float4 taken = partner[i / 4 * kStride];
        found.sums[i] = found.sums[i] * scale[0] + taken.x * partner_scale[0];
        found.sums[i + 1] = found.sums[i + 1] * scale[0] + taken.y * partner_scale[0];
        found.sums[i + 2] = found.sums[i + 2] * scale[1] + taken.z * partner_scale[1];
        found.sums[i + 3] = found.sums[i + 3] * scale[1] + taken.w * partner_scale[1];
    }
}

template <bool kStats>
__device__ __forceinline__ void store(const Found& found, const InfoNceSweep& args, int64_t share,
                                      int64_t first_row, int side) {
    const int column = 64 * side + int(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t row = first_row + 8 * r;
        if (row >= args.n) continue;
        const int64_t at = share * args.n + row;
        if (column == 0) {
            args.totals[at] = found.total[r];
            args.shifts[at] = found.shift[r];
            if constexpr (kStats) {
                args.cosines[at] = found.cosine[r];
                args.ranks[at] = found.above[r];
            }
        }
        float* const sums = args.sums + at * args.features;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float2 pair = {found.sums[4 * i + 2 * r], found.sums[4 * i + 2 * r + 1]};
            if (column + 8 * i < args.features) *reinterpret_cast<float2*>(sums + column + 8 * i) = pair;
        }
    }
}

// Grid (blocks of queries, shares), or (blocks of queries, 2 * shares) in clusters of (1, 2).
template <class Type, bool kMany, bool kStats>
__global__ void __launch_bounds__(kThreads, 1)
    sweep(const __grid_constant__ CUtensorMap queue_rows, const __grid_constant__ InfoNceSweep args) {
    Shared<kMany>& shared = *reinterpret_cast<Shared<kMany>*>(dynamic_shared());
    constexpr int kQueries = Shared<kMany>::kQueries;
    const int thread = int(threadIdx.x), group = thread / kGroup - 1;
    const int share = int(kMany ? blockIdx.y / 2 : blockIdx.y);
    const int side = kMany ? int(blockIdx.y % 2) : group;

    // The tiles of a block: all of its share, or every second.
    const int64_t all = (args.slots + kTile - 1) / kTile;
    const int64_t begin = share * args.steps + (kMany ? side : 0);
    const int64_t end = (share + 1) * args.steps < all ? (share + 1) * args.steps : all;
    const int tiles = begin < end ? int(kMany ? (end - begin + 1) / 2 : end - begin) : 0;

    if (thread == 0) {
        prefetch(&queue_rows);
        for (int stage = 0; stage < kStages; ++stage) {
            init(&shared.full[stage], 1);
            init(&shared.empty[stage], kMany ? 8 : 4);  // warps that read a tile
        }
        publish_barriers();
    }
    __syncthreads();

    Ring<kMany> ring{shared};
    bool online = args.online;
    if (group < 0) {
        give_registers<24>();
        bool again = true;
        while (again) {
            if (thread == 0) {
                for (int tile = 0; tile < tiles; ++tile) {
                    const int stage = ring.stage(tile);
                    wait(&shared.empty[stage], 1 - ring.turn(tile));
                    arrive_expecting(&shared.full[stage], 2 * kHalfTile);
                    const int row = int(begin + int64_t(tile) * (kMany ? 2 : 1)) * kTile;
                    for (int half = 0; half < 2; ++half)
                        copy_box(shared.tiles[stage][half], &queue_rows, row, 64 * half, &shared.full[stage]);
                }
            }
            __syncwarp();
            ring.count += tiles;
            again = __syncthreads_or(false);
        }
        if constexpr (kMany) {
            sync_cluster();
            sync_cluster();
        }
    } else {
        take_registers<240>();
        cuda::with_type(args.dtype, [&](auto raw) {
            if constexpr (sizeof raw < 8) prepare<Type, decltype(raw), kMany, kStats>(shared, args);
        });
        const int here = (kMany ? group * 64 : 0) + thread % kGroup / 32 * 16 + thread % 32 / 4;
        const float pos[2] = {shared.pos[here], shared.pos[here + 8]};
        // Rows of the queue that this group walks: full tiles, but for the queue's last.
        const int walked = kMany ? tiles : (tiles - group + 1) / 2;
        const int64_t past = (begin + (kMany ? 2 * walked - 1 : group + 2 * walked - 1)) * kTile - args.slots;
        const int64_t rows = int64_t(walked) * kTile - (walked && past > 0 ? past : 0);
        Found found;
        bool again = true;
        while (again) {
            if (online)
                walk<Type, kMany, true, kStats>(found, ring, int(begin), tiles, args, pos);
            else
                walk<Type, kMany, false, kStats>(found, ring, int(begin), tiles, args, pos);
            ring.count += tiles;
            again = __syncthreads_or(!online && !fits(found, rows, args.least));
            online = true;
        }
        meet_partner<kMany>(found, shared, side);
        if constexpr (kMany) arrive_cluster();
        store<kStats>(found, args, share, int64_t(blockIdx.x) * kQueries + here, side);
        if constexpr (kMany) wait_cluster();  // before a block ends, its partner has read from it
    }
}

}  // namespace
}  // namespace moco_fast
