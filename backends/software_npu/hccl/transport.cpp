// A full mesh of Unix sockets between the processes of a communicator: see transport.h.
#include "transport.h"

#include <hccl/hccl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstring>
#include <map>

#include "../acl/settings.h"
#include "reduce.h"

namespace software_npu {

namespace {

constexpr int kRetryUs = 2000;

// 0 lifts a timeout, here to three weeks.
Clock::time_point deadline_of(long timeout_s) {
    return Clock::now() + (timeout_s ? std::chrono::seconds(timeout_s) : std::chrono::hours(500));
}

std::string waited(long timeout_s) { return "waited " + std::to_string(timeout_s) + " s for "; }

// Whether the socket is ready for `what` before the deadline.
bool ready(int socket, short what, Clock::time_point deadline) {
    for (;;) {
        pollfd waiting{socket, what, 0};
        auto left_ms = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
        int found = poll(&waiting, 1, static_cast<int>(std::clamp<long>(left_ms, 0, INT_MAX)));
        if (found >= 0 || errno != EINTR) return found > 0;
    }
}

// Move bytes by `step(place, bytes)`, a call that never waits. A peer that is stopped takes and gives none.
template <class Place, class Step>
Done move_all(int socket, short what, Clock::time_point deadline, Place *place, size_t bytes, Step step) {
    while (bytes) {
        ssize_t moved = step(place, bytes);
        if (moved > 0) {
            place += moved;
            bytes -= moved;
        } else if (moved == 0 || (errno != EINTR && errno != EAGAIN)) {
            return Done::gone;
        } else if (errno == EAGAIN && !ready(socket, what, deadline)) {
            return Done::late;
        }
    }
    return Done::whole;
}

Done read_all(int socket, void *to, size_t bytes, Clock::time_point deadline) {
    auto step = [socket](char *place, size_t left) { return recv(socket, place, left, MSG_DONTWAIT); };
    return move_all(socket, POLLIN, deadline, static_cast<char *>(to), bytes, step);
}

Done write_all(int socket, const void *from, size_t bytes, Clock::time_point deadline) {
    auto step = [socket](const char *place, size_t left) {
        return ::send(socket, place, left, MSG_NOSIGNAL | MSG_DONTWAIT);
    };
    return move_all(socket, POLLOUT, deadline, static_cast<const char *>(from), bytes, step);
}

struct Address {
    sockaddr_un name{};
    socklen_t length;
    Address(const std::string &id, int rank) {
        std::string text = "octofold-hccl-" + id + "-" + std::to_string(rank);
        name.sun_family = AF_UNIX;
        // A leading zero byte: no file, and gone with its process.
        memcpy(name.sun_path + 1, text.data(), std::min(text.size(), sizeof name.sun_path - 1));
        length = offsetof(sockaddr_un, sun_path) + 1 + std::min(text.size(), sizeof name.sun_path - 1);
    }
    const sockaddr *get() const { return reinterpret_cast<const sockaddr *>(&name); }
};

int new_socket() { return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0); }

std::string dtype_name(uint32_t dtype) {
    static const std::map<uint32_t, std::string> names = {
        {HCCL_DATA_TYPE_INT8, "INT8"},         {HCCL_DATA_TYPE_INT16, "INT16"},     {HCCL_DATA_TYPE_INT32, "INT32"},
        {HCCL_DATA_TYPE_INT64, "INT64"},       {HCCL_DATA_TYPE_UINT8, "UINT8"},     {HCCL_DATA_TYPE_FP16, "FP16"},
        {HCCL_DATA_TYPE_FP32, "FP32"},         {HCCL_DATA_TYPE_FP64, "FP64"},       {HCCL_DATA_TYPE_BFP16, "BF16"},
        {HCCL_DATA_TYPE_FP8E4M3, "FP8 E4M3"},  {HCCL_DATA_TYPE_FP8E5M2, "FP8 E5M2"}, {HCCL_DATA_TYPE_HIF8, "HiF8"},
    };
    auto found = names.find(dtype);
    return found == names.end() ? "HcclDataType " + std::to_string(dtype) : found->second;
}

bool agree(const Call &one, const Call &other) {
    return one.kind == other.kind && one.dtype == other.dtype && one.reduction == other.reduction &&
           one.root == other.root && one.count == other.count && one.number == other.number;
}

}  // namespace

std::string describe(const Call &call, uint64_t bytes) {
    static const char *names[] = {"all_reduce", "broadcast",  "reduce_scatter", "scatter", "all_gather",
                                  "all_to_all", "reduce",     "barrier",        "send"};
    static const char *reductions[] = {"sum", "product", "max", "min"};
    // Where no data flows between two ranks the call says how much does between others.
    if (call.count) bytes = call.count * element_bytes(static_cast<HcclDataType>(call.dtype));
    std::string text = names[static_cast<uint32_t>(call.kind)];
    if (call.kind != Kind::send) text += " number " + std::to_string(call.number);
    text += " (" + std::to_string(bytes) + " bytes of " + dtype_name(call.dtype);
    bool reduces = call.kind == Kind::all_reduce || call.kind == Kind::reduce_scatter || call.kind == Kind::reduce;
    if (reduces && call.reduction < 4) text += std::string(", ") + reductions[call.reduction];
    bool rooted = call.kind == Kind::broadcast || call.kind == Kind::scatter || call.kind == Kind::reduce;
    if (rooted) text += ", root " + std::to_string(call.root);
    return text + ")";
}

std::string Mesh::name(int which) const {
    int world_rank = peers_[which]->world_rank;
    std::string place = "rank " + std::to_string(which) + " of " + std::to_string(size) + " in its group";
    if (world_rank < 0) return place;
    std::string known = "rank " + std::to_string(world_rank);
    return world_rank == which ? known : known + " (" + place + ")";
}

std::string Mesh::open(const std::string &id, int size_, int rank_, const GroupSettings &settings_) {
    size = size_;
    rank = rank_;
    settings = settings_;
    for (int other = 0; other < size; other++) peers_.push_back(std::make_unique<Peer>());
    peers_[rank]->world_rank = static_cast<int>(number("RANK", -1));
    std::string failure = join(id);
    if (!failure.empty()) return failure;
    if (pipe(wake_)) return "no pipe: " + std::string(strerror(errno));
    receiver_ = std::thread([this] { serve(); });
    return "";
}

// The rank that answers, or what is wrong: one that is stopped, or still waits for a lower rank itself, says nothing.
std::string Mesh::greet(int socket, const std::string &whom, Clock::time_point deadline, int &their_rank) {
    int32_t mine[2] = {rank, peers_[rank]->world_rank}, theirs[2];
    Done done = write_all(socket, mine, sizeof mine, deadline);
    if (done == Done::whole) done = read_all(socket, theirs, sizeof theirs, deadline);
    if (done == Done::late) return waited(settings.connect_timeout_s) + whom;
    if (done == Done::gone || theirs[0] < 0 || theirs[0] >= size) return "lost " + whom;
    their_rank = theirs[0];
    peers_[their_rank]->world_rank = theirs[1];
    return "";
}

// The higher ranks that have not called yet.
std::string Mesh::missing() const {
    std::string names;
    for (int other = rank + 1; other < size; other++) {
        if (peers_[other]->socket < 0) names += (names.empty() ? "" : ", ") + name(other);
    }
    return names;
}

// Each process calls those of lower rank and is called by those of higher rank.
std::string Mesh::join(const std::string &id) {
    auto deadline = deadline_of(settings.connect_timeout_s);
    Address mine(id, rank);
    int listening = new_socket();
    if (bind(listening, mine.get(), mine.length) || listen(listening, size)) {
        close(listening);
        return "cannot listen: " + std::string(strerror(errno));
    }
    std::string failure;
    for (int lower = 0; lower < rank && failure.empty();) {
        int calling = new_socket(), who = -1;
        Address theirs(id, lower);
        Peer &peer = *peers_[lower];
        if (!connect(calling, theirs.get(), theirs.length)) {
            peer.socket = calling;
            failure = greet(calling, name(lower), deadline, who);
            lower++;
            continue;
        }
        close(calling);
        if (Clock::now() > deadline) failure = waited(settings.connect_timeout_s) + name(lower);
        usleep(kRetryUs);
    }
    for (int left = size - rank - 1; left > 0 && failure.empty(); left--) {
        if (!ready(listening, POLLIN, deadline)) {
            failure = waited(settings.connect_timeout_s) + missing();
            break;
        }
        int called = accept4(listening, nullptr, nullptr, SOCK_CLOEXEC), who = -1;
        if (called < 0) {
            failure = "cannot accept: " + std::string(strerror(errno));
            break;
        }
        failure = greet(called, "one of " + missing(), deadline, who);
        if (who < 0) {
            close(called);
        } else {
            peers_[who]->socket = called;
        }
    }
    close(listening);
    return failure;
}

// What there is of the next message, without waiting for the rest: a peer may stop in the middle of one.
Done Mesh::take(Peer &peer) {
    constexpr size_t head = sizeof peer.envelope;
    for (;;) {
        if (peer.got == head) peer.data.resize(peer.envelope.bytes);
        if (peer.got >= head && peer.got - head == peer.envelope.bytes) return Done::whole;
        bool in_head = peer.got < head;
        char *place = in_head ? reinterpret_cast<char *>(&peer.envelope) + peer.got : peer.data.data() + peer.got - head;
        size_t left = in_head ? head - peer.got : peer.envelope.bytes - (peer.got - head);
        ssize_t got = recv(peer.socket, place, left, MSG_DONTWAIT);
        if (got > 0) {
            peer.got += got;
        } else if (got == 0 || (errno != EINTR && errno != EAGAIN)) {
            return Done::gone;
        } else if (errno == EAGAIN) {
            return Done::late;
        }
    }
}

void Mesh::serve() {
    for (;;) {
        std::vector<pollfd> watched{{wake_[0], POLLIN, 0}};
        std::vector<int> ranks{-1};
        for (int other = 0; other < size; other++) {
            Peer &peer = *peers_[other];
            if (peer.socket < 0 || peer.gone) continue;
            watched.push_back({peer.socket, POLLIN, 0});
            ranks.push_back(other);
        }
        poll(watched.data(), watched.size(), -1);
        if (watched[0].revents) return;
        for (size_t i = 1; i < watched.size(); i++) {
            if (!watched[i].revents) continue;
            Peer &peer = *peers_[ranks[i]];
            Done done = take(peer);
            if (done == Done::late) continue;
            std::lock_guard<std::mutex> lock(mutex_);
            if (done == Done::whole) {
                peer.arrived.push_back({peer.envelope.call, std::move(peer.data)});
                peer.data = {};
                peer.got = 0;
            } else {
                peer.gone = true;
            }
            arrived_.notify_all();
        }
    }
}

Mesh::~Mesh() {
    if (receiver_.joinable()) {
        char any = 0;
        if (write(wake_[1], &any, 1) == 1) receiver_.join();
    }
    for (int end : wake_) {
        if (end >= 0) close(end);
    }
    for (auto &peer : peers_) {
        if (peer->socket >= 0) close(peer->socket);
    }
}

std::string Mesh::send(int to, const Call &call, const void *data, uint64_t bytes) {
    Peer &peer = *peers_[to];
    if (to == rank) {
        auto *start = static_cast<const char *>(data);
        std::lock_guard<std::mutex> lock(mutex_);
        peer.arrived.push_back({call, {start, start + bytes}});
        arrived_.notify_all();
        return "";
    }
    Envelope envelope{call, bytes};
    auto deadline = deadline_of(settings.exec_timeout_s);
    std::lock_guard<std::mutex> lock(peer.sending);
    Done done = write_all(peer.socket, &envelope, sizeof envelope, deadline);
    if (done == Done::whole) done = write_all(peer.socket, data, bytes, deadline);
    if (done == Done::whole) return "";
    std::string mine = name(rank) + " in " + describe(call, bytes) + ": ";
    if (done == Done::gone) return mine + name(to) + " is gone";
    // Half a message has gone out, and nothing can follow it.
    shutdown(peer.socket, SHUT_RDWR);
    return mine + waited(settings.exec_timeout_s) + name(to);
}

std::string Mesh::receive(int from, const Call &expected, uint64_t bytes, Message &message) {
    Peer &peer = *peers_[from];
    bool is_send = expected.kind == Kind::send;
    auto belongs = [&](const Message &other) {
        return (other.call.kind == Kind::send) == is_send && other.call.number == expected.number;
    };
    std::string mine = name(rank) + " in " + describe(expected, bytes);
    auto deadline = deadline_of(settings.exec_timeout_s);
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        auto found = std::find_if(peer.arrived.begin(), peer.arrived.end(), belongs);
        if (found != peer.arrived.end()) {
            message = std::move(*found);
            peer.arrived.erase(found);
            break;
        }
        if (peer.gone) return mine + ": " + name(from) + " is gone";
        if (arrived_.wait_until(lock, deadline) == std::cv_status::timeout) {
            return mine + ": " + waited(settings.exec_timeout_s) + name(from);
        }
    }
    if (agree(expected, message.call) && message.data.size() == bytes) return "";
    return mine + ": " + name(from) + " is in " + describe(message.call, message.data.size());
}

}  // namespace software_npu
