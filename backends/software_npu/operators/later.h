// Operators and copies on NPU tensors that a stream computes while the host goes on, in asynchronous mode.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <functional>

namespace software_npu {

// Put an operator's work on torch_npu's current stream of its tensors' device, and its results, to be, on the stack
// instead of its arguments. False, and nothing done, where it has to be computed in the call: the values decide the shape
// of what comes out, or it is a number; no meta kernel knows it; it draws from a generator that nobody gave; memory of the
// host takes part (a number there does not).
bool call_later(const c10::OperatorHandle &op, torch::jit::Stack *stack);

// Copy between tensors of one NPU, or between one and page-locked memory of the host, on the current stream.
void copy_later(const at::Tensor &to, const at::Tensor &from);

// Python is about to end: what streams have yet to compute in it is left out. Waits for what is computed now.
void end_python();

// On torch_npu's current stream of a device, after all that was put there before; an exception comes to light where the
// host next waits. `op`: whom such an error names.
void enqueue(c10::Device device, const std::string &op, std::function<void()> work);

}  // namespace software_npu
