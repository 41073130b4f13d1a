// Addresses, dtypes and lists of tensors as Python hands them over. Included by bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "tensor_rows.h"

namespace py = pybind11;
namespace mf = moco_fast;

namespace {

using Address = std::uintptr_t;

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

bool tensors_pair_up(const py::list& targets, const py::list& sources) {
    if (!exchange_api || targets.size() != sources.size()) return false;
    mf::dlpack::Device device{};
    for (std::size_t i = 0; i < targets.size(); ++i) {
        mf::dlpack::Tensor target, source;
        if (!read(targets[i], target) || !read(sources[i], source)) return false;
        if (i == 0) device = target.device;
        if (mf::dlpack::dtype_code(target.dtype) < 0 || mf::dlpack::dtype_code(source.dtype) < 0 ||
            !(target.device == device) || !(source.device == device) || target.ndim != source.ndim ||
            !std::equal(target.shape, target.shape + target.ndim, source.shape))
            return false;
    }
    return true;
}

// Rows of tensors and the device they are on, opaque to Python.
struct Rows {
    mf::TensorRows rows;
    mf::dlpack::Device device{};
};

// Roles as lists of addresses (0: none), sizes, and roles as lists of dtype codes: for torch < 2.10.
Rows rows_of(const std::vector<std::vector<Address>>& roles, const std::vector<int64_t>& sizes,
             const std::vector<std::vector<int>>& dtypes, int device_type, int device_id) {
    Rows result{{}, {device_type, device_id}};
    if (roles.size() > mf::TensorRow::kMaxRoles || dtypes.size() != roles.size())
        throw std::invalid_argument("a row holds at most " + std::to_string(mf::TensorRow::kMaxRoles) +
                                    " tensors, each with a dtype");
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        mf::TensorRow row{};
        row.size = sizes[i];
        for (std::size_t role = 0; role < roles.size(); ++role) {
            row.data[role] = at<void>(roles[role].at(i));
            row.dtype[role] = dtype(dtypes[role].at(i), true);
        }
        result.rows.push_back(row);
    }
    return result;
}

// False for a row that is not one stretch of memory per tensor, all in the same order, on the device, with
// dtypes that mix: float64 with float64 only, or one for all if `uniform`.
bool read_row(const std::vector<py::object>& roles, std::size_t i, bool uniform,
              const mf::dlpack::Device& device, mf::TensorRow& row) {
    mf::dlpack::Tensor first, tensor;
    bool contiguous = true, channels_last = true;
    for (std::size_t role = 0; role < roles.size(); ++role) {
        const py::handle object = PyList_GET_ITEM(roles[role].ptr(), Py_ssize_t(i));
        if (role > 0 && object.is_none()) continue;
        if (!read(object, tensor)) return false;
        const int code = mf::dlpack::dtype_code(tensor.dtype);
        if (code < 0 || !(tensor.device == device)) return false;
        if (role == 0) {
            first = tensor;
            row.size = mf::dlpack::numel(tensor);
        } else if (tensor.ndim != first.ndim ||
                   !std::equal(tensor.shape, tensor.shape + tensor.ndim, first.shape))
            return false;
        row.data[role] = tensor.data;
        row.dtype[role] = mf::DType(code);
        contiguous = contiguous && mf::dlpack::contiguous(tensor);
        channels_last = channels_last && mf::dlpack::channels_last(tensor);
        const int own = int(row.dtype[0]);
        if (uniform ? own != code : (own == 3) != (code == 3)) return false;
    }
    return contiguous || channels_last;
}

bool read_step(py::handle object, const mf::dlpack::Device& device, mf::TensorRow& row, std::size_t role) {
    mf::dlpack::Tensor step;
    if (!read(object, step) || step.ndim != 0 || !(step.device == device)) return false;
    row.data[role] = step.data;
    row.dtype[role] = mf::DType::f32;
    return mf::dlpack::dtype_code(step.dtype) == int(mf::DType::f32);
}

// The rows that kernels can take, and the numbers of the others. Every role is a list of tensors, or of None
// where a parameter has none (not in the first role). Steps, 0-d and float32, become one more role.
std::pair<Rows, std::vector<int64_t>> read_tensors(const std::vector<py::object>& roles, bool uniform,
                                                   int device_type, int device_id,
                                                   const std::optional<py::list>& steps) {
    if (roles.empty() || roles.size() + steps.has_value() > mf::TensorRow::kMaxRoles || !exchange_api)
        throw std::invalid_argument("read_tensors: no exchange table, or not 1 to " +
                                    std::to_string(mf::TensorRow::kMaxRoles) + " roles");
    for (const py::object& role : roles)
        if (!PyList_Check(role.ptr()) || PyList_GET_SIZE(role.ptr()) != PyList_GET_SIZE(roles[0].ptr()))
            throw std::invalid_argument("read_tensors: roles must be lists of one length");
    if (steps && py::ssize_t(steps->size()) != PyList_GET_SIZE(roles[0].ptr()))
        throw std::invalid_argument("read_tensors: one step per row");
    std::pair<Rows, std::vector<int64_t>> result{{{}, {device_type, device_id}}, {}};
    auto& [rows, rest] = result;
    for (std::size_t i = 0; i < std::size_t(PyList_GET_SIZE(roles[0].ptr())); ++i) {
        mf::TensorRow row{};
        if (read_row(roles, i, uniform, rows.device, row) &&
            (!steps || read_step((*steps)[i], rows.device, row, roles.size())))
            rows.rows.push_back(row);
        else
            rest.push_back(int64_t(i));
    }
    return result;
}

}  // namespace
