// Compiled with -ffp-contract=off: see the rounding promised in ema_update.h.
#include <stdexcept>
#include <type_traits>

#include "chunks.h"
#include "ema_update.h"

namespace moco_fast {
namespace {

// The rounded copy of a state that is its own target.
struct NoCopy {};

template <class State, class Source, class Copy>
void update(State* state, const Source* source, Copy* copy, const Chunk& chunk, float m, float rest) {
#pragma omp simd
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        from_float(to_float(state[i]) * m + to_float(source[i]) * rest, state[i]);
        if constexpr (!std::is_same_v<Copy, NoCopy>) from_float(to_float(state[i]), copy[i]);
    }
}

void update_f64(double* target, const double* source, const Chunk& chunk, double m, double rest) {
#pragma omp simd
    for (int64_t i = chunk.begin; i < chunk.end; ++i) target[i] = target[i] * m + source[i] * rest;
}

// visit(pointer) with a pointer to the type that dtype names, which is not f64.
template <class Visit>
void with_type(DType dtype, void* data, Visit visit) {
    switch (dtype) {
        case DType::f32:
            return visit(static_cast<float*>(data));
        case DType::bf16:
            return visit(static_cast<bf16_t*>(data));
        default:
            return visit(static_cast<f16_t*>(data));
    }
}

void update(const TensorRow& row, const Chunk& chunk, double m) {
    void *target = row.data[ema::kTarget], *source = row.data[ema::kSource], *master = row.data[ema::kMaster];
    const DType dtype = row.dtype[ema::kTarget];
    if (dtype == DType::f64)
        return update_f64(static_cast<double*>(target), static_cast<double*>(source), chunk, m, 1.0 - m);
    const float keep = float(m), rest = float(1.0 - m);
    with_type(row.dtype[ema::kSource], source, [&](auto* from) {
        with_type(dtype, target, [&](auto* to) {
            if (master)
                update(static_cast<float*>(master), from, to, chunk, keep, rest);
            else
                update(to, from, static_cast<NoCopy*>(nullptr), chunk, keep, rest);
        });
    });
}

}  // namespace

void ema::check(const TensorRows& rows) {
    for (const TensorRow& row : rows) {
        if (row.size < 0) throw std::invalid_argument("ema_update_: a tensor has a negative size");
        const bool f64 = row.dtype[kTarget] == DType::f64;
        if (f64 != (row.dtype[kSource] == DType::f64) ||
            (row.data[kMaster] && (f64 || row.dtype[kMaster] != DType::f32)))
            throw std::invalid_argument(
                "ema_update_: float64 mixes with float64 only, and a master is float32");
    }
}

void ema_update(const TensorRows& rows, double m, int threads) {
    ema::check(rows);
    for_each_chunk(chunks_of(rows), threads,
                   [&](int64_t, const Chunk& chunk) { update(rows[chunk.row], chunk, m); });
}

}  // namespace moco_fast
