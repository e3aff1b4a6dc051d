// libascendcl.so: the older way to launch operators, by name and descriptors. torch_npu still takes it on chips before
// Ascend 950 for a few operators of its C++ code, which pass by PyTorch's dispatcher. Those that it needs between ranks are
// here; another one fails, loudly.
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>

#include <cstring>
#include <string>
#include <vector>

#include "stream.h"

extern "C" void software_npu_enqueue(aclrtStream stream, void (*work)(void *), void *argument);

struct aclTensorDesc {
    aclDataType dtype;
    std::vector<int64_t> sizes;
    aclFormat format;
    std::string name;
    // Values that are known on the host when the operator is launched, and may be gone when it runs.
    std::vector<char> constant;

    size_t numel() const {
        size_t product = 1;
        for (int64_t size : sizes) product *= size;
        return product;
    }
};
struct aclDataBuffer {
    void *pointer;
    size_t bytes;
};
struct aclopAttr {};

namespace {
constexpr aclError kNoSuchOperator = 500002;

struct Operand {
    aclTensorDesc description;
    char *pointer;

    const char *data() const { return description.constant.empty() ? pointer : description.constant.data(); }
    size_t item() const { return aclDataTypeSize(description.dtype); }
    std::vector<int64_t> integers() const {
        std::vector<int64_t> numbers;
        for (size_t i = 0; i < description.numel(); ++i) {
            int32_t narrow;
            int64_t wide;
            memcpy(&narrow, data() + i * 4, 4);
            if (item() == 8) memcpy(&wide, data() + i * 8, 8);
            numbers.push_back(item() == 8 ? wide : narrow);
        }
        return numbers;
    }
};
using Kernel = void (*)(const std::vector<Operand> &inputs, const Operand &output);

struct Launch {
    Kernel kernel;
    std::vector<Operand> inputs;
    Operand output;
};

// Fill(dims, value): a tensor of one value.
void fill(const std::vector<Operand> &inputs, const Operand &output) {
    for (size_t i = 0; i < output.description.numel(); ++i)
        memcpy(output.pointer + i * output.item(), inputs[1].data(), output.item());
}

// PadV3(x, paddings, value): values before and after each dim, as pairs from the first dim on.
void pad(const std::vector<Operand> &inputs, const Operand &output) {
    const Operand &x = inputs[0];
    const std::vector<int64_t> pads = inputs[1].integers(), &from = x.description.sizes, &to = output.description.sizes;
    const std::vector<char> zero(output.item(), 0);
    const char *value = inputs.size() > 2 ? inputs[2].data() : zero.data();
    for (size_t place = 0; place < output.description.numel(); ++place) {
        size_t rest = place, source = 0, stride = 1;
        bool inside = true;
        for (size_t dim = to.size(); dim-- > 0; rest /= to[dim]) {
            const int64_t index = static_cast<int64_t>(rest % to[dim]) - pads[2 * dim];
            inside = inside && index >= 0 && index < from[dim];
            source += index * stride;
            stride *= from[dim];
        }
        const char *found = inside ? x.pointer + source * output.item() : value;
        memcpy(output.pointer + place * output.item(), found, output.item());
    }
}

Kernel kernel_of(const std::string &op) {
    if (op == "Fill") return fill;
    if (op == "PadV3") return pad;
    return nullptr;
}

void run(void *launch) {
    auto *given = static_cast<Launch *>(launch);
    given->kernel(given->inputs, given->output);
    delete given;
}

}  // namespace

extern "C" {

aclTensorDesc *aclCreateTensorDesc(aclDataType dtype, int dims, const int64_t *sizes, aclFormat format) {
    return new aclTensorDesc{dtype, {sizes, sizes + dims}, format, ""};
}
void aclDestroyTensorDesc(const aclTensorDesc *desc) { delete desc; }
size_t aclGetTensorDescNumDims(const aclTensorDesc *desc) { return desc->sizes.size(); }
aclError aclGetTensorDescDimV2(const aclTensorDesc *desc, size_t dim, int64_t *size) {
    *size = desc->sizes[dim];
    return ACL_SUCCESS;
}
aclFormat aclGetTensorDescFormat(const aclTensorDesc *desc) { return desc->format; }
aclDataType aclGetTensorDescType(const aclTensorDesc *desc) { return desc->dtype; }
void aclSetTensorDescName(aclTensorDesc *desc, const char *name) { desc->name = name ? name : ""; }
aclDataBuffer *aclCreateDataBuffer(void *pointer, size_t bytes) { return new aclDataBuffer{pointer, bytes}; }
aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
    delete buffer;
    return ACL_SUCCESS;
}
aclopAttr *aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr *attributes) { delete attributes; }
size_t aclDataTypeSize(aclDataType dtype) {
    switch (dtype) {
        case ACL_BOOL: case ACL_INT8: case ACL_UINT8: return 1;
        case ACL_FLOAT16: case ACL_BF16: case ACL_INT16: case ACL_UINT16: return 2;
        case ACL_FLOAT: case ACL_INT32: case ACL_UINT32: return 4;
        case ACL_DOUBLE: case ACL_INT64: case ACL_UINT64: case ACL_COMPLEX64: return 8;
        default: return 0;
    }
}
aclError aclSetTensorConst(aclTensorDesc *desc, void *data, size_t bytes) {
    desc->constant.assign(static_cast<char *>(data), static_cast<char *>(data) + bytes);
    return ACL_SUCCESS;
}
aclError aclopCompileAndExecute(
    const char *op, int inputs, const aclTensorDesc *const *input_descs, const aclDataBuffer *const *input_buffers, int,
    const aclTensorDesc *const *output_descs, aclDataBuffer *const *output_buffers, const aclopAttr *, aclopEngineType,
    aclopCompileType, const char *, aclrtStream stream) {
    const Kernel kernel = kernel_of(op);
    // Of other dtypes nobody has asked for either.
    if (kernel == nullptr || aclDataTypeSize(output_descs[0]->dtype) == 0) {
        software_npu::report_error(0, std::string("the software NPU has no kernel for the operator ") + op);
        return kNoSuchOperator;
    }
    auto *launch = new Launch{kernel, {}, {*output_descs[0], static_cast<char *>(output_buffers[0]->pointer)}};
    for (int i = 0; i < inputs; ++i)
        launch->inputs.push_back({*input_descs[i], static_cast<char *>(input_buffers[i]->pointer)});
    software_npu_enqueue(stream, run, launch);
    return ACL_SUCCESS;
}

}  // extern "C"
