// Puts the CPU's kernels under the operators of PrivateUse1, over those that torch_npu registered: `install`, which
// backends/software_npu/activate.py calls. Allocation, views and metadata stay with torch_npu.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_to_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../acl/settings.h"
#include "call.h"
#include "later.h"
#include "tensors.h"

namespace {

using software_npu::copy_later;
using software_npu::is_npu;
using software_npu::on_cpu;
constexpr auto kNpu = c10::DispatchKey::PrivateUse1;
constexpr auto kNpuAutograd = c10::DispatchKey::AutogradPrivateUse1;

// torch_npu's own.
const std::set<std::string> kKept = {
    "_debug_has_internal_overlap", "_pin_memory", "_reshape_alias", "as_strided", "as_strided_", "empty.memory_format",
    "empty_like", "empty_strided", "is_pinned", "is_set_to", "new_empty_strided", "pin_memory", "record_stream",
    "resize_", "set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "to.device",
    "to.dtype", "to.dtype_layout", "to.other", "unfold", "view", "view_as_complex", "view_as_real"};
// Below: they cross devices.
const std::set<std::string> kOwn = {
    "_copy_from", "_copy_from_and_resize", "_local_scalar_dense", "_to_copy", "copy_"};

// Whether a stream may copy while the host goes on: torch_npu waits where memory of the host is not page-locked.
bool is_for_later(const at::Tensor &to, const at::Tensor &from, bool non_blocking) {
    if (!software_npu::is_async()) return false;
    if (is_npu(to) && is_npu(from)) return to.device() == from.device();
    return non_blocking && (is_npu(to) ? from : to).is_pinned();
}

at::Tensor &copy_(at::Tensor &to, const at::Tensor &from, bool non_blocking) {
    if (is_for_later(to, from, non_blocking)) {
        copy_later(to, from);
    } else {
        on_cpu(to).copy_(on_cpu(from));
    }
    return to;
}
at::Tensor copy_from(const at::Tensor &from, const at::Tensor &to, bool non_blocking) {
    at::Tensor there = to;
    return copy_(there, from, non_blocking);
}
at::Tensor copy_from_and_resize(const at::Tensor &from, const at::Tensor &to) {
    to.resize_(from.sizes());
    return copy_from(from, to, false);
}
at::Scalar local_scalar(const at::Tensor &tensor) { return at::_local_scalar_dense(on_cpu(tensor)); }

at::Tensor to_copy(const at::Tensor &tensor, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                   std::optional<at::Device> device, std::optional<bool> pinned, bool non_blocking,
                   std::optional<at::MemoryFormat> format) {
    auto target = device.value_or(tensor.device());
    // "npu" without a number is the current device, which torch_npu knows.
    if (target.is_privateuseone() && !target.has_index()) {
        target = at::empty({0}, at::TensorOptions().device(target)).device();
    }
    // Shape and strides of the copy are those of its meta twin. PyTorch takes page-locked memory where it does not wait.
    auto of_meta = tensor.options().device(at::kMeta).pinned_memory(false);
    auto meta = at::empty_strided(tensor.sizes(), tensor.strides(), of_meta);
    auto twin = at::_to_copy(meta, dtype, std::nullopt, at::Device(at::kMeta), std::nullopt, false, format);
    bool locked = target.is_cpu() && is_npu(tensor) && (non_blocking || pinned.value_or(false));
    auto options = twin.options().device(target).pinned_memory(locked);
    auto copy = at::empty_strided(twin.sizes(), twin.strides(), options);
    return copy_(copy, tensor, non_blocking);
}

// torch_npu calls its own library from some operators that are made of others: let those others be called.
void decompose(const c10::OperatorHandle &op, c10::DispatchKeySet, torch::jit::Stack *stack) {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::AutogradCPU), stack);
}

struct Named {
    std::string name;
    c10::OperatorHandle op;
};

std::vector<Named> aten_operators() {
    std::vector<Named> found;
    for (const auto &name : c10::Dispatcher::singleton().getAllOpNames()) {
        auto op = c10::Dispatcher::singleton().findSchema(name);
        if (name.name.rfind("aten::", 0) != 0 || !op) continue;
        std::string overload = name.overload_name.empty() ? "" : "." + name.overload_name;
        found.push_back({name.name.substr(6) + overload, *op});
    }
    return found;
}

bool returns_a_view(const c10::FunctionSchema &schema) {
    for (const auto &value : schema.returns()) {
        if (value.alias_info() && !value.alias_info()->isWrite()) return true;
    }
    return false;
}

bool takes_a_tensor_or_device(const c10::FunctionSchema &schema) {
    for (const auto &argument : schema.arguments()) {
        std::string type = argument.type()->str();
        if (type.find("Tensor") != std::string::npos || type.find("Device") != std::string::npos) return true;
    }
    return false;
}

// An operator of torch_npu's, or else one that has a CPU kernel and no other way to run here.
bool is_replaced(const Named &named) {
    if (kKept.count(named.name) || kOwn.count(named.name)) return false;
    const auto &schema = named.op.schema();
    if (returns_a_view(schema) || !takes_a_tensor_or_device(schema)) return false;
    return named.op.hasKernelForDispatchKey(kNpu) || named.op.hasKernelForDispatchKey(c10::DispatchKey::CPU);
}

bool is_decomposed(const Named &named) {
    return named.name != "contiguous" && named.op.hasKernelForDispatchKey(kNpuAutograd) &&
           named.op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
}

// They stay registered as long as these live.
std::vector<std::unique_ptr<torch::Library>> libraries;

torch::Library &library_for(const char *space, c10::DispatchKey key) {
    auto kind = torch::Library::IMPL;
    libraries.push_back(std::make_unique<torch::Library>(kind, space, std::make_optional(key), __FILE__, __LINE__));
    return *libraries.back();
}

// `npu`: torch_npu's own operators that have a CPU kernel. Returns the number of operators.
int64_t install(const std::vector<std::string> &npu) {
    auto &own = library_for("npu", kNpu);
    for (const auto &name : npu) {
        own.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&software_npu::call_on_cpu>());
    }
    int64_t count = npu.size();
    auto operators = aten_operators();
    auto &kernels = library_for("aten", kNpu);
    for (const auto &named : operators) {
        if (!is_replaced(named)) continue;
        kernels.impl(named.name.c_str(), torch::CppFunction::makeFromBoxedFunction<&software_npu::call_on_cpu>());
        count++;
    }
    kernels.impl("copy_", TORCH_FN(copy_));
    kernels.impl("_copy_from", TORCH_FN(copy_from));
    kernels.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
    kernels.impl("_local_scalar_dense", TORCH_FN(local_scalar));
    kernels.impl("_to_copy", TORCH_FN(to_copy));
    auto &autograd = library_for("aten", kNpuAutograd);
    for (const auto &named : operators) {
        if (!is_decomposed(named)) continue;
        autograd.impl(named.name.c_str(), torch::CppFunction::makeFromBoxedFunction<&decompose>());
        count++;
    }
    return count + kOwn.size();
}

}  // namespace

TORCH_LIBRARY(octofold_software_npu, library) {
    library.def("end_python() -> ()", software_npu::end_python);
    library.def("install(str[] npu) -> int", install);
}
