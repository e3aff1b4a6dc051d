// See settings.h. Timeouts bound how long a rank waits; the rest changes nothing here and is kept for tests to read.
#include "settings.h"

#include <algorithm>
#include <cctype>
#include <mutex>

#include "../acl/settings.h"

namespace software_npu {

namespace {

constexpr long kExecTimeoutS = 1836, kConnectTimeoutS = 120;  // HCCL's own
std::mutex mutex;
std::string groups;

long deterministic_by_environment() {
    std::string said = text("HCCL_DETERMINISTIC", "false");
    std::transform(said.begin(), said.end(), said.begin(), ::tolower);
    return said == "strict" ? 2 : said == "true";
}

}  // namespace

GroupSettings settings_of(const HcclCommConfig *config) {
    GroupSettings found{
        "",
        number("HCCL_BUFFSIZE", HCCL_COMM_DEFAULT_BUFFSIZE),
        deterministic_by_environment(),
        number("HCCL_EXEC_TIMEOUT", kExecTimeoutS),
        number("HCCL_CONNECT_TIMEOUT", kConnectTimeoutS),
    };
    if (config) {
        found.name = config->hcclCommName;
        if (config->hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET) found.buffer_mb = config->hcclBufferSize;
        if (config->hcclDeterministic != HCCL_COMM_DETERMINISTIC_CONFIG_NOT_SET) {
            found.deterministic = config->hcclDeterministic;
        }
        if (config->hcclExecTimeOut != HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET) {
            found.exec_timeout_s = config->hcclExecTimeOut;
        }
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (long value : {found.buffer_mb, found.deterministic, found.exec_timeout_s, found.connect_timeout_s}) {
        groups += std::to_string(value) + " ";
    }
    groups += found.name + "\n";
    return found;
}

}  // namespace software_npu

// A line for each communicator that this process has made: buffer in MB, deterministic, timeouts in s, name.
extern "C" const char *software_npu_groups() {
    static thread_local std::string shown;
    std::lock_guard<std::mutex> lock(software_npu::mutex);
    shown = software_npu::groups;
    return shown.c_str();
}
