// Compiled with -ffp-contract=off: see the rounding promised in ema_update.h.
#include <algorithm>
#include <stdexcept>

#include "ema_update.h"
#include "parallel.h"

namespace moco_fast {
namespace {

// 64 KB of fp32 per array: long enough for the prefetcher, short enough to balance a small model.
constexpr int64_t kChunk = 16384;
// One cache line of fp32, and how far ahead lines are asked for: the hardware stops at every 4 KB page.
constexpr int64_t kBlock = 16, kAhead = 512;

struct Chunk {
    const EmaPair* pair;
    int64_t begin, end;
};

template <class T, class S>
void update(const Chunk& chunk, float m, float rest) {
    T* target = static_cast<T*>(chunk.pair->target);
    const S* source = static_cast<const S*>(chunk.pair->source);
    for (int64_t block = chunk.begin; block < chunk.end; block += kBlock) {
        __builtin_prefetch(target + block + kAhead, 1);
        __builtin_prefetch(source + block + kAhead, 0);
        const int64_t end = std::min(block + kBlock, chunk.end);
#pragma omp simd
        for (int64_t i = block; i < end; ++i)
            from_float(to_float(target[i]) * m + to_float(source[i]) * rest, target[i]);
    }
}

void update_f64(const Chunk& chunk, double m, double rest) {
    double* target = static_cast<double*>(chunk.pair->target);
    const double* source = static_cast<const double*>(chunk.pair->source);
#pragma omp simd
    for (int64_t i = chunk.begin; i < chunk.end; ++i) target[i] = target[i] * m + source[i] * rest;
}

template <class T>
void update_from(const Chunk& chunk, float m, float rest) {
    switch (chunk.pair->source_dtype) {
        case DType::f32:
            return update<T, float>(chunk, m, rest);
        case DType::bf16:
            return update<T, bf16_t>(chunk, m, rest);
        default:
            return update<T, f16_t>(chunk, m, rest);
    }
}

void update(const Chunk& chunk, double m) {
    switch (chunk.pair->target_dtype) {
        case DType::f64:
            return update_f64(chunk, m, 1.0 - m);
        case DType::f32:
            return update_from<float>(chunk, float(m), float(1.0 - m));
        case DType::bf16:
            return update_from<bf16_t>(chunk, float(m), float(1.0 - m));
        default:
            return update_from<f16_t>(chunk, float(m), float(1.0 - m));
    }
}

}  // namespace

void ema_update(const std::vector<EmaPair>& pairs, double m, int threads) {
    std::vector<Chunk> chunks;
    int64_t total = 0;
    for (const EmaPair& pair : pairs) {
        if (pair.size < 0) throw std::invalid_argument("ema_update: a tensor has a negative size");
        if ((pair.target_dtype == DType::f64) != (pair.source_dtype == DType::f64))
            throw std::invalid_argument("ema_update: float64 mixes with float64 only");
        total += pair.size;
        for (int64_t at = 0; at < pair.size; at += kChunk)
            chunks.push_back({&pair, at, std::min(at + kChunk, pair.size)});
    }
    const int64_t count = int64_t(chunks.size());
    // Below this many values one thread is done before the others wake, which on a busy machine takes
    // milliseconds.
    constexpr int64_t kParallelValues = 1 << 18;
#pragma omp parallel for num_threads(std::max(1, threads)) schedule(dynamic, 8) if (total > kParallelValues)
    for (int64_t i = 0; i < count; ++i) update(chunks[i], m);
}

}  // namespace moco_fast
