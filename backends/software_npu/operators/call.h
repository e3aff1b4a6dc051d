// An operator on NPU tensors, computed by its CPU kernel on the same memory: in the call, or later, by the stream.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace software_npu {

// Whether the operator is one of torch_npu's own, whose CPU kernels are in Python (reference_ops/).
bool is_python(const c10::OperatorHandle &op);

// Call the operator's kernel for CPU tensors.
void compute_on_cpu(const c10::OperatorHandle &op, torch::jit::Stack *stack);

void call_on_cpu(const c10::OperatorHandle &op, c10::DispatchKeySet keys, torch::jit::Stack *stack);

}  // namespace software_npu
