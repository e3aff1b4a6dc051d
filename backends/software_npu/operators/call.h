// An operator on NPU tensors, computed by its CPU kernel on the same memory.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace software_npu {

void call_on_cpu(const c10::OperatorHandle &op, c10::DispatchKeySet keys, torch::jit::Stack *stack);

}  // namespace software_npu
