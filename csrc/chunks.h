// Rows of tensors cut into chunks of equal size whatever the tensors' sizes, shared out over the CPU's
// threads.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "tensor_rows.h"

namespace moco_fast {

struct Chunk {
    int64_t row, begin, end;
};

inline std::vector<Chunk> chunks_of(const TensorRows& rows) {
    // 64 KB of fp32 per array: long enough for the prefetcher, short enough to balance a small model.
    constexpr int64_t kChunk = 16384;
    std::vector<Chunk> chunks;
    for (int64_t row = 0; row < int64_t(rows.size()); ++row)
        for (int64_t at = 0; at < rows[row].size; at += kChunk)
            chunks.push_back({row, at, std::min(at + kChunk, rows[row].size)});
    return chunks;
}

// visit(i, chunks[i]) for all i, in one parallel region.
template <class Visit>
void for_each_chunk(const std::vector<Chunk>& chunks, int threads, Visit visit) {
    int64_t total = 0;
    for (const Chunk& chunk : chunks) total += chunk.end - chunk.begin;
    const int64_t count = int64_t(chunks.size());
    // Below this many values one thread is done before the others wake, which on a busy machine takes
    // milliseconds.
    constexpr int64_t kParallelValues = 1 << 18;
#pragma omp parallel for num_threads(std::max(1, threads)) schedule(dynamic, 8) if (total > kParallelValues)
    for (int64_t i = 0; i < count; ++i) visit(i, chunks[i]);
}

}  // namespace moco_fast
