// libascendcl.so: devices, what they say of themselves, options and versions.
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>
#include <acl/acl_rt.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "settings.h"

namespace {

constexpr aclError kNoContext = 107002;
constexpr aclError kBadParameter = 107000;
constexpr int64_t kCores = 24;
// The newest that the wheel's headers speak of; code that asks for less must work with it.
constexpr const char *kCannVersion = "9.1.0";

// The current device is a thread's own; none until it is set.
thread_local int current_device = -1;

std::mutex options_mutex;
std::map<int, int64_t> system_options;

}  // namespace

extern "C" {

aclError aclInit(const char *) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }
void aclAppLog(aclLogLevel, const char *, const char *, uint32_t, const char *, ...) {}

const char *aclrtGetSocName() {
    static const std::string name = software_npu::text("SOFTWARE_NPU_SOC", "Ascend950PR_9599");
    return name.c_str();
}
aclError aclrtGetDeviceCount(uint32_t *count) {
    *count = software_npu::device_count();
    return ACL_SUCCESS;
}
aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= software_npu::device_count()) return kBadParameter;
    current_device = device;
    return ACL_SUCCESS;
}
aclError aclrtGetDevice(int32_t *device) {
    if (current_device < 0) return kNoContext;
    *device = current_device;
    return ACL_SUCCESS;
}
aclError aclrtResetDevice(int32_t) {
    current_device = -1;
    return ACL_SUCCESS;
}
// A context stands for its device.
aclError aclrtGetCurrentContext(aclrtContext *context) {
    if (current_device < 0) return kNoContext;
    *context = reinterpret_cast<aclrtContext>(static_cast<intptr_t>(current_device + 1));
    return ACL_SUCCESS;
}
aclError aclrtSetCurrentContext(aclrtContext context) {
    current_device = static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1;
    return ACL_SUCCESS;
}
aclError aclrtGetPrimaryCtxState(int32_t, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    *active = 1;
    return ACL_SUCCESS;
}
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) {
    *can = 1;
    return ACL_SUCCESS;
}
aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }
aclError aclrtDeviceGetBareTgid(int32_t *process) {
    *process = getpid();
    return ACL_SUCCESS;
}
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo what, int64_t *value) {
    *value = what == ACL_DEVICE_INFO_AI_CORE_NUM ? kCores : what == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? 2 * kCores : 1;
    return ACL_SUCCESS;
}
aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr what, int64_t *value) {
    bool memory = what == ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE;
    *value = memory ? static_cast<int64_t>(software_npu::memory_bytes()) : kCores;
    return ACL_SUCCESS;
}

// --- options: remembered, otherwise without effect

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    std::lock_guard<std::mutex> lock(options_mutex);
    *value = system_options[static_cast<int>(option)];
    return ACL_SUCCESS;
}
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    std::lock_guard<std::mutex> lock(options_mutex);
    system_options[static_cast<int>(option)] = value;
    return ACL_SUCCESS;
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
aclError aclSetCompileopt(aclCompileOpt, const char *) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return sizeof "disable"; }
aclError aclGetCompileopt(aclCompileOpt, char *value, size_t length) {
    snprintf(value, length, "disable");
    return ACL_SUCCESS;
}
aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion *version) {
    memset(version, 0, sizeof *version);
    snprintf(version->version, sizeof version->version, "%s", kCannVersion);
    return ACL_SUCCESS;
}
aclError aclsysGetVersionStr(char *, char *version) {
    strcpy(version, kCannVersion);
    return ACL_SUCCESS;
}

}  // extern "C"
