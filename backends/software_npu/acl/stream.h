// Streams and events with the ordering of a real device: work of one stream runs in order, streams run at once, and an
// event orders two of them. In synchronous mode a stream runs its work inside the call.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

namespace software_npu {

class Stream {
   public:
    explicit Stream(int device);
    ~Stream();

    // Run `work` after everything that was enqueued before. In asynchronous mode a worker does, after a pause of chance.
    void enqueue(std::function<void()> work);
    void synchronize();
    bool is_idle();

    const int id;
    const int device;
    uint32_t overflow_switch = 0;

   private:
    void serve();

    std::mutex mutex_;
    std::condition_variable arrived_, finished_;
    std::deque<std::function<void()>> waiting_;
    bool busy_ = false, closing_ = false;
    std::mt19937 chance_;
    std::thread worker_;
};

// Recorded any number of times; a waiter waits for the recordings made before it asked.
class Event {
   public:
    // The number of this recording, to be passed to `complete` by the stream.
    uint64_t record();
    void complete(uint64_t recording);
    uint64_t last_recording();
    void wait(uint64_t recording);
    bool is_complete();
    uint64_t microseconds();

   private:
    std::mutex mutex_;
    std::condition_variable completed_;
    uint64_t recorded_ = 0, done_ = 0, microseconds_ = 0;
};

// Errors of work that ran on a worker come to light where the host next waits, as on a device. `error` is 0 where the
// call that failed returns its error itself, and only the message is left to tell.
void report_error(int error, const std::string &message);
int take_error();
std::string last_message();

}  // namespace software_npu
