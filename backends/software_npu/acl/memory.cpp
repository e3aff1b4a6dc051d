// libascendcl.so: device memory on the host. A device has a capacity, so torch_npu's own OutOfMemoryError is reached, and
// fresh memory is poisoned, so that what is not written shows.
#include <acl/acl.h>
#include <acl/acl_rt.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "settings.h"

extern "C" void software_npu_enqueue(aclrtStream stream, void (*work)(void *), void *argument);
extern "C" void software_npu_wait_for_streams(int device);

namespace {

constexpr aclError kOutOfMemory = 207001;
constexpr aclError kBadParameter = 107000;
constexpr aclError kUnsupported = 207000;
constexpr size_t kAlignment = 512;
// As float32 -4.3e8, as bfloat16 too, as int32 large and negative: unlike anything that a computation gives.
constexpr int kPoison = 0xCD;

struct Block {
    size_t bytes;
    int device;
};
// Physical memory that is mapped at addresses reserved before (expandable segments).
struct Physical {
    int file;
    size_t bytes;
    int device;
};

std::mutex memory_mutex;
std::map<uintptr_t, Block> blocks;
// Page-locked memory of the host: bytes by address.
std::map<uintptr_t, size_t> locked;
std::map<int, size_t> used_bytes;

int device_or_first() {
    int32_t device = 0;
    return aclrtGetDevice(&device) == ACL_SUCCESS ? device : 0;
}

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

bool fits(int device, size_t bytes) { return used_bytes[device] + bytes <= software_npu::memory_bytes(); }

// Run on a stream what a lambda holds.
template <class Work>
void enqueue(aclrtStream stream, Work work) {
    auto call = [](void *held) {
        auto *kept = static_cast<Work *>(held);
        (*kept)();
        delete kept;
    };
    software_npu_enqueue(stream, call, new Work(std::move(work)));
}

}  // namespace

extern "C" {

// --- device memory

aclError aclrtMalloc(void **pointer, size_t bytes, aclrtMemMallocPolicy) {
    int device = device_or_first();
    std::lock_guard<std::mutex> lock(memory_mutex);
    *pointer = fits(device, bytes) ? aligned_alloc(kAlignment, rounded(bytes ? bytes : 1, kAlignment)) : nullptr;
    if (!*pointer) return kOutOfMemory;
    memset(*pointer, kPoison, bytes);
    blocks[reinterpret_cast<uintptr_t>(*pointer)] = {bytes, device};
    used_bytes[device] += bytes;
    return ACL_SUCCESS;
}
aclError aclrtMallocAlign32(void **pointer, size_t bytes, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(pointer, bytes, policy);
}
aclError aclrtFree(void *pointer) {
    std::unique_lock<std::mutex> lock(memory_mutex);
    auto found = blocks.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == blocks.end()) return kBadParameter;
    // As CANN does: work that is still to come may use it. Others may allocate meanwhile.
    int device = found->second.device;
    lock.unlock();
    software_npu_wait_for_streams(device);
    lock.lock();
    used_bytes[found->second.device] -= found->second.bytes;
    blocks.erase(found);
    free(pointer);
    return ACL_SUCCESS;
}
aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free_bytes, size_t *total_bytes) {
    int device = device_or_first();
    std::lock_guard<std::mutex> lock(memory_mutex);
    *total_bytes = software_npu::memory_bytes();
    *free_bytes = *total_bytes - used_bytes[device];
    return ACL_SUCCESS;
}
aclError aclrtPointerGetAttributes(const void *pointer, aclrtPtrAttributes *attributes) {
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto address = reinterpret_cast<uintptr_t>(pointer);
    auto after = blocks.upper_bound(address);
    auto after_locked = locked.upper_bound(address);
    memset(attributes, 0, sizeof *attributes);
    attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    if (after_locked != locked.begin()) {
        auto block = std::prev(after_locked);
        if (address < block->first + block->second) attributes->location.type = ACL_MEM_LOCATION_TYPE_HOST;
    }
    if (after != blocks.begin()) {
        auto block = std::prev(after);
        attributes->location.id = block->second.device;
        if (address < block->first + block->second.bytes) attributes->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
    }
    return ACL_SUCCESS;
}

// --- page-locked host memory

aclError aclrtMallocHost(void **pointer, size_t bytes) {
    *pointer = aligned_alloc(64, rounded(bytes ? bytes : 1, 64));
    if (!*pointer) return kOutOfMemory;
    std::lock_guard<std::mutex> lock(memory_mutex);
    locked[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
    return ACL_SUCCESS;
}
aclError aclrtMallocHostWithCfg(void **pointer, uint64_t bytes, aclrtMallocConfig *) {
    return aclrtMallocHost(pointer, bytes);
}
aclError aclrtFreeHost(void *pointer) {
    std::lock_guard<std::mutex> lock(memory_mutex);
    locked.erase(reinterpret_cast<uintptr_t>(pointer));
    free(pointer);
    return ACL_SUCCESS;
}

// --- copies

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind) {
    if (bytes > room) return kBadParameter;
    if (bytes) memmove(to, from, bytes);
    return ACL_SUCCESS;
}
aclError aclrtMemcpyAsync(
    void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind, aclrtStream stream) {
    if (bytes > room) return kBadParameter;
    enqueue(stream, [=] { memmove(to, from, bytes); });
    return ACL_SUCCESS;
}
aclError aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
    if (bytes > room) return kBadParameter;
    memset(to, value, bytes);
    return ACL_SUCCESS;
}
aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
    if (bytes > room) return kBadParameter;
    enqueue(stream, [=] { memset(to, value, bytes); });
    return ACL_SUCCESS;
}

// --- virtual memory: addresses are reserved, physical memory is a file in memory that is mapped there

aclError aclrtReserveMemAddress(void **pointer, size_t bytes, size_t, void *wanted, uint64_t) {
    void *reserved = mmap(wanted, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return kOutOfMemory;
    *pointer = reserved;
    return ACL_SUCCESS;
}
aclError aclrtReleaseMemAddress(void *) { return ACL_SUCCESS; }
aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t bytes, const aclrtPhysicalMemProp *, uint64_t) {
    int device = device_or_first();
    std::lock_guard<std::mutex> lock(memory_mutex);
    if (!fits(device, bytes)) return kOutOfMemory;
    int file = memfd_create("software_npu", 0);
    if (file < 0) return kOutOfMemory;
    if (ftruncate(file, bytes)) {
        close(file);
        return kOutOfMemory;
    }
    used_bytes[device] += bytes;
    *handle = reinterpret_cast<aclrtDrvMemHandle>(new Physical{file, bytes, device});
    return ACL_SUCCESS;
}
aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    auto *physical = reinterpret_cast<Physical *>(handle);
    std::lock_guard<std::mutex> lock(memory_mutex);
    used_bytes[physical->device] -= physical->bytes;
    close(physical->file);
    delete physical;
    return ACL_SUCCESS;
}
aclError aclrtMapMem(void *address, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
    auto *physical = reinterpret_cast<Physical *>(handle);
    void *mapped = mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file, offset);
    return mapped == MAP_FAILED ? kOutOfMemory : ACL_SUCCESS;
}
aclError aclrtUnmapMem(void *) { return ACL_SUCCESS; }
// Memory shared between processes is not there.
aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle, aclrtMemHandleType, uint64_t, uint64_t *) {
    return kUnsupported;
}
aclError aclrtMemImportFromShareableHandle(uint64_t, int32_t, aclrtDrvMemHandle *) { return kUnsupported; }
aclError aclrtMemSetPidToShareableHandle(uint64_t, int32_t *, size_t) { return kUnsupported; }

}  // extern "C"
