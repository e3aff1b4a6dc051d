// A communicator: its mesh, its count of collectives, and what all collectives have in common.
#pragma once

#include <acl/acl_rt.h>
#include <hccl/hccl.h>

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "settings.h"
#include "transport.h"

namespace software_npu {

// What goes to one rank, or comes from it. Where that is nothing a message goes all the same, and says what is called.
struct Part {
    void *data = nullptr;
    uint64_t bytes = 0;
};

class Communicator {
   public:
    HcclResult open(const std::string &id, int size, int rank, const GroupSettings &settings);
    int size() const { return mesh_.size; }
    int rank() const { return mesh_.rank; }
    const std::string &id() const { return id_; }
    HcclResult failure() const { return failure_; }

    // Run on the stream: send `parts[r]` to rank r, receive into `into[r]` from rank r.
    HcclResult exchange(aclrtStream stream, Call call, std::vector<Part> parts, std::vector<Part> into);
    // The same, but what arrives is reduced into `out` (null: on this rank nothing is).
    HcclResult exchange_reduced(
        aclrtStream stream, Call call, std::vector<Part> parts, uint64_t count, void *out);
    HcclResult send(aclrtStream stream, Call call, int to, Part part);
    HcclResult receive(aclrtStream stream, Call call, int from, Part into);

   private:
    // Errors surface in the call, or in asynchronous mode where the host next waits.
    HcclResult run(aclrtStream stream, std::function<std::string()> work);
    std::string send_all(const Call &call, const std::vector<Part> &parts);

    std::string id_;
    Mesh mesh_;
    // Streams may run collectives in another order than they were called in: the number says which belong together.
    std::atomic<uint64_t> collectives_{0};
    std::atomic<HcclResult> failure_{HCCL_SUCCESS};  // set by a stream's thread
};

}  // namespace software_npu
