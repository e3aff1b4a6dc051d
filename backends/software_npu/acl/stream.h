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

// The moment at which a stream got as far as it was when an event was recorded.
class Recording {
   public:
    // By the stream.
    void complete();
    void wait();
    bool is_complete();
    uint64_t microseconds();

   private:
    std::mutex mutex_;
    std::condition_variable completed_;
    bool done_ = false;
    uint64_t microseconds_ = 0;
};

// Recorded any number of times, on any stream; a waiter waits for the recording that was the last when it asked.
class Event {
   public:
    std::shared_ptr<Recording> record();
    // One that is complete where nothing was recorded.
    std::shared_ptr<Recording> last();

   private:
    std::mutex mutex_;
    std::shared_ptr<Recording> last_;
};

// Errors of work that ran on a worker come to light where the host next waits, as on a device. `error` is 0 where the
// call that failed returns its error itself, and only the message is left to tell.
void report_error(int error, const std::string &message);
int take_error();
std::string last_message();

}  // namespace software_npu
