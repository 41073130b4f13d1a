// Everything Python can call. Tensors arrive as addresses: all checks of shape, dtype, device and contiguity
// are made above, in moco_fast/checks.py. The GIL is released while a kernel runs.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "adamw.h"
#include "augment.h"
#include "contrast.h"
#include "cpu_features.h"
#include "dino.h"
#include "ema_update.h"
#include "enqueue.h"
#include "info_nce.h"
#include "nt_xent.h"
#include "python_rows.h"
#include "sgd.h"
#include "split_batch_norm.h"
#include "take_rows.h"
#if defined(MOCO_FAST_CUDA)
#include "device.h"
#include "info_nce_sweep.h"
#endif

namespace {

using Release = py::call_guard<py::gil_scoped_release>;

void info_nce(Address q, Address k, int qk_dtype, Address queue, int queue_dtype, int64_t n,
              int64_t negatives, int64_t features, double temperature, Address loss, Address dq, Address rank,
              Address pos, Address neg, bool bf16, int threads) {
    mf::info_nce({at<void>(q), at<void>(k), dtype(qk_dtype), at<void>(queue), dtype(queue_dtype), n,
                  negatives, features, temperature, at<float>(loss), at<float>(dq), at<int64_t>(rank),
                  at<float>(pos), at<float>(neg), bf16, threads});
}

void contrast(Address q, Address k, int dtype_of_both, int64_t problems, int64_t queries, int64_t keys,
              int64_t features, int64_t first, double temperature, Address loss, Address dq, Address dk,
              int threads) {
    mf::contrast({at<void>(q), at<void>(k), dtype(dtype_of_both), problems, queries, keys, features, first,
                  temperature, at<float>(loss), at<float>(dq), at<float>(dk), threads});
}

void nt_xent(Address z, int z_dtype, int64_t rows, int64_t features, double temperature, Address loss,
             Address dz, int threads) {
    mf::nt_xent(
        {at<void>(z), dtype(z_dtype), rows, features, temperature, at<float>(loss), at<float>(dz), threads});
}

// (student, teacher, their dtype), (address, dtype) of either prototypes, (n, count, features), (student's,
// teacher's temperature) and (loss, ds, dw) of Dino
using PyDinoRows = std::tuple<Address, Address, int>;
using PyDinoPrototypes = std::tuple<Address, int>;
using PyDinoSizes = std::tuple<int64_t, int64_t, int64_t>;
using PyDinoFound = std::tuple<Address, Address, Address>;

void dino(const PyDinoRows& rows, const PyDinoPrototypes& prototypes,
          const PyDinoPrototypes& teacher_prototypes, Address center, const PyDinoSizes& sizes,
          const std::tuple<double, double>& temperatures, const PyDinoFound& found, int threads) {
    const auto [student, teacher, rows_dtype] = rows;
    const auto [w, w_dtype] = prototypes;
    const auto [v, v_dtype] = teacher_prototypes;
    const auto [n, count, features] = sizes;
    const auto [loss, ds, dw] = found;
    mf::dino({at<void>(student), at<void>(teacher), dtype(rows_dtype), at<void>(w), at<void>(v),
              dtype(w_dtype), dtype(v_dtype), at<float>(center), n, count, features,
              std::get<0>(temperatures), std::get<1>(temperatures), at<float>(loss), at<float>(ds),
              at<float>(dw), threads});
}

#if defined(MOCO_FAST_CUDA)
// (q, k, their dtype, queue, its dtype), (q_norm, k_norm, pos), (sums, totals, shifts, cosines, ranks), (n,
// slots, features, shares, steps) and (scale, fixed_shift, offset, least) of InfoNceSweep
using PySweepRows = std::tuple<Address, Address, int, Address, int>;
using PySweepPairs = std::tuple<Address, Address, Address>;
using PySweepFound = std::tuple<Address, Address, Address, Address, Address>;
using PySweepSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
using PySweepNumbers = std::tuple<float, float, float, float>;

void info_nce_sweep(const PySweepRows& rows, const PySweepPairs& pairs, const PySweepFound& found,
                    const PySweepSizes& sizes, const PySweepNumbers& numbers, bool online, int device,
                    Address stream) {
    const auto [q, k, q_dtype, queue, operand] = rows;
    const auto [q_norm, k_norm, pos] = pairs;
    const auto [sums, totals, shifts, cosines, ranks] = found;
    const auto [n, slots, features, shares, steps] = sizes;
    const auto [scale, fixed_shift, offset, least] = numbers;
    mf::info_nce_sweep_cuda({at<void>(q),
                             at<void>(k),
                             dtype(q_dtype),
                             at<void>(queue),
                             dtype(operand),
                             at<float>(q_norm),
                             at<float>(k_norm),
                             at<float>(pos),
                             at<float>(sums),
                             at<float>(totals),
                             at<float>(shifts),
                             at<float>(cosines),
                             at<int32_t>(ranks),
                             n,
                             slots,
                             features,
                             shares,
                             steps,
                             scale,
                             fixed_shift,
                             offset,
                             least,
                             online},
                            {device, at<void>(stream)});
}
#endif

// (value, address on the GPU or 0, dtype code of what is there)
using PyScalar = std::tuple<double, Address, int>;

mf::Scalar scalar(const PyScalar& from) {
    return {std::get<0>(from), at<const void>(std::get<1>(from)), dtype(std::get<2>(from), true)};
}

#if defined(MOCO_FAST_CUDA)
bool on_gpu(const Rows& rows) { return rows.device.type == mf::dlpack::kCuda; }
mf::CudaStream place(const Rows& rows, Address stream) { return {rows.device.id, at<void>(stream)}; }
#endif

void ema_update(const Rows& rows, const PyScalar& m, int threads, [[maybe_unused]] Address stream) {
#if defined(MOCO_FAST_CUDA)
    if (on_gpu(rows)) return mf::ema_update_cuda(rows.rows, scalar(m), place(rows, stream));
#endif
    mf::ema_update(rows.rows, scalar(m).value, threads);
}

using PySgdStep = std::tuple<double, double, double, double, bool, bool, bool>;
using PyAdamwStep = std::tuple<double, double, double, double, bool>;

int64_t sgd_scratch([[maybe_unused]] const Rows& rows) {
#if defined(MOCO_FAST_CUDA)
    if (on_gpu(rows)) return mf::sgd_scratch_cuda(rows.rows);
#endif
    return 0;
}

void sgd_step(const Rows& rows, const PySgdStep& numbers, const PyScalar& lr, const PyScalar& m,
              [[maybe_unused]] Address scratch, int threads, [[maybe_unused]] Address stream) {
    const auto step = std::apply([](auto... x) { return mf::SgdStep{x...}; }, numbers);
#if defined(MOCO_FAST_CUDA)
    if (on_gpu(rows))
        return mf::sgd_step_cuda(rows.rows, step, scalar(lr), scalar(m), at<double>(scratch),
                                 place(rows, stream));
#endif
    mf::sgd_step(rows.rows, step, scalar(lr).value, scalar(m).value, threads);
}

void adamw_step(const Rows& rows, const PyAdamwStep& numbers, const PyScalar& lr, const PyScalar& m,
                int threads, [[maybe_unused]] Address stream) {
    const auto step = std::apply([](auto... x) { return mf::AdamwStep{x...}; }, numbers);
#if defined(MOCO_FAST_CUDA)
    if (on_gpu(rows)) return mf::adamw_step_cuda(rows.rows, step, scalar(lr), scalar(m), place(rows, stream));
#endif
    mf::adamw_step(rows.rows, step, scalar(lr).value, scalar(m).value, threads);
}

void enqueue(Address queue, int queue_dtype, int64_t slots, int64_t features, Address ptr, Address keys,
             int keys_dtype, int64_t n, Address order, int threads) {
    mf::enqueue({at<void>(queue), dtype(queue_dtype), slots, features, at<int64_t>(ptr), at<void>(keys),
                 dtype(keys_dtype), n, at<int64_t>(order), threads});
}

void take_rows(Address rows, int64_t bytes, Address index, int64_t count, Address out, int threads) {
    mf::take_rows({at<char>(rows), bytes, at<int64_t>(index), count, at<char>(out), threads});
}

// (N, C, H, W), and the strides of the first three in bytes
using PyImagesShape = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using PyImagesStrides = std::tuple<int64_t, int64_t, int64_t>;

void augment(Address images, const PyImagesShape& shape, const PyImagesStrides& strides, Address parameters,
             int64_t size, const std::vector<float>& mean, const std::vector<float>& std, int out_dtype,
             bool channels_last, Address out, int threads) {
    const auto [count, channels, height, width] = shape;
    const auto [image_stride, channel_stride, row_stride] = strides;
    mf::Augment args{at<uint8_t>(images),
                     count,
                     channels,
                     height,
                     width,
                     image_stride,
                     channel_stride,
                     row_stride,
                     at<float>(parameters),
                     size,
                     {},
                     {},
                     dtype(out_dtype),
                     channels_last,
                     at<void>(out),
                     threads};
    if (mean.size() > 3 || mean.size() != std.size() || int64_t(mean.size()) != channels)
        throw std::invalid_argument("augment: one mean and one std per channel, of three at most");
    std::copy(mean.begin(), mean.end(), args.mean);
    std::copy(std.begin(), std.end(), args.std);
    mf::augment(args);
}

// (parts, rows, channels, run) and the dtype of all but the statistics
using PyPartsShape = std::tuple<int64_t, int64_t, int64_t, int64_t>;

mf::PartsShape parts_shape(const PyPartsShape& sizes, int code) {
    return std::apply([code](auto... size) { return mf::PartsShape{dtype(code), size...}; }, sizes);
}

void split_batch_norm(const PyPartsShape& shape, int dtype, Address x, Address weight, Address bias,
                      double eps, Address y, Address mean, Address var, int threads) {
    mf::split_batch_norm({parts_shape(shape, dtype), at<void>(x), at<float>(weight), at<float>(bias), eps,
                          at<void>(y), at<float>(mean), at<float>(var), threads});
}

void split_batch_norm_backward(const PyPartsShape& shape, int dtype, Address dy, Address x, Address weight,
                               Address mean, Address var, double eps, Address dx, Address dw, Address db,
                               int threads) {
    mf::split_batch_norm_backward({parts_shape(shape, dtype), at<void>(dy), at<void>(x), at<float>(weight),
                                   at<float>(mean), at<float>(var), eps, at<void>(dx), at<float>(dw),
                                   at<float>(db), threads});
}

// (name, "major.minor") of every CUDA device.
std::vector<std::pair<std::string, std::string>> cuda_devices() {
    std::vector<std::pair<std::string, std::string>> devices;
#if defined(MOCO_FAST_CUDA)
    for (const mf::CudaDevice& device : mf::cuda_devices())
        devices.emplace_back(device.name, std::to_string(device.major) + "." + std::to_string(device.minor));
#endif
    return devices;
}

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (mf::Isa isa : mf::supported_isas()) names.push_back(mf::isa_name(isa));
    return names;
}

constexpr bool kHasCuda =
#if defined(MOCO_FAST_CUDA)
    true;
#else
    false;
#endif

constexpr bool kHasOpenMp =
#if defined(_OPENMP)
    true;
#else
    false;
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() =
        "Compiled kernels of moco_fast. Tensors are passed as data_ptr() of contiguous memory, dtypes as "
        "codes: "
        "0 float32, 1 bfloat16, 2 float16, 3 float64. Impossible values raise ValueError before anything is "
        "written.";
    m.def(
        "info_nce", &info_nce, py::arg("q"), py::arg("k"), py::arg("qk_dtype"), py::arg("queue"),
        py::arg("queue_dtype"), py::arg("n"), py::arg("negatives"), py::arg("features"),
        py::arg("temperature"), py::arg("loss"), py::arg("dq"), py::arg("rank"), py::arg("pos"),
        py::arg("neg"), py::arg("bf16"), py::arg("threads"), Release(),
        "loss_i = logsumexp(s_pos, s_1..s_K) - s_pos and d loss_i / d q_i, one pass.\n\n"
        "q, k (N, C) raw; queue (K, C); writes loss (N) f32, dq (N, C) f32 (0: forward only), rank (N) i64 "
        "of the\n"
        "positive, pos (N) f32 its cosine, neg (N) f32 mean cosine of the negatives. bf16: the products may "
        "round\ntheir operands to it, and do where has_amx().");
    m.def(
        "contrast", &contrast, py::arg("q"), py::arg("k"), py::arg("dtype"), py::arg("problems"),
        py::arg("queries"), py::arg("keys"), py::arg("features"), py::arg("first"), py::arg("temperature"),
        py::arg("loss"), py::arg("dq"), py::arg("dk"), py::arg("threads"), Release(),
        "Loss (D, N), dq (D, N, C) and dk (D, M, C), all f32, of q (D, N, C) and k (D, M, C); 0 for what is "
        "not\nwanted.");
    m.def("nt_xent", &nt_xent, py::arg("z"), py::arg("dtype"), py::arg("rows"), py::arg("features"),
          py::arg("temperature"), py::arg("loss"), py::arg("dz"), py::arg("threads"), Release(),
          "Loss (R) and dz (R, C), both f32, of z (R, C); dz 0: not wanted.");
    m.def("dino", &dino, py::arg("rows"), py::arg("prototypes"), py::arg("teacher_prototypes"),
          py::arg("center"), py::arg("sizes"), py::arg("temperatures"), py::arg("found"), py::arg("threads"),
          Release(),
          "Loss (N), ds (N, C) and dw (P, C), all f32, of student and teacher (N, C), two sets of prototypes "
          "(P, C) and\ncenter (P) f32; 0 for what is not wanted.");
#if defined(MOCO_FAST_CUDA)
    m.def("info_nce_sweep", &info_nce_sweep, py::arg("rows"), py::arg("pairs"), py::arg("found"),
          py::arg("sizes"), py::arg("numbers"), py::arg("online"), py::arg("device"), py::arg("stream"),
          Release(),
          "The sweep of InfoNCE over the queue on compute capability 9.0, queued in the stream; "
          "csrc/info_nce_sweep.h.\n\n"
          "rows is (q, k, their dtype, queue, its dtype), pairs (q_norm, k_norm, pos), found (sums, totals, "
          "shifts, cosines or 0, ranks or 0), sizes "
          "(n, slots,\nfeatures, shares, steps), numbers (scale, fixed_shift, offset).");
#endif
    m.def("read_tensors_through", &read_tensors_through, py::arg("exchange_api"),
          "Use torch's DLPack exchange table; whether its version is one this understands.");
    m.def("tensors_pair_up", &tensors_pair_up, py::arg("targets"), py::arg("sources"),
          "Whether the lists hold floating-point tensors of pairwise equal shapes, all on one device.");
    py::class_<Rows>(m, "Rows",
                     "Tensors that belong together, row by row: what the multi-tensor kernels take.")
        .def(py::init(&rows_of), py::arg("roles"), py::arg("sizes"), py::arg("dtypes"),
             py::arg("device_type"), py::arg("device_id"),
             "From lists of addresses (0: none) and of dtype codes, one per role.");
    m.def(
        "read_tensors", &read_tensors, py::arg("roles"), py::arg("uniform"), py::arg("device_type"),
        py::arg("device_id"), py::arg("steps") = py::none(),
        "(Rows, indices left out) of lists of tensors, one per role; None where a row has no such tensor. "
        "Left out is\nwhat is not in one stretch of memory per tensor, in the same order, on the device, of "
        "dtypes that mix.");
    m.def(
        "ema_update", &ema_update, py::arg("rows"), py::arg("m"), py::arg("threads"), py::arg("stream"),
        Release(),
        "target <- m * target + (1 - m) * source; rows are (target, source[, master]), m is (value, address "
        "on the\nGPU or 0, dtype code of what is there). On a GPU the kernel is queued in the stream.");
    m.def("sgd_scratch", &sgd_scratch, py::arg("rows"),
          "float64 values of scratch that LARS needs, on a GPU.");
    m.def("sgd_step", &sgd_step, py::arg("rows"), py::arg("step"), py::arg("lr"), py::arg("m"),
          py::arg("scratch"), py::arg("threads"), py::arg("stream"), Release(),
          "SGD, or LARS if trust > 0, and EMA; rows are (param, grad, buffer, key), step is (momentum, "
          "dampening,\nweight_decay, trust, nesterov, maximize, first).");
    m.def(
        "adamw_step", &adamw_step, py::arg("rows"), py::arg("step"), py::arg("lr"), py::arg("m"),
        py::arg("threads"), py::arg("stream"), Release(),
        "AdamW and EMA; rows are (param, grad, exp_avg, exp_avg_sq, key, step), step is (beta1, beta2, eps, "
        "\nweight_decay, maximize).");
    m.def("augment", &augment, py::arg("images"), py::arg("shape"), py::arg("strides"), py::arg("parameters"),
          py::arg("size"), py::arg("mean"), py::arg("std"), py::arg("dtype"), py::arg("channels_last"),
          py::arg("out"), py::arg("threads"), Release(),
          "A view (C, S, S) of every image of images (N, C, H, W) u8, by parameters (N, 16) f32.");
    m.def("take_rows", &take_rows, py::arg("rows"), py::arg("bytes"), py::arg("index"), py::arg("count"),
          py::arg("out"), py::arg("threads"), Release(),
          "out_i <- rows[index_i]; rows of so many bytes, index (count) int64.");
    m.def(
        "enqueue", &enqueue, py::arg("queue"), py::arg("queue_dtype"), py::arg("slots"), py::arg("features"),
        py::arg("ptr"), py::arg("keys"), py::arg("keys_dtype"), py::arg("n"), py::arg("order"),
        py::arg("threads"), Release(),
        "queue[(ptr + i) % K] <- keys_i / max(|keys_i|, 1e-12); ptr <- (ptr + N) % K. keys_i is row order[i] "
        "(0: row i). ptr is the address "
        "of an int64.");
    m.def("split_batch_norm", &split_batch_norm, py::arg("shape"), py::arg("dtype"), py::arg("x"),
          py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("y"), py::arg("mean"), py::arg("var"),
          py::arg("threads"), Release(),
          "y = (x - mean) / sqrt(var + eps) * weight + bias of x (S, R, C, L), with mean and var (S, C) f32 "
          "over R\nand L; shape is (S, R, C, L), weight and bias (C) f32 or 0.");
    m.def("split_batch_norm_backward", &split_batch_norm_backward, py::arg("shape"), py::arg("dtype"),
          py::arg("dy"), py::arg("x"), py::arg("weight"), py::arg("mean"), py::arg("var"), py::arg("eps"),
          py::arg("dx"), py::arg("dw"), py::arg("db"), py::arg("threads"), Release(),
          "dx in the dtype of dy and x, dw and db (C) f32.");
    m.def("isas", &isa_names, "Instruction sets compiled in that this CPU runs, weakest first.");
    m.def(
        "isa", [] { return mf::isa_name(mf::selected_isa()); },
        "The one in use; MOCO_FAST_ISA overrides it.");
    m.def("has_amx", &mf::has_amx, "Whether there are matrix units for bf16 to use, beside avx512.");
    m.def("cuda_devices", &cuda_devices, "(name, compute capability) of every CUDA device.");
    m.attr("has_cuda") = kHasCuda;
    m.attr("has_openmp") = kHasOpenMp;
}
