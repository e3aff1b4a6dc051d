// What a stream computes while the host goes on. Shapes of the results come from PyTorch's meta kernels, values from its
// CPU kernels once it is the work's turn: see later.h.
#include "later.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <acl/acl.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../acl/python_lock.h"
#include "call.h"
#include "place.h"
#include "tensors.h"

extern "C" void software_npu_enqueue(aclrtStream stream, void (*work)(void *), void *argument);
extern "C" void software_npu_report_error(int error, const char *message);

namespace software_npu {

namespace {

using torch::jit::Stack;

// CANN's number of an exception inside a kernel.
constexpr int kKernelFailed = 507015;

// A tensor argument: on the device, where its place is known, or the value of a number on the host.
struct Held {
    std::optional<Place> place;
    at::Tensor host;

    at::Tensor tensor(Storages &storages) const { return place ? place->view(storages) : host; }
};

// A list whose undefined tensors are absent.
c10::IValue optionals(const std::vector<at::Tensor> &tensors) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto &tensor : tensors) list.push_back(tensor.defined() ? std::optional(tensor) : std::nullopt);
    return list;
}

enum class Kind { plain, tensor, list, optionals };

struct Argument {
    Kind kind = Kind::plain;
    c10::IValue plain;
    std::vector<Held> held;

    c10::IValue value(Storages &storages) const {
        if (kind == Kind::plain) return plain;
        if (kind == Kind::tensor) return held[0].tensor(storages);
        std::vector<at::Tensor> tensors;
        for (const auto &one : held) tensors.push_back(one.tensor(storages));
        return kind == Kind::optionals ? optionals(tensors) : c10::IValue(c10::List<at::Tensor>(tensors));
    }
};

std::vector<at::Tensor> tensors_of(const c10::IValue &value) {
    if (value.isTensor()) return {value.toTensor()};
    if (value.isTensorList()) return value.toTensorVector();
    std::vector<at::Tensor> tensors;
    if (value.isOptionalTensorList()) {
        for (const std::optional<at::Tensor> &tensor : value.toOptionalTensorList().vec()) {
            tensors.push_back(tensor.value_or(at::Tensor()));
        }
    }
    return tensors;
}

Kind kind_of(const c10::IValue &value) {
    if (value.isTensor()) return Kind::tensor;
    if (value.isTensorList()) return Kind::list;
    return value.isOptionalTensorList() ? Kind::optionals : Kind::plain;
}

// Argument that is a generator, or -1.
int generator_of(const c10::FunctionSchema &schema) {
    for (size_t i = 0; i < schema.arguments().size(); i++) {
        if (schema.arguments()[i].type()->str().find("Generator") != std::string::npos) return static_cast<int>(i);
    }
    return -1;
}

// Their statistics are FP32 by the meta kernel; the CPU's own backward wants those in BF16 that its forward gives.
const std::set<std::string> kOtherDtypes = {
    "aten::native_layer_norm", "aten::native_group_norm", "aten::native_batch_norm", "aten::_native_batch_norm_legit"};

bool is_known_beforehand(const c10::OperatorHandle &op) {
    if (kOtherDtypes.count(op.operator_name().name)) return false;
    if (op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output)) return false;
    // Such a one draws from a generator that the whole process shares.
    if (op.hasTag(at::Tag::nondeterministic_seeded) && generator_of(op.schema()) < 0) return false;
    for (const auto &value : op.schema().returns()) {
        // Numbers of torch_npu's operators are not computed: seeds and sizes of dropout, which the meta kernel has, too.
        if (value.type()->str().find("Tensor") == std::string::npos && !is_python(op)) return false;
    }
    return true;
}

// What comes out of a call, found without computing it.
struct Plan {
    // A result: nothing, one of the call's own tensors, or a fresh one of this shape.
    struct Result {
        int own = -1;
        std::optional<at::Tensor> shape;
    };
    struct Returned {
        Kind kind = Kind::plain;
        c10::IValue plain;
        std::vector<Result> results;
    };
    // False where the call is not for later.
    bool is_known = false;
    std::vector<Returned> returned;
    // Sizes that the call's own tensors have afterwards (`out=`).
    std::vector<std::vector<int64_t>> sizes;
};

// Plans by call: a training step makes the same calls again and again, and many meta kernels are slow Python.
constexpr size_t kMostBytes = 32 << 20;  // of descriptions
size_t plans_bytes = 0;
std::mutex plans_mutex;
std::unordered_map<std::string, std::shared_ptr<const Plan>> plans;

std::shared_ptr<const Plan> known_plan(const std::string &call) {
    std::lock_guard<std::mutex> lock(plans_mutex);
    auto found = plans.find(call);
    return found == plans.end() ? nullptr : found->second;
}

void keep_plan(const std::string &call, std::shared_ptr<const Plan> plan) {
    std::lock_guard<std::mutex> lock(plans_mutex);
    plans_bytes += call.size();
    if (plans_bytes > kMostBytes) {
        plans.clear();
        plans_bytes = call.size();
    }
    plans[call] = std::move(plan);
}

// Of work in Python, one piece of which can run at a time anyway.
std::mutex python_mutex;
bool python_ended = false;

// A call with the tensors that it was given.
class Call {
   public:
    Call(const c10::OperatorHandle &op, std::vector<c10::IValue> given) : op_(op), given_(std::move(given)) {
        for (size_t i = 0; i < given_.size(); i++) {
            if (is_npu_device(given_[i])) device_ = given_[i].toDevice();
            const auto *alias = op_.schema().arguments()[i].alias_info();
            bool is_written = alias && alias->isWrite();
            for (const auto &tensor : tensors_of(given_[i])) {
                if (is_npu(tensor)) index_of(tensor);
                if (tensor.defined() && !is_npu(tensor) && (tensor.dim() || is_written)) takes_host_memory_ = true;
            }
        }
        if (!npu_.empty()) device_ = npu_[0].device();
    }

    bool is_possible() const { return device_ && !takes_host_memory_; }

    std::shared_ptr<const Plan> plan() {
        std::string call = description();
        auto plan = known_plan(call);
        if (!plan) keep_plan(call, plan = std::make_shared<const Plan>(planned()));
        return plan;
    }

    // Make the results and put the work on the stream.
    Stack put(const Plan &plan) {
        for (size_t i = 0; i < npu_.size(); i++) {
            if (npu_[i].sizes() != c10::IntArrayRef(plan.sizes[i])) npu_[i].resize_(plan.sizes[i]);
        }
        std::vector<Argument> arguments;
        for (const auto &value : given_) arguments.push_back(argument(value));
        if (op_.hasTag(at::Tag::nondeterministic_seeded)) {
            int at = generator_of(op_.schema());
            const auto &value = given_[at];
            bool of_host = value.isGenerator() && value.toGenerator().device().is_cpu();
            auto generator = value.isGenerator() ? std::optional(value.toGenerator()) : std::nullopt;
            if (!of_host) arguments[at].plain = c10::IValue(cpu_generator(generator, *device_));
        }
        std::vector<std::optional<Place>> fresh;
        Stack results;
        for (const auto &returned : plan.returned) {
            std::vector<at::Tensor> tensors;
            for (const auto &result : returned.results) tensors.push_back(made(result, fresh));
            if (returned.kind == Kind::plain) results.push_back(returned.plain);
            if (returned.kind == Kind::tensor) results.push_back(tensors[0]);
            if (returned.kind == Kind::list) results.push_back(c10::List<at::Tensor>(tensors));
        }
        const auto &op = op_;
        auto work = [op, arguments = std::move(arguments), fresh = std::move(fresh)] { compute(op, arguments, fresh); };
        enqueue(*device_, c10::toString(op.operator_name()), std::move(work));
        return results;
    }

   private:
    static bool is_npu_device(const c10::IValue &value) {
        return value.isDevice() && value.toDevice().type() == c10::DeviceType::PrivateUse1;
    }

    size_t index_of(const at::Tensor &npu) {
        for (size_t i = 0; i < npu_.size(); i++) {
            if (npu_[i].is_same(npu)) return i;
        }
        npu_.push_back(npu);
        return npu_.size() - 1;
    }

    // All that a plan depends on.
    std::string description() {
        std::ostringstream out;
        out << op_.operator_name() << at::get_default_dtype().name();
        // What writes into its arguments has their shapes: a learning rate that changes does not matter.
        bool are_numbers_left_out = op_.schema().is_mutable();
        for (const auto &tensor : npu_) {
            auto same = std::find_if(npu_.begin(), npu_.end(), [&](const at::Tensor &other) {
                return other.storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl();
            });
            out << '|' << tensor.dtype().name() << tensor.sizes() << tensor.strides() << same - npu_.begin()
                << tensor.is_conj() << tensor.is_neg();
        }
        for (const auto &value : given_) {
            out << '|' << static_cast<int>(kind_of(value)) << value.tagKind();
            if (kind_of(value) == Kind::plain) {
                bool is_number = value.isDouble() || value.isDoubleList();
                if (!value.isGenerator() && !(is_number && are_numbers_left_out)) out << value;
                continue;
            }
            for (const auto &tensor : tensors_of(value)) {
                if (is_npu(tensor)) {
                    out << ' ' << index_of(tensor);
                } else if (tensor.defined()) {
                    out << ' ' << tensor.dtype().name() << tensor.unsafeGetTensorImpl()->is_wrapped_number();
                } else {
                    out << " -";
                }
            }
        }
        return out.str();
    }

    // By the meta kernel.
    Plan planned() {
        std::vector<at::Tensor> twins;
        for (const auto &tensor : npu_) {
            auto options = tensor.options().device(at::kMeta).pinned_memory(false);
            twins.push_back(at::empty_strided(tensor.sizes(), tensor.strides(), options));
        }
        Stack stack;
        for (const auto &value : given_) stack.push_back(meta_argument(value, twins));
        if (!call_meta(stack)) return {};
        Plan plan;
        for (const auto &value : stack) {
            plan.returned.push_back({kind_of(value), kind_of(value) == Kind::plain ? value : c10::IValue(), {}});
            for (const auto &tensor : tensors_of(value)) {
                Plan::Result result;
                if (tensor.defined()) {
                    auto same = std::find_if(
                        twins.begin(), twins.end(), [&](const at::Tensor &twin) { return twin.is_same(tensor); });
                    if (same != twins.end()) {
                        result.own = static_cast<int>(same - twins.begin());
                    } else if (std::any_of(twins.begin(), twins.end(), [&](const at::Tensor &twin) {
                                   return twin.is_alias_of(tensor);
                               })) {
                        return {};
                    } else {
                        result.shape = tensor;
                    }
                }
                plan.returned.back().results.push_back(result);
            }
        }
        for (const auto &twin : twins) plan.sizes.push_back(twin.sizes().vec());
        plan.is_known = true;
        return plan;
    }

    // False where there is no meta kernel, or one that the arguments are wrong for: then the CPU's says so.
    bool call_meta(Stack &stack) {
        bool done = false;
        // In a thread of its own: many are Python, and what a signal raises in the main one is for who called us.
        std::thread thread([&] {
            at::AutoDispatchBelowADInplaceOrView below_autograd;
            try {
                op_.callBoxed(stack);
                done = true;
            } catch (const std::exception &) {
            }
        });
        WithoutPythonsLock waiting;
        thread.join();
        return done;
    }

    c10::IValue meta_argument(const c10::IValue &value, const std::vector<at::Tensor> &twins) {
        if (is_npu_device(value)) return c10::Device(at::kMeta);
        if (value.isGenerator()) return {};
        if (kind_of(value) == Kind::plain) return value;
        std::vector<at::Tensor> seen;
        for (const auto &tensor : tensors_of(value)) seen.push_back(is_npu(tensor) ? twins[index_of(tensor)] : tensor);
        if (value.isTensor()) return seen[0];
        if (value.isTensorList()) return c10::List<at::Tensor>(seen);
        return optionals(seen);
    }

    Argument argument(const c10::IValue &value) const {
        Argument made{kind_of(value), value, {}};
        if (is_npu_device(value)) made.plain = c10::Device(at::kCPU);
        if (made.kind == Kind::plain) return made;
        made.plain = c10::IValue();
        for (const auto &tensor : tensors_of(value)) {
            if (is_npu(tensor)) {
                made.held.push_back({Place(tensor), at::Tensor()});
            } else if (tensor.defined()) {
                // The host may change it before its turn comes.
                auto copy = tensor.clone();
                copy.unsafeGetTensorImpl()->set_wrapped_number(tensor.unsafeGetTensorImpl()->is_wrapped_number());
                made.held.push_back({std::nullopt, copy});
            } else {
                made.held.push_back({std::nullopt, at::Tensor()});
            }
        }
        return made;
    }

    at::Tensor made(const Plan::Result &result, std::vector<std::optional<Place>> &fresh) const {
        fresh.push_back(std::nullopt);
        if (!result.shape) return result.own < 0 ? at::Tensor() : npu_[result.own];
        const auto &shape = *result.shape;
        auto tensor = at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(*device_));
        fresh.back() = Place(tensor);
        return tensor;
    }

    // On the stream.
    static void compute(const c10::OperatorHandle &op, const std::vector<Argument> &arguments,
                        const std::vector<std::optional<Place>> &fresh) {
        if (!is_python(op)) return compute_now(op, arguments, fresh);
        std::lock_guard<std::mutex> lock(python_mutex);
        if (!python_ended) compute_now(op, arguments, fresh);
    }

    // `fresh` are the places of results, in order; nothing where a result is an argument.
    static void compute_now(const c10::OperatorHandle &op, const std::vector<Argument> &arguments,
                            const std::vector<std::optional<Place>> &fresh) {
        Storages storages;
        Stack stack;
        for (const auto &argument : arguments) stack.push_back(argument.value(storages));
        compute_on_cpu(op, &stack);
        size_t at = 0;
        for (const auto &value : stack) {
            for (const auto &tensor : tensors_of(value)) {
                const auto &place = fresh.at(at++);
                if (!place) continue;
                auto room = place->view(storages);
                bool as_expected = tensor.defined() && tensor.sizes() == room.sizes();
                // A reference kernel keeps to torch_npu's word. PyTorch's own follow the default dtype, which may be
                // another one by now.
                as_expected = as_expected && (!is_python(op) || tensor.dtype() == room.dtype());
                TORCH_CHECK(as_expected, "the meta kernel expects ", room.sizes(), " of ", room.dtype(),
                            ", the CPU's gives ", tensor.defined() ? tensor.toString() : "nothing");
                room.copy_(tensor);
            }
        }
    }

    const c10::OperatorHandle &op_;
    std::vector<c10::IValue> given_;
    // Each once.
    std::vector<at::Tensor> npu_;
    std::optional<c10::Device> device_;
    bool takes_host_memory_ = false;
};

struct Work {
    std::string op;
    std::function<void()> work;
};

void run(void *held) {
    std::unique_ptr<Work> work(static_cast<Work *>(held));
    at::NoGradGuard no_gradients;
    try {
        work->work();
    } catch (const c10::Error &error) {
        software_npu_report_error(kKernelFailed, (work->op + ": " + error.what_without_backtrace()).c_str());
    } catch (const std::exception &error) {
        software_npu_report_error(kKernelFailed, (work->op + ": " + error.what()).c_str());
    }
}

}  // namespace

void end_python() {
    std::lock_guard<std::mutex> lock(python_mutex);
    python_ended = true;
}

void enqueue(c10::Device device, const std::string &op, std::function<void()> work) {
    // `stream()` waits until what torch_npu holds in a queue of its own has been put there.
    auto stream = c10_npu::getCurrentNPUStream(device.index());
    software_npu_enqueue(stream.stream(), run, new Work{op, std::move(work)});
}

bool call_later(const c10::OperatorHandle &op, Stack *stack) {
    if (!is_known_beforehand(op)) return false;
    const size_t arguments = op.schema().arguments().size();
    Call call(op, torch::jit::last(*stack, arguments).vec());
    if (!call.is_possible()) return false;
    auto plan = call.plan();
    if (!plan->is_known) return false;
    Stack results = call.put(*plan);
    torch::jit::drop(*stack, arguments);
    for (auto &value : results) stack->push_back(std::move(value));
    return true;
}

void copy_later(const at::Tensor &to, const at::Tensor &from) {
    auto held = [](const at::Tensor &tensor) {
        // Page-locked memory is kept until then, as torch_npu's allocator for it does by an event.
        return is_npu(tensor) ? Held{Place(tensor), at::Tensor()} : Held{std::nullopt, tensor.detach()};
    };
    enqueue(is_npu(to) ? to.device() : from.device(), "copy_", [to = held(to), from = held(from)] {
        Storages storages;
        to.tensor(storages).copy_(from.tensor(storages));
    });
}

}  // namespace software_npu
