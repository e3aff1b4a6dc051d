// How the processes of a communicator reach each other: a full mesh of Unix sockets in the abstract name space, and a
// thread that receives whatever arrives, so that no send waits for its receiver to ask.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "settings.h"

namespace software_npu {

enum class Kind : uint32_t { all_reduce, broadcast, reduce_scatter, scatter, all_gather, all_to_all, reduce, barrier, send };

// What a rank calls, as it travels before the data, to every rank: also to those that are sent no data. Ranks of a
// communicator must agree on all of it, and on how much data follows, which the receiver knows, too.
struct Call {
    Kind kind;
    uint32_t dtype;      // HcclDataType
    uint32_t reduction;  // HcclReduceOp; 0 where nothing is reduced
    uint32_t root;       // 0 where there is none
    uint64_t count;      // elements; 0 where each rank may have another
    uint64_t number;     // of the communicator's collectives; 0 for a send
};

struct Message {
    Call call;
    std::vector<char> data;
};

// What goes over a socket before the data.
struct Envelope {
    Call call;
    uint64_t bytes;
};

// How moving bytes ended: late where the other end moved none for too long.
enum class Done { whole, gone, late };
using Clock = std::chrono::steady_clock;

// "all_reduce number 3 (16 bytes of FP32)"
std::string describe(const Call &call, uint64_t bytes);

class Mesh {
   public:
    ~Mesh();

    // Meet the `size` processes that were given the same `id`. Returns what went wrong, empty where nothing did.
    std::string open(const std::string &id, int size, int rank, const GroupSettings &settings);
    std::string send(int to, const Call &call, const void *data, uint64_t bytes);
    // The next send of `from`, or what it says of the collective with this number.
    std::string receive(int from, const Call &expected, uint64_t bytes, Message &message);

    // "rank 3", or "rank 3 (rank 1 of 2 in its group)" where the two differ.
    std::string name(int rank) const;

    int size = 0, rank = 0;
    GroupSettings settings;

   private:
    struct Peer {
        int socket = -1;
        int world_rank = -1;  // of the job, which people know
        bool gone = false;
        std::deque<Message> arrived;
        std::mutex sending;
        // Of the message that is arriving: `got` bytes of its envelope and data.
        Envelope envelope;
        std::vector<char> data;
        size_t got = 0;
    };

    std::string join(const std::string &id);
    std::string greet(int socket, const std::string &whom, Clock::time_point deadline, int &their_rank);
    std::string missing() const;
    Done take(Peer &peer);
    void serve();

    std::vector<std::unique_ptr<Peer>> peers_;
    std::mutex mutex_;
    std::condition_variable arrived_;
    std::thread receiver_;
    int wake_[2] = {-1, -1};
};

}  // namespace software_npu
