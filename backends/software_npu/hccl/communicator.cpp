// What all collectives have in common: see communicator.h. Also the calls that make, name and destroy communicators.
#include "communicator.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "../acl/settings.h"
#include "rank_table.h"
#include "reduce.h"

extern "C" void software_npu_enqueue(aclrtStream stream, void (*work)(void *), void *argument);
extern "C" void software_npu_report_error(int error, const char *message);

namespace software_npu {

namespace {
constexpr int kHcclFailedOnDevice = 507899;
}

HcclResult Communicator::open(const std::string &id, int size, int rank, const GroupSettings &settings) {
    id_ = id;
    std::string wrong = mesh_.open(id, size, rank, settings);
    if (wrong.empty()) return HCCL_SUCCESS;
    software_npu_report_error(0, ("rank " + std::to_string(rank) + " of a new group of " + std::to_string(size) + ": " + wrong).c_str());
    return failure_ = HCCL_E_TIMEOUT;
}

HcclResult Communicator::run(aclrtStream stream, std::function<std::string()> work) {
    auto checked = [this, work = std::move(work)] {
        std::string wrong = work();
        if (wrong.empty()) return HCCL_SUCCESS;
        software_npu_report_error(is_async() ? kHcclFailedOnDevice : 0, wrong.c_str());
        fprintf(stderr, "software NPU: %s\n", wrong.c_str());
        return failure_ = HCCL_E_REMOTE;
    };
    if (!is_async()) return checked();
    auto call = [](void *held) {
        auto *kept = static_cast<decltype(checked) *>(held);
        (*kept)();
        delete kept;
    };
    software_npu_enqueue(stream, call, new auto(std::move(checked)));
    return HCCL_SUCCESS;
}

std::string Communicator::send_all(const Call &call, const std::vector<Part> &parts) {
    // Every rank begins with itself, so that not all write to rank 0 first.
    for (int step = 0; step < size(); step++) {
        int to = (rank() + step) % size();
        std::string wrong = mesh_.send(to, call, parts[to].data, parts[to].bytes);
        if (!wrong.empty()) return wrong;
    }
    return "";
}

HcclResult Communicator::exchange(aclrtStream stream, Call call, std::vector<Part> parts, std::vector<Part> into) {
    call.number = collectives_++;
    return run(stream, [this, call, parts = std::move(parts), into = std::move(into)]() -> std::string {
        std::string wrong = send_all(call, parts);
        for (int from = 0; from < size() && wrong.empty(); from++) {
            Message message;
            wrong = mesh_.receive(from, call, into[from].bytes, message);
            if (wrong.empty() && into[from].bytes) memcpy(into[from].data, message.data.data(), into[from].bytes);
        }
        return wrong;
    });
}

HcclResult Communicator::exchange_reduced(
    aclrtStream stream, Call call, std::vector<Part> parts, uint64_t count, void *out) {
    call.number = collectives_++;
    return run(stream, [=, this]() -> std::string {
        std::string wrong = send_all(call, parts);
        auto dtype = static_cast<HcclDataType>(call.dtype);
        uint64_t bytes = out ? count * element_bytes(dtype) : 0;
        std::vector<std::vector<char>> arrived(size());
        for (int from = 0; from < size() && wrong.empty(); from++) {
            Message message;
            wrong = mesh_.receive(from, call, bytes, message);
            arrived[from] = std::move(message.data);
        }
        if (!wrong.empty() || !out || reduce(dtype, static_cast<HcclReduceOp>(call.reduction), arrived, out, count)) return wrong;
        return mesh_.name(rank()) + " in " + describe(call, arrived[0].size()) + ": HCCL does not reduce this dtype";
    });
}

HcclResult Communicator::send(aclrtStream stream, Call call, int to, Part part) {
    return run(stream, [=, this] { return mesh_.send(to, call, part.data, part.bytes); });
}

HcclResult Communicator::receive(aclrtStream stream, Call call, int from, Part into) {
    return run(stream, [=, this] {
        Message message;
        std::string wrong = mesh_.receive(from, call, into.bytes, message);
        if (wrong.empty() && into.bytes) memcpy(into.data, message.data.data(), into.bytes);
        return wrong;
    });
}

}  // namespace software_npu

using software_npu::Communicator;

namespace {

Communicator *of(HcclComm communicator) { return static_cast<Communicator *>(communicator); }

HcclResult make(
    const std::string &id, uint32_t size, uint32_t rank, const HcclCommConfig *config, HcclComm *communicator) {
    auto made = std::make_unique<Communicator>();
    HcclResult result = made->open(id, size, rank, software_npu::settings_of(config));
    if (result == HCCL_SUCCESS) *communicator = made.release();
    return result;
}

}  // namespace

extern "C" {

// What rank 0 makes and the others are told: a name for the sockets.
HcclResult HcclGetRootInfo(HcclRootInfo *info) {
    static std::atomic<int> made{0};
    memset(info, 0, sizeof *info);
    long now = std::chrono::system_clock::now().time_since_epoch().count() % 1000000000;
    snprintf(info->internal, sizeof info->internal, "%d-%d-%ld", getpid(), made++, now);
    return HCCL_SUCCESS;
}
HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo *info, uint32_t rank, HcclComm *communicator) {
    return make(info->internal, size, rank, nullptr, communicator);
}
HcclResult HcclCommInitRootInfoConfig(
    uint32_t size, const HcclRootInfo *info, uint32_t rank, const HcclCommConfig *config, HcclComm *communicator) {
    return make(info->internal, size, rank, config, communicator);
}
HcclResult HcclCommInitClusterInfoConfig(
    const char *path, uint32_t rank, HcclCommConfig *config, HcclComm *communicator) {
    int32_t device = 0;
    aclrtGetDevice(&device);
    auto table = software_npu::read_rank_table(path, static_cast<int>(rank), device);
    if (!table.wrong.empty()) {
        software_npu_report_error(0, table.wrong.c_str());
        return HCCL_E_PARA;
    }
    return make(table.id, table.size, rank, config, communicator);
}
HcclResult HcclCreateSubCommConfig(
    HcclComm *parent, uint32_t size, uint32_t *, uint64_t id, uint32_t rank, HcclCommConfig *config, HcclComm *made) {
    return make(of(*parent)->id() + "." + std::to_string(id), size, rank, config, made);
}
HcclResult HcclCommDestroy(HcclComm communicator) {
    delete of(communicator);
    return HCCL_SUCCESS;
}
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
HcclResult HcclGetCommName(HcclComm communicator, char *name) {
    snprintf(name, COMM_NAME_MAX_LENGTH, "%s", of(communicator)->id().c_str());
    return HCCL_SUCCESS;
}
HcclResult HcclGetRankSize(HcclComm communicator, uint32_t *size) {
    *size = of(communicator)->size();
    return HCCL_SUCCESS;
}
HcclResult HcclGetRankId(HcclComm communicator, uint32_t *rank) {
    *rank = of(communicator)->rank();
    return HCCL_SUCCESS;
}
HcclResult HcclGetCommAsyncError(HcclComm communicator, HcclResult *result) {
    *result = of(communicator)->failure();
    return HCCL_SUCCESS;
}
const char *HcclGetErrorString(HcclResult) { return "see the software NPU's message"; }
uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }
// Calls between these two may wait for each other on a device; here no send waits.
HcclResult HcclGroupStart() { return HCCL_SUCCESS; }
HcclResult HcclGroupEnd() { return HCCL_SUCCESS; }

}  // extern "C"
