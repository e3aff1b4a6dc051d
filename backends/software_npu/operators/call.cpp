// An operator on NPU tensors, computed in the call by its CPU kernel on the same memory: arguments are viewed as CPU
// tensors, results that are views of arguments are views again, and others are copied into fresh NPU memory.
#include "call.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>

#include "../acl/settings.h"
#include "later.h"
#include "tensors.h"

namespace software_npu {

namespace {

using torch::jit::Stack;

class CpuCall {
   public:
    CpuCall(const c10::OperatorHandle &op, std::vector<c10::IValue> given) : op_(op), given_(std::move(given)) {
        for (size_t i = 0; i < given_.size(); i++) arguments_.push_back(converted(i));
    }

    Stack run() {
        Stack stack = arguments_;
        std::optional<c10::Device> drawing;
        if (on_npu_ && op_.hasTag(at::Tag::nondeterministic_seeded)) drawing = device_;
        std::optional<at::Tensor> state_before;
        if (drawing) {
            auto generator = cpu_generator(generator_, *drawing);
            if (generator_at_ >= 0) {
                stack[generator_at_] = c10::IValue(generator);
            } else {
                // The operator takes no generator and draws from the default one.
                auto standard = at::detail::getDefaultCPUGenerator();
                state_before = standard.get_state();
                standard.set_current_seed(generator.current_seed());
            }
        }
        compute_on_cpu(op_, &stack);
        if (state_before) {
            auto standard = at::detail::getDefaultCPUGenerator();
            standard.set_state(*state_before);
        }
        write_back();
        return stack;
    }

    c10::IValue result(const c10::IValue &value) const {
        if (value.isTensor()) return to_npu(value.toTensor());
        if (!value.isTensorList()) return value;
        std::vector<at::Tensor> tensors;
        for (const auto &tensor : value.toTensorVector()) tensors.push_back(to_npu(tensor));
        return c10::List<at::Tensor>(tensors);
    }

   private:
    struct Pair {
        at::Tensor npu, cpu;
    };

    at::Tensor cpu_of(const at::Tensor &tensor) {
        if (!is_npu(tensor)) return tensor;
        if (!on_npu_) device_ = tensor.device();
        on_npu_ = true;
        pairs_.push_back({tensor, on_cpu(tensor)});
        return pairs_.back().cpu;
    }

    c10::IValue converted(size_t index) {
        const auto &value = given_[index];
        if (value.isTensor()) return cpu_of(value.toTensor());
        if (value.isTensorList()) {
            std::vector<at::Tensor> tensors;
            for (const auto &tensor : value.toTensorVector()) tensors.push_back(cpu_of(tensor));
            return c10::List<at::Tensor>(tensors);
        }
        if (value.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> tensors;
            for (const std::optional<at::Tensor> &tensor : value.toOptionalTensorList().vec()) {
                tensors.push_back(tensor.has_value() ? std::optional(cpu_of(*tensor)) : tensor);
            }
            return tensors;
        }
        if (value.isDevice() && value.toDevice().type() == c10::DeviceType::PrivateUse1) {
            device_ = value.toDevice();
            on_npu_ = true;
            return c10::Device(at::kCPU);
        }
        if (op_.schema().arguments()[index].type()->str().find("Generator") != std::string::npos) {
            generator_at_ = static_cast<int>(index);
            if (value.isGenerator()) generator_ = value.toGenerator();
            // An NPU generator cannot enter a CPU kernel; `run` puts another here.
            return value.isGenerator() && value.toGenerator().device().is_cpu() ? value : c10::IValue();
        }
        return value;
    }

    // Arguments that the operator resized or gave another memory (`out=`): the NPU tensor follows.
    void write_back() {
        for (size_t i = 0; i < given_.size(); i++) {
            const auto *alias = op_.schema().arguments()[i].alias_info();
            if (!alias || !alias->isWrite() || !given_[i].isTensor()) continue;
            for (auto &[npu, cpu] : pairs_) {
                if (!npu.is_same(given_[i].toTensor())) continue;
                bool same_memory = cpu.storage().data() == npu.storage().data();
                if (same_memory && cpu.sizes() == npu.sizes() && cpu.strides() == npu.strides()) continue;
                npu.resize_(cpu.sizes());
                on_cpu(npu).copy_(cpu);
            }
        }
    }

    at::Tensor to_npu(const at::Tensor &tensor) const {
        if (!tensor.defined() || !tensor.device().is_cpu() || !on_npu_) return tensor;
        for (const auto &[npu, cpu] : pairs_) {
            if (cpu.is_same(tensor)) return npu;
        }
        for (const auto &[npu, cpu] : pairs_) {
            if (tensor.numel() && tensor.storage().data() == npu.storage().data()) {
                return npu.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
            }
        }
        return copied_to_npu(tensor, device_);
    }

    const c10::OperatorHandle &op_;
    std::vector<c10::IValue> given_;
    Stack arguments_;
    std::vector<Pair> pairs_;
    c10::Device device_{c10::DeviceType::PrivateUse1, 0};
    bool on_npu_ = false;
    std::optional<at::Generator> generator_;
    int generator_at_ = -1;
};

}  // namespace

bool is_python(const c10::OperatorHandle &op) { return op.operator_name().name.rfind("npu::", 0) == 0; }

void compute_on_cpu(const c10::OperatorHandle &op, Stack *stack) {
    // A kernel in Python may have autograd find a gradient.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!is_python(op)) below_autograd.emplace();
    op.callBoxed(stack);
}

void call_on_cpu(const c10::OperatorHandle &op, c10::DispatchKeySet, Stack *stack) {
    if (is_async() && call_later(op, stack)) return;
    const size_t arguments = op.schema().arguments().size(), returns = op.schema().returns().size();
    CpuCall call(op, torch::jit::last(*stack, arguments).vec());
    Stack results = call.run();
    torch::jit::drop(*stack, arguments);
    for (size_t i = 0; i < returns; i++) stack->push_back(call.result(results[i]));
}

}  // namespace software_npu
