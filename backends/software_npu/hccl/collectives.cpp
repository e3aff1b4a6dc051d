// libhccl.so: the collectives, each as what goes from rank to rank.
#include <acl/acl_rt.h>
#include <hccl/hccl.h>

#include "communicator.h"
#include "reduce.h"

using software_npu::Call;
using software_npu::Communicator;
using software_npu::element_bytes;
using software_npu::Kind;
using software_npu::Part;

namespace {

using Parts = std::vector<Part>;
const Part kNothing{};

Communicator *of(HcclComm communicator) { return static_cast<Communicator *>(communicator); }

// `count`: 0 where each rank may have another.
Call call_of(Kind kind, HcclDataType dtype, uint64_t count, HcclReduceOp op = HCCL_REDUCE_SUM, uint32_t root = 0) {
    return {kind, static_cast<uint32_t>(dtype), static_cast<uint32_t>(op), root, count, 0};
}

// The bytes from element `start` on.
Part part(const void *data, uint64_t start, uint64_t count, HcclDataType dtype) {
    auto *place = const_cast<char *>(static_cast<const char *>(data));
    uint64_t size = element_bytes(dtype);
    return {place + start * size, count * size};
}

// Rank r's `count` elements lie at r * count.
Parts rows(const void *data, int ranks, uint64_t count, HcclDataType dtype) {
    Parts parts;
    for (int rank = 0; rank < ranks; rank++) parts.push_back(part(data, rank * count, count, dtype));
    return parts;
}

// Rank r's `counts[r]` elements lie at `starts[r]`. Both belong to the caller, who may free them once the call returns.
Parts ragged(const void *data, int ranks, const void *counts, const void *starts, HcclDataType dtype) {
    auto *count = static_cast<const uint64_t *>(counts), *start = static_cast<const uint64_t *>(starts);
    Parts parts;
    for (int rank = 0; rank < ranks; rank++) parts.push_back(part(data, start[rank], count[rank], dtype));
    return parts;
}

// Only rank `only` gets, or gives, something.
Parts single(int ranks, int only, Part its) {
    Parts parts(ranks, kNothing);
    parts[only] = its;
    return parts;
}

}  // namespace

extern "C" {

HcclResult HcclAllReduce(void *from, void *to, uint64_t count, HcclDataType dtype, HcclReduceOp op, HcclComm comm,
                         aclrtStream stream) {
    Parts parts(of(comm)->size(), part(from, 0, count, dtype));
    return of(comm)->exchange_reduced(stream, call_of(Kind::all_reduce, dtype, count, op), parts, count, to);
}
HcclResult HcclReduce(void *from, void *to, uint64_t count, HcclDataType dtype, HcclReduceOp op, uint32_t root,
                      HcclComm comm, aclrtStream stream) {
    Parts parts = single(of(comm)->size(), root, part(from, 0, count, dtype));
    void *out = of(comm)->rank() == static_cast<int>(root) ? to : nullptr;
    return of(comm)->exchange_reduced(stream, call_of(Kind::reduce, dtype, count, op, root), parts, count, out);
}
HcclResult HcclReduceScatter(void *from, void *to, uint64_t count, HcclDataType dtype, HcclReduceOp op, HcclComm comm,
                             aclrtStream stream) {
    Parts parts = rows(from, of(comm)->size(), count, dtype);
    return of(comm)->exchange_reduced(stream, call_of(Kind::reduce_scatter, dtype, count, op), parts, count, to);
}
HcclResult HcclReduceScatterV(void *from, const void *counts, const void *starts, void *to, uint64_t count,
                              HcclDataType dtype, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    Parts parts = ragged(from, of(comm)->size(), counts, starts, dtype);
    return of(comm)->exchange_reduced(stream, call_of(Kind::reduce_scatter, dtype, 0, op), parts, count, to);
}
HcclResult HcclBroadcast(void *data, uint64_t count, HcclDataType dtype, uint32_t root, HcclComm comm,
                         aclrtStream stream) {
    int ranks = of(comm)->size();
    Part all = part(data, 0, count, dtype);
    bool gives = of(comm)->rank() == static_cast<int>(root);
    Parts parts = gives ? Parts(ranks, all) : Parts(ranks, kNothing);
    Parts into = gives ? Parts(ranks, kNothing) : single(ranks, root, all);
    parts[root] = kNothing;
    return of(comm)->exchange(stream, call_of(Kind::broadcast, dtype, count, HCCL_REDUCE_SUM, root), parts, into);
}
HcclResult HcclScatter(void *from, void *to, uint64_t count, HcclDataType dtype, uint32_t root, HcclComm comm,
                       aclrtStream stream) {
    int ranks = of(comm)->size();
    bool gives = of(comm)->rank() == static_cast<int>(root);
    Parts parts = gives ? rows(from, ranks, count, dtype) : Parts(ranks, kNothing);
    Parts into = single(ranks, root, part(to, 0, count, dtype));
    return of(comm)->exchange(stream, call_of(Kind::scatter, dtype, count, HCCL_REDUCE_SUM, root), parts, into);
}
HcclResult HcclAllGather(void *from, void *to, uint64_t count, HcclDataType dtype, HcclComm comm, aclrtStream stream) {
    int ranks = of(comm)->size();
    Parts parts(ranks, part(from, 0, count, dtype));
    return of(comm)->exchange(stream, call_of(Kind::all_gather, dtype, count), parts, rows(to, ranks, count, dtype));
}
HcclResult HcclAllGatherV(void *from, uint64_t count, void *to, const void *counts, const void *starts,
                          HcclDataType dtype, HcclComm comm, aclrtStream stream) {
    int ranks = of(comm)->size();
    Parts parts(ranks, part(from, 0, count, dtype));
    Parts into = ragged(to, ranks, counts, starts, dtype);
    return of(comm)->exchange(stream, call_of(Kind::all_gather, dtype, 0), parts, into);
}
HcclResult HcclAlltoAllV(const void *from, const void *send_counts, const void *send_starts, HcclDataType send_dtype,
                         const void *to, const void *receive_counts, const void *receive_starts,
                         HcclDataType receive_dtype, HcclComm comm, aclrtStream stream) {
    int ranks = of(comm)->size();
    Parts parts = ragged(from, ranks, send_counts, send_starts, send_dtype);
    Parts into = ragged(to, ranks, receive_counts, receive_starts, receive_dtype);
    return of(comm)->exchange(stream, call_of(Kind::all_to_all, send_dtype, 0), parts, into);
}
HcclResult HcclAlltoAll(const void *from, uint64_t send_count, HcclDataType send_dtype, const void *to,
                        uint64_t receive_count, HcclDataType receive_dtype, HcclComm comm, aclrtStream stream) {
    int ranks = of(comm)->size();
    Parts parts = rows(from, ranks, send_count, send_dtype), into = rows(to, ranks, receive_count, receive_dtype);
    return of(comm)->exchange(stream, call_of(Kind::all_to_all, send_dtype, 0), parts, into);
}
// `counts[i * ranks + j]`: elements from rank i to rank j.
HcclResult HcclAlltoAllVC(const void *from, const void *counts, HcclDataType send_dtype, const void *to,
                          HcclDataType receive_dtype, HcclComm comm, aclrtStream stream) {
    int ranks = of(comm)->size(), mine = of(comm)->rank();
    auto *matrix = static_cast<const uint64_t *>(counts);
    Parts parts, into;
    uint64_t sent = 0, received = 0;
    for (int rank = 0; rank < ranks; rank++) {
        uint64_t goes = matrix[mine * ranks + rank], comes = matrix[rank * ranks + mine];
        parts.push_back(part(from, sent, goes, send_dtype));
        into.push_back(part(to, received, comes, receive_dtype));
        sent += goes;
        received += comes;
    }
    return of(comm)->exchange(stream, call_of(Kind::all_to_all, send_dtype, 0), parts, into);
}
HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
    Parts empty(of(comm)->size());
    return of(comm)->exchange(stream, call_of(Kind::barrier, HCCL_DATA_TYPE_INT8, 0), empty, empty);
}
HcclResult HcclSend(void *data, uint64_t count, HcclDataType dtype, uint32_t to, HcclComm comm, aclrtStream stream) {
    return of(comm)->send(stream, call_of(Kind::send, dtype, count), to, part(data, 0, count, dtype));
}
HcclResult HcclRecv(void *data, uint64_t count, HcclDataType dtype, uint32_t from, HcclComm comm, aclrtStream stream) {
    return of(comm)->receive(stream, call_of(Kind::send, dtype, count), from, part(data, 0, count, dtype));
}
HcclResult HcclBatchSendRecv(HcclSendRecvItem *items, uint32_t count, HcclComm comm, aclrtStream stream) {
    // All sends first, for they wait for nobody.
    for (auto kind : {HCCL_SEND, HCCL_RECV}) {
        for (uint32_t i = 0; i < count; i++) {
            auto &item = items[i];
            if (item.sendRecvType != kind) continue;
            auto *call = kind == HCCL_SEND ? HcclSend : HcclRecv;
            HcclResult result = call(item.buf, item.count, item.dataType, item.remoteRank, comm, stream);
            if (result != HCCL_SUCCESS) return result;
        }
    }
    return HCCL_SUCCESS;
}

}  // extern "C"
