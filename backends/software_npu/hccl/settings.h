// What a communicator is told when it is made, as HCCL reads it: by its configuration, else by the environment.
#pragma once

#include <hccl/hccl.h>

#include <string>

namespace software_npu {

struct GroupSettings {
    std::string name;  // as torch_npu gives it; empty where it does not
    long buffer_mb, deterministic, exec_timeout_s, connect_timeout_s;
};

// `config`: null where the caller has none. Remembered for `software_npu_groups`.
GroupSettings settings_of(const HcclCommConfig *config);

}  // namespace software_npu
