// Operators and copies on NPU tensors that a stream computes while the host goes on, in asynchronous mode.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <functional>

namespace software_npu {

// Put an operator's work on the current stream of torch_npu, and its results, to be, on the stack instead of its
// arguments. False, and nothing done, where what comes out is not known before it is computed: the values decide its
// shape, a number is returned, no meta kernel knows it, or host memory takes part.
bool call_later(const c10::OperatorHandle &op, torch::jit::Stack *stack);

// Copy between NPU tensors, or between one and page-locked memory of the host, on the current stream.
void copy_later(const at::Tensor &to, const at::Tensor &from);

// Python is about to end: what streams have yet to compute in it is left out. Waits for what is computed now.
void end_python();

// On the current stream of torch_npu, after all that was put there before; an exception comes to light where the host
// next waits. `op`: whom such an error names.
void enqueue(const std::string &op, std::function<void()> work);

}  // namespace software_npu
