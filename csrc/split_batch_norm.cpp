// split_batch_norm on the CPU: cutting parts into tiles, joining their sums, and the instruction set.
#include "split_batch_norm.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "memory.h"
#include "parallel.h"
#include "split_batch_norm_isa.h"

namespace moco_fast {
namespace {

// Parts cut into tiles, by the shape alone.
struct Tiles {
    // Values of a channel in a tile: long enough that joining tiles costs nothing, short enough for sums in
    // fp32, of which channels that lie together have one chain per value of a vector and positions have
    // several.
    static constexpr int64_t kTogether = 256, kApart = 1024;

    PartsShape shape;
    int64_t rows, run;  // of a whole tile
    int64_t along, per_part;

    explicit Tiles(const PartsShape& s) : shape(s) {
        if (s.parts < 1 || s.rows < 1 || s.channels < 1 || s.run < 1 || s.dtype == DType::f64)
            throw std::invalid_argument("split_batch_norm: no kernel for " + std::to_string(s.parts) +
                                        " parts of " + std::to_string(s.rows) + " x " +
                                        std::to_string(s.channels) + " x " + std::to_string(s.run));
        const int64_t least = (s.run + kApart - 1) / kApart;
        // Of nearly equal lengths and whole vectors of any instruction set.
        run = std::min(s.run, ((s.run + least - 1) / least + 15) / 16 * 16);
        rows = s.run == 1 ? kTogether : std::max<int64_t>(1, kApart / s.run);
        along = (s.run + run - 1) / run;
        per_part = (s.rows + rows - 1) / rows * along;
    }

    int64_t count() const { return shape.parts * per_part; }
    std::size_t bytes() const {
        return std::size_t(shape.parts * shape.channels * values() * bytes_of(shape.dtype));
    }
    int64_t values() const { return shape.rows * shape.run; }  // of a channel in a part

    int64_t rows_of(int64_t tile) const { return std::min(rows, shape.rows - row(tile)); }
    int64_t run_of(int64_t tile) const { return std::min(run, shape.run - position(tile)); }

    NormTile at(int64_t index, const void* x, const void* dy, void* out) const {
        const int64_t part = index / per_part, tile = index % per_part, stride = shape.channels * shape.run;
        const int64_t bytes = bytes_of(shape.dtype);
        const int64_t first = ((part * shape.rows + row(tile)) * stride + position(tile)) * bytes;
        const auto from = [first](const void* p) {
            return p ? static_cast<const char*>(p) + first : nullptr;
        };
        return {shape.dtype,  rows_of(tile), shape.channels,
                run_of(tile), stride,        shape.run,
                from(x),      from(dy),      out ? static_cast<char*>(out) + first : nullptr};
    }

  private:
    int64_t row(int64_t tile) const { return tile / along * rows; }
    int64_t position(int64_t tile) const { return tile % along * run; }
};

// Below this many values one thread is done before the others wake.
constexpr int64_t kParallelValues = 1 << 17;

int threads_for(const PartsShape& s, int threads) {
    return s.parts * s.rows * s.run * s.channels > kParallelValues ? std::max(1, threads) : 1;
}

}  // namespace

void split_batch_norm(const SplitBatchNorm& a) {
    const Tiles tiles(a.shape);
    const NormIsa& isa = MOCO_FAST_SELECTED(kNorm);
    const int64_t channels = a.shape.channels, parts = a.shape.parts, count = tiles.count();
    const auto found = make_scratch<double>(2 * count * channels);  // per tile: means, squares
    const auto joined = make_scratch<double>(2 * parts * channels);
    const auto factors = make_scratch<float>(2 * parts * channels);  // per part: scale, offset

    expect_writes(a.y, tiles.bytes());
#pragma omp parallel num_threads(threads_for(a.shape, a.threads))
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            double* into = &found[2 * i * channels];
            isa.statistics(tiles.at(i, a.x, nullptr, nullptr), into, into + channels);
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; ++part) {
            const double* first = &found[2 * part * tiles.per_part * channels];
            double *mean = &joined[2 * part * channels], *squares = mean + channels;
            std::fill(mean, squares + channels, 0.0);
            for (int64_t i = 0; i < tiles.per_part; ++i) {
                const double share = double(tiles.rows_of(i) * tiles.run_of(i)) / double(tiles.values());
                const double* tile = first + 2 * i * channels;
                for (int64_t c = 0; c < channels; ++c) mean[c] += share * tile[c];
            }
            for (int64_t i = 0; i < tiles.per_part; ++i) {
                const double size = double(tiles.rows_of(i) * tiles.run_of(i));
                const double* tile = first + 2 * i * channels;
                for (int64_t c = 0; c < channels; ++c) {
                    const double off = tile[c] - mean[c];
                    squares[c] += tile[channels + c] + size * off * off;
                }
            }
            float *scale = &factors[2 * part * channels], *offset = scale + channels;
            for (int64_t c = 0; c < channels; ++c) {
                const double var = squares[c] / double(tiles.values());
                a.mean[part * channels + c] = float(mean[c]);
                a.var[part * channels + c] = float(var);
                scale[c] = float((a.weight ? a.weight[c] : 1.0) / std::sqrt(var + a.eps));
                offset[c] = a.bias ? a.bias[c] : 0.0f;
            }
        }
        // From the end, which the first pass read last: what fits is still in the cache.
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t tile = count - 1 - i, part = tile / tiles.per_part;
            const float* scale = &factors[2 * part * channels];
            isa.normalise(tiles.at(tile, a.x, nullptr, a.y),
                          {a.mean + part * channels, scale, nullptr, scale + channels});
        }
    }
}

void split_batch_norm_backward(const SplitBatchNormBackward& a) {
    const Tiles tiles(a.shape);
    const NormIsa& isa = MOCO_FAST_SELECTED(kNorm);
    const int64_t channels = a.shape.channels, parts = a.shape.parts, count = tiles.count();
    const auto found = make_scratch<double>(2 * count * channels);   // per tile: sums of dy and dy (x - mean)
    const auto joined = make_scratch<double>(2 * parts * channels);  // per part: shares of db and dw
    const auto factors = make_scratch<float>(3 * parts * channels);  // per part: scale, slope, offset

    expect_writes(a.dx, tiles.bytes());
#pragma omp parallel num_threads(threads_for(a.shape, a.threads))
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            double* into = &found[2 * i * channels];
            isa.sums(tiles.at(i, a.x, a.dy, nullptr), a.mean + i / tiles.per_part * channels, into,
                     into + channels);
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; ++part) {
            double* both = &joined[2 * part * channels];
            std::fill(both, both + 2 * channels, 0.0);
            for (int64_t i = 0; i < tiles.per_part; ++i) {
                const double* tile = &found[2 * (part * tiles.per_part + i) * channels];
                for (int64_t c = 0; c < 2 * channels; ++c) both[c] += tile[c];
            }
            float* scale = &factors[3 * part * channels];
            for (int64_t c = 0; c < channels; ++c) {
                const double inverse = 1.0 / std::sqrt(double(a.var[part * channels + c]) + a.eps);
                const double factor = (a.weight ? a.weight[c] : 1.0) * inverse;
                const double values = double(tiles.values());
                both[channels + c] *= inverse;
                scale[c] = float(factor);
                scale[channels + c] = float(-factor * inverse * both[channels + c] / values);
                scale[2 * channels + c] = float(-factor * both[c] / values);
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            double sums[2] = {0, 0};
            for (int64_t part = 0; part < parts; ++part)
                for (int i = 0; i < 2; ++i) sums[i] += joined[(2 * part + i) * channels + c];
            a.db[c] = float(sums[0]);
            a.dw[c] = float(sums[1]);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t tile = count - 1 - i, part = tile / tiles.per_part;
            const float* scale = &factors[3 * part * channels];
            isa.gradient(tiles.at(tile, a.x, a.dy, a.dx),
                         {a.mean + part * channels, scale, scale + channels, scale + 2 * channels});
        }
    }
}

}  // namespace moco_fast
