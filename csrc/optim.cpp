// The optimizers on the CPU: cutting the work, and the instruction set.
#include <stdexcept>

#include "chunks.h"
#include "cpu_features.h"
#include "optim_isa.h"

namespace moco_fast {
namespace {

// What every tensor's update is multiplied by: sums of chunks, added in their order whatever thread made
// them.
std::vector<double> trust_ratios(const TensorRows& rows, const std::vector<Chunk>& chunks,
                                 const SgdStep& step, int threads) {
    std::vector<double> ratios(rows.size(), 1.0);
    if (step.trust == 0) return ratios;
    const auto squares = &MOCO_FAST_SELECTED(sgd_squares);
    std::vector<double> parts(2 * chunks.size()), sums(2 * rows.size(), 0.0);
    for_each_chunk(chunks, threads, [&](int64_t i, const Chunk& chunk) {
        squares(rows[chunk.row], chunk.begin, chunk.end, step, &parts[2 * i]);
    });
    for (std::size_t i = 0; i < parts.size(); ++i) sums[2 * chunks[i / 2].row + i % 2] += parts[i];
    for (std::size_t row = 0; row < rows.size(); ++row)
        ratios[row] = sgd::trust_ratio(step.trust, sums[2 * row], sums[2 * row + 1]);
    return ratios;
}

}  // namespace

void sgd_step(const TensorRows& rows, const SgdStep& step, double lr, double m, int threads) {
    const std::vector<Chunk> chunks = chunks_of(rows);
    const std::vector<double> ratios = trust_ratios(rows, chunks, step, threads);
    const auto update = &MOCO_FAST_SELECTED(sgd_chunk);
    for_each_chunk(chunks, threads, [&](int64_t, const Chunk& chunk) {
        update(rows[chunk.row], chunk.begin, chunk.end, step, lr, ratios[chunk.row], m);
    });
}

void adamw_step(const TensorRows& rows, const AdamwStep& step, double lr, double m, int threads) {
    const auto update = &MOCO_FAST_SELECTED(adamw_chunk);
    for_each_chunk(chunks_of(rows), threads, [&](int64_t, const Chunk& chunk) {
        update(rows[chunk.row], chunk.begin, chunk.end, step, lr, m);
    });
}

}  // namespace moco_fast
