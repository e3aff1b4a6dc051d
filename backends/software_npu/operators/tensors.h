// Tensors of the software NPU as the CPU kernels see them, and back.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace software_npu {

bool is_npu(const at::Tensor &tensor);

// Wait for torch_npu's current stream of a device, so that what its kernels were to write is there.
void wait_for_stream(c10::Device device);

// A CPU tensor over the same memory, which shares storage offset, strides and flags with `tensor`; CPU tensors pass.
at::Tensor on_cpu(const at::Tensor &tensor);

// A tensor of `device` with the values of a CPU tensor. Copies.
at::Tensor copied_to_npu(const at::Tensor &values, c10::Device device);

// A CPU generator seeded from the state of an NPU generator (the device's default where none is given), which moves on.
at::Generator cpu_generator(std::optional<at::Generator> generator, c10::Device device);

}  // namespace software_npu
