// Tensors of the software NPU as the CPU kernels see them, and back: see tensors.h.
#include "tensors.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>

#include "../acl/settings.h"

namespace software_npu {

namespace {
constexpr auto kNpu = c10::DeviceType::PrivateUse1;
// How far a call moves an NPU generator; one that draws more from its CPU twin still moves this far.
constexpr uint64_t kOffsetOfACall = 4;
}  // namespace

bool is_npu(const at::Tensor &tensor) { return tensor.defined() && tensor.device().type() == kNpu; }

void wait_for_stream(c10::Device device) {
    if (!is_async()) return;
    c10::impl::VirtualGuardImpl guard(kNpu);
    guard.synchronizeStream(guard.getStream(device));
}

at::Tensor on_cpu(const at::Tensor &tensor) {
    if (!is_npu(tensor)) return tensor;
    wait_for_stream(tensor.device());
    auto options = tensor.options().device(at::kCPU).pinned_memory(false);
    if (!tensor.numel() && tensor.dim() <= 1) return at::empty({0}, options);
    // Over the whole storage, so that arguments that overlap still do.
    auto storage = tensor.storage();
    auto bytes = at::from_blob(
        storage.mutable_data(), {static_cast<int64_t>(storage.nbytes())}, [storage](void *) {},
        at::TensorOptions().dtype(at::kByte));
    auto view = at::empty({0}, options);
    view.set_(bytes.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
    if (tensor.is_conj()) view._set_conj(true);
    if (tensor.is_neg()) view._set_neg(true);
    return view;
}

at::Tensor copied_to_npu(const at::Tensor &values, c10::Device device) {
    auto dense = values.is_non_overlapping_and_dense() ? values : values.contiguous();
    auto options = dense.options().device(device).pinned_memory(false);
    auto result = at::empty_strided(dense.sizes(), dense.strides(), options);
    if (!dense.numel()) return result;
    // The memory may have belonged to a tensor that a kernel on the stream still reads.
    wait_for_stream(result.device());
    memcpy(result.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
    return result;
}

at::Generator cpu_generator(std::optional<at::Generator> generator, c10::Device device) {
    bool given = generator.has_value() && generator->defined() && generator->device().type() == kNpu;
    at::Generator npu = given ? *generator : at::globalContext().defaultGenerator(device);
    std::lock_guard<std::mutex> lock(npu.mutex());
    uint64_t seed = npu.current_seed(), offset = npu.get_offset();
    npu.set_offset(offset + kOffsetOfACall);
    // Two odd constants mix seed and offset, so that neighbours give unrelated streams.
    uint64_t mixed = seed * 0x9E3779B97F4A7C15ull ^ (offset + 1) * 0xD1B54A32D192ED03ull;
    return at::detail::createCPUGenerator(mixed ^ mixed >> 31);
}

}  // namespace software_npu
