// What the environment says of the software NPU (backends/software_npu/settings.py writes it). Read when first asked.
#pragma once

#include <cstdlib>
#include <string>

namespace software_npu {

inline long number(const char *name, long otherwise) {
    const char *text = std::getenv(name);
    return text && *text ? std::atol(text) : otherwise;
}

inline std::string text(const char *name, const char *otherwise) {
    const char *found = std::getenv(name);
    return found && *found ? found : otherwise;
}

// Whether streams are worker threads; otherwise everything runs inside the call that asks for it.
inline bool is_async() {
    static const bool async = number("SOFTWARE_NPU_ASYNC", 0) != 0;
    return async;
}

inline int device_count() {
    static const int count = static_cast<int>(number("SOFTWARE_NPU_DEVICES", 8));
    return count;
}

inline size_t memory_bytes() {
    static const size_t bytes = static_cast<size_t>(number("SOFTWARE_NPU_MEMORY_MB", 4096)) << 20;
    return bytes;
}

}  // namespace software_npu
