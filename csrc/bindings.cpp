// Everything Python can call. Tensors arrive as addresses: all checks of shape, dtype, device and contiguity
// are made above, in moco_fast/checks.py. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu_features.h"
#include "dlpack.h"
#include "ema_update.h"
#include "enqueue.h"
#include "info_nce.h"
#if defined(MOCO_FAST_CUDA)
#include "device.h"
#endif

namespace py = pybind11;
namespace mf = moco_fast;

namespace {

using Address = std::uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

mf::DType dtype(int code, bool f64 = false) {
    if (code < 0 || code > (f64 ? 3 : 2))
        throw std::invalid_argument("dtype code is " + std::to_string(code) +
                                    ", expected 0 (float32), 1 (bfloat16), 2 (float16)" +
                                    (f64 ? ", 3 (float64)" : ""));
    return mf::DType(code);
}

void info_nce(Address q, Address k, int qk_dtype, Address queue, int queue_dtype, int64_t n,
              int64_t negatives, int64_t features, double temperature, Address loss, Address dq, Address rank,
              Address pos, Address neg, int threads) {
    mf::info_nce({at<void>(q), at<void>(k), dtype(qk_dtype), at<void>(queue), dtype(queue_dtype), n,
                  negatives, features, temperature, at<float>(loss), at<float>(dq), at<int64_t>(rank),
                  at<float>(pos), at<float>(neg), threads});
}

void info_nce_tile(Address cosines, int64_t n, int64_t count, int64_t features, double temperature,
                   Address pos, Address max, Address sum, Address cosine_sum, Address rank, Address weighted,
                   int threads) {
    mf::info_nce_tile({at<float>(cosines), n, count, features, temperature, at<float>(pos), at<float>(max),
                       at<float>(sum), at<float>(cosine_sum), at<int64_t>(rank), at<float>(weighted),
                       threads});
}

void info_nce_finish(Address max, Address sum, Address cosine_sum, Address pos, Address weighted,
                     Address q_hat, Address k_hat, Address norm, int64_t n, int64_t negatives,
                     int64_t features, double temperature, Address loss, Address dq, Address neg,
                     int threads) {
    mf::info_nce_finish({at<float>(max), at<float>(sum), at<float>(cosine_sum), at<float>(pos),
                         at<float>(weighted), at<float>(q_hat), at<float>(k_hat), at<float>(norm), n,
                         negatives, features, temperature, at<float>(loss), at<float>(dq), at<float>(neg),
                         threads});
}

void ema_update(const std::vector<Address>& targets, const std::vector<Address>& sources,
                const std::vector<int64_t>& sizes, const std::vector<int>& target_dtypes,
                const std::vector<int>& source_dtypes, double m, int threads) {
    const std::size_t count = targets.size();
    if (sources.size() != count || sizes.size() != count || target_dtypes.size() != count ||
        source_dtypes.size() != count)
        throw std::invalid_argument("ema_update: the lists differ in length");
    std::vector<mf::EmaPair> pairs;
    for (std::size_t i = 0; i < count; ++i)
        pairs.push_back({at<void>(targets[i]), at<void>(sources[i]), sizes[i], dtype(target_dtypes[i], true),
                         dtype(source_dtypes[i], true)});
    mf::ema_update(pairs, m, threads);
}

const mf::dlpack::ExchangeApi* exchange_api = nullptr;

bool read_tensors_through(const py::capsule& capsule) {
    const auto* api = static_cast<const mf::dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->major == mf::dlpack::kMajor && api->tensor_from_py_object) exchange_api = api;
    return exchange_api != nullptr;
}

// False for what is no tensor in memory (another object, a fake tensor): the caller's slow path says why.
bool read(py::handle object, mf::dlpack::Tensor& out) {
    if (exchange_api->tensor_from_py_object(object.ptr(), &out) != 0) {
        PyErr_Clear();
        return false;
    }
    out.data = static_cast<char*>(out.data) + out.byte_offset;
    return true;
}

template <class Visit>
bool for_each_pair(const py::list& targets, const py::list& sources, Visit visit) {
    if (!exchange_api || targets.size() != sources.size()) return false;
    for (std::size_t i = 0; i < targets.size(); ++i) {
        mf::dlpack::Tensor target, source;
        if (!read(targets[i], target) || !read(sources[i], source) || !visit(target, source)) return false;
    }
    return true;
}

int dtype_code(const mf::dlpack::DataType& type) {
    if (type.code == mf::dlpack::kBfloat) return int(mf::DType::bf16);
    if (type.code != mf::dlpack::kFloat) return -1;
    return int(type.bits == 32 ? mf::DType::f32 : type.bits == 16 ? mf::DType::f16 : mf::DType::f64);
}

bool tensors_pair_up(const py::list& targets, const py::list& sources) {
    const mf::dlpack::Device* device = nullptr;
    mf::dlpack::Device first{};
    return for_each_pair(targets, sources, [&](const auto& target, const auto& source) {
        if (!device) device = &(first = target.device);
        return dtype_code(target.dtype) >= 0 && dtype_code(source.dtype) >= 0 && target.device == *device &&
               source.device == *device && target.ndim == source.ndim &&
               std::equal(target.shape, target.shape + target.ndim, source.shape);
    });
}

bool ema_update_tensors(const py::list& targets, const py::list& sources, double m, int threads) {
    std::vector<mf::EmaPair> pairs;
    const bool simple = for_each_pair(targets, sources, [&](const auto& target, const auto& source) {
        const int target_dtype = dtype_code(target.dtype), source_dtype = dtype_code(source.dtype);
        pairs.push_back({target.data, source.data, mf::dlpack::numel(target), mf::DType(target_dtype),
                         mf::DType(source_dtype)});
        return target.device.type == mf::dlpack::kCpu && target_dtype >= 0 && source_dtype >= 0 &&
               (target_dtype == 3) == (source_dtype == 3) &&
               ((mf::dlpack::contiguous(target) && mf::dlpack::contiguous(source)) ||
                (mf::dlpack::channels_last(target) && mf::dlpack::channels_last(source)));
    });
    if (!simple) return false;
    py::gil_scoped_release release;
    mf::ema_update(pairs, m, threads);
    return true;
}

void enqueue(Address queue, int queue_dtype, int64_t slots, int64_t features, Address ptr, Address keys,
             int keys_dtype, int64_t n, int threads) {
    mf::enqueue({at<void>(queue), dtype(queue_dtype), slots, features, at<int64_t>(ptr), at<void>(keys),
                 dtype(keys_dtype), n, threads});
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
    m.def("info_nce", &info_nce, py::arg("q"), py::arg("k"), py::arg("qk_dtype"), py::arg("queue"),
          py::arg("queue_dtype"), py::arg("n"), py::arg("negatives"), py::arg("features"),
          py::arg("temperature"), py::arg("loss"), py::arg("dq"), py::arg("rank"), py::arg("pos"),
          py::arg("neg"), py::arg("threads"), Release(),
          "loss_i = logsumexp(s_pos, s_1..s_K) - s_pos and d loss_i / d q_i, one pass.\n\n"
          "q, k (N, C) raw; queue (K, C); writes loss (N) f32, dq (N, C) f32 (0: forward only), rank (N) i64 "
          "of the\n"
          "positive, pos (N) f32 its cosine, neg (N) f32 mean cosine of the negatives.");
    m.def(
        "info_nce_tile", &info_nce_tile, py::arg("cosines"), py::arg("n"), py::arg("count"),
        py::arg("features"), py::arg("temperature"), py::arg("pos"), py::arg("max"), py::arg("sum"),
        py::arg("cosine_sum"), py::arg("rank"), py::arg("weighted"), py::arg("threads"), Release(),
        "Online softmax over one tile of cosines (N, count) f32, in place: they become exp((s - max)/T).\n\n"
        "max (N) starts as pos, sum, cosine_sum (N) f32 and rank (N) i64 at zero; weighted (N, C) f32 is "
        "rescaled\n"
        "where max grew (0: forward only). After the call add cosines @ tile_rows to weighted.");
    m.def("info_nce_finish", &info_nce_finish, py::arg("max"), py::arg("sum"), py::arg("cosine_sum"),
          py::arg("pos"), py::arg("weighted"), py::arg("q_hat"), py::arg("k_hat"), py::arg("norm"),
          py::arg("n"), py::arg("negatives"), py::arg("features"), py::arg("temperature"), py::arg("loss"),
          py::arg("dq"), py::arg("neg"), py::arg("threads"), Release(),
          "Loss (N), dq (N, C) and neg (N), all f32, from the state info_nce_tile left.\n\n"
          "q_hat, k_hat (N, C) f32 unit, norm (N) f32 = |q| before clamping. dq = 0: forward only, weighted, "
          "q_hat,\n"
          "k_hat and norm are not read.");
    m.def("ema_update", &ema_update, py::arg("targets"), py::arg("sources"), py::arg("sizes"),
          py::arg("target_dtypes"), py::arg("source_dtypes"), py::arg("m"), py::arg("threads"), Release(),
          "target <- m * target + (1 - m) * source over lists of addresses, sizes and dtype codes.");
    m.def("read_tensors_through", &read_tensors_through, py::arg("exchange_api"),
          "Use torch's DLPack exchange table; whether its version is one this understands.");
    m.def("tensors_pair_up", &tensors_pair_up, py::arg("targets"), py::arg("sources"),
          "Whether the lists hold floating-point tensors of pairwise equal shapes, all on one device.");
    m.def("ema_update_tensors", &ema_update_tensors, py::arg("targets"), py::arg("sources"), py::arg("m"),
          py::arg("threads"),
          "ema_update over lists of CPU tensors, or False with nothing written if a pair is not in one "
          "stretch of\nmemory each, in the same order.");
    m.def("enqueue", &enqueue, py::arg("queue"), py::arg("queue_dtype"), py::arg("slots"),
          py::arg("features"), py::arg("ptr"), py::arg("keys"), py::arg("keys_dtype"), py::arg("n"),
          py::arg("threads"), Release(),
          "queue[(ptr + i) % K] <- keys_i / max(|keys_i|, 1e-12); ptr <- (ptr + N) % K. ptr is the address "
          "of an int64.");
    m.def("isas", &isa_names, "Instruction sets compiled in that this CPU runs, weakest first.");
    m.def(
        "isa", [] { return mf::isa_name(mf::selected_isa()); },
        "The one in use; MOCO_FAST_ISA overrides it.");
    m.def("cuda_devices", &cuda_devices, "(name, compute capability) of every CUDA device.");
    m.attr("has_cuda") = kHasCuda;
    m.attr("has_openmp") = kHasOpenMp;
}
