// libascendcl.so: the descriptors of the older way to launch operators, which torch_npu still makes; a launch fails, loudly.
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>

#include <string>
#include <vector>

#include "stream.h"

struct aclTensorDesc {
    aclDataType dtype;
    std::vector<int64_t> sizes;
    aclFormat format;
    std::string name;
};
struct aclDataBuffer {
    void *pointer;
    size_t bytes;
};
struct aclopAttr {};

namespace {
constexpr aclError kNoSuchOperator = 500002;
}

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
aclError aclopCompileAndExecute(
    const char *op, int, const aclTensorDesc *const *, const aclDataBuffer *const *, int, const aclTensorDesc *const *,
    aclDataBuffer *const *, const aclopAttr *, aclopEngineType, aclopCompileType, const char *, aclrtStream) {
    software_npu::report_error(0, std::string("the software NPU has no kernel for the operator ") + op);
    return kNoSuchOperator;
}

}  // extern "C"
