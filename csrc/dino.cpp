// dino around its inner loops: cutting the prototypes, packing, adding the parts in order, loss and gradient.
#include "dino.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "cpu_features.h"
#include "dino_isa.h"
#include "memory.h"
#include "parallel.h"
#include "softmax_loss.h"
#include "unit_rows.h"

namespace moco_fast {
namespace {

// Maximum, and sum of exponentials above it, of a row over all prototypes, from those of the runs.
struct Softmax {
    double max = -std::numeric_limits<double>::infinity(), sum = 0, cross = 0;

    void add(float run_max, float run_sum, double run_cross, double temperature) {
        const double top = run_max > max ? run_max : max;
        const double scale = std::exp((max - top) / temperature);
        const double run_scale = std::exp((run_max - top) / temperature);
        sum = sum * scale + run_sum * run_scale;
        cross = cross * scale + run_cross * run_scale;
        max = top;
    }
};

}  // namespace

void dino(const Dino& a) {
    const double student_t = a.student_temperature, teacher_t = a.teacher_temperature;
    if (!(student_t > 0 && std::isfinite(student_t) && teacher_t > 0 && std::isfinite(teacher_t)))
        throw std::invalid_argument("dino: temperatures must be positive and finite");
    if (a.count < 1 || a.prototypes_dtype == DType::f64 || a.teacher_prototypes_dtype == DType::f64)
        throw std::invalid_argument("dino: there must be a prototype, and none of f64");
    const DinoIsa& isa = MOCO_FAST_SELECTED(kDino);
    const int threads = a.rows * a.count * a.features < kParallelProducts ? 1 : std::max(1, a.threads);
    const int64_t features = a.features, panel = isa.panel;
    const UnitRows student(a.student, a.rows_dtype, 1, a.rows, features, threads);
    const UnitRows teacher(a.teacher, a.rows_dtype, 1, a.rows, features, threads);

    // Runs of prototypes: enough to balance any usual number of cores, few enough that their sums stay
    // smaller than the logits.
    const int64_t tiles = ceil_div(a.count, isa.tile);
    const int64_t wanted = std::min(tiles, std::clamp<int64_t>(a.count / (2 * features), 8, 32));
    const int64_t run_tiles = ceil_div(tiles, wanted);
    const int64_t runs = ceil_div(tiles, run_tiles), run = run_tiles * isa.tile;
    const int64_t panels = ceil_div(a.rows, panel), rows = panels * panel;
    const int64_t width = ceil_div(features, panel) * panel, scores = isa.tile * panel;
    const bool gradient = a.ds || a.dw;

    const auto student_panels = make_scratch<float>(rows * features);
    const auto teacher_panels = make_scratch<float>(rows * features);
    const auto columns = make_scratch<float>(a.dw ? rows * width : 0);
    const auto state = make_scratch<float>(6 * runs * rows);
    const auto found = make_scratch<float>(4 * rows);
    const auto sums = make_scratch<float>(a.ds ? runs * rows * features : 0);
    const int64_t per_thread = (isa.group + 1) * scores + 2 * isa.tile * features + isa.tile * width;
    const auto scratch = make_scratch<float>(threads * per_thread);

    expect_writes(a.dw, a.count * features * sizeof(float));
    to_panels(student.rows.get(), a.rows, features, panel, student_panels.get());
    to_panels(teacher.rows.get(), a.rows, features, panel, teacher_panels.get());
    if (a.dw) {  // (width / panel, rows, panel)
        std::fill_n(columns.get(), rows * width, 0.0f);
        for (int64_t i = 0; i < a.rows; ++i)
            for (int64_t c = 0; c < features; ++c)
                columns[(c / panel * rows + i) * panel + c % panel] = student.rows[i * features + c];
    }

    const auto scan_of = [&](int64_t index) {
        const int64_t first = index * run;
        const auto from = [&](const void* p, DType dtype) {
            return static_cast<const char*>(p) + first * features * bytes_of(dtype);
        };
        float* own = scratch.get() + thread_index() * per_thread;
        DinoScan scan = {};
        scan.student = student_panels.get();
        scan.teacher = teacher_panels.get();
        scan.rows = a.rows;
        scan.panels = panels;
        scan.features = features;
        scan.prototypes = from(a.prototypes, a.prototypes_dtype);
        scan.teacher_prototypes = from(a.teacher_prototypes, a.teacher_prototypes_dtype);
        scan.prototypes_dtype = a.prototypes_dtype;
        scan.teacher_prototypes_dtype = a.teacher_prototypes_dtype;
        scan.center = a.center + first;
        scan.count = std::min(run, a.count - first);
        scan.student_scale = float(kLog2E / student_t);
        scan.teacher_scale = float(kLog2E / teacher_t);
        scan.student_scores = own;
        scan.teacher_scores = own + isa.group * scores;
        scan.prototypes_tile = scan.teacher_scores + scores;
        scan.teacher_tile = scan.prototypes_tile + isa.tile * features;
        scan.dw_tile = scan.teacher_tile + isa.tile * features;
        return scan;
    };
    // The six numbers of every row of a run; the second sweep needs the first four.
    const auto point = [rows](DinoScan& scan, float* at) {
        scan.student_max = at;
        scan.teacher_max = at + rows;
        scan.student_sum = at + 2 * rows;
        scan.teacher_sum = at + 3 * rows;
        scan.shift = at + 4 * rows;
        scan.cross = at + 5 * rows;
    };

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t index = 0; index < runs; ++index) {
            DinoScan scan = scan_of(index);
            point(scan, state.get() + index * 6 * rows);
            // Not from -inf, which would meet itself where a center or a prototype masks a whole tile.
            std::fill_n(scan.student_max, 2 * rows, std::numeric_limits<float>::lowest());
            std::fill_n(scan.student_sum, 4 * rows, 0.0f);
            isa.first_sweep(scan);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; ++i) {
            Softmax s, t;
            for (int64_t index = 0; index < runs; ++index) {
                const float* at = state.get() + index * 6 * rows + i;
                s.add(at[0], at[2 * rows], 0.0, student_t);
                const double cross = double(at[5 * rows]) + double(at[4 * rows]) * double(at[3 * rows]);
                t.add(at[rows], at[3 * rows], cross, teacher_t);
            }
            if (i < a.rows) a.loss[i] = float(std::log(s.sum) + (s.max - t.cross / t.sum) / student_t);
            found[i] = float(s.max);
            found[rows + i] = float(t.max);
            found[2 * rows + i] = float(1.0 / (student_t * s.sum));
            found[3 * rows + i] = float(1.0 / (student_t * t.sum));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t index = 0; index < (gradient ? runs : 0); ++index) {
            DinoScan scan = scan_of(index);
            point(scan, found.get());
            scan.shift = scan.cross = nullptr;
            if (a.ds) {
                scan.ds = sums.get() + index * rows * features;
                std::fill_n(scan.ds, rows * features, 0.0f);
            }
            if (a.dw) {
                scan.dw = a.dw + index * run * features;
                scan.student_columns = columns.get();
            }
            isa.second_sweep(scan);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (a.ds ? a.rows : 0); ++i) {
            const int64_t first = lane(i, features, panel);
            float* sum = sums.get() + first;
            for (int64_t index = 1; index < runs; ++index)
                for (int64_t c = 0; c < features; ++c)
                    sum[c * panel] += sums[index * rows * features + first + c * panel];
            const float* own = student.rows.get() + i * features;
            through_norm(
                features, student.norms[i], [&](int64_t c) { return double(sum[c * panel]); },
                [&](int64_t c) { return own[c]; }, a.ds + i * features);
        }
    }
}

}  // namespace moco_fast
