// Streams, events and errors that come late: see stream.h.
#include "stream.h"

#include <atomic>
#include <chrono>
#include <string>

#include "python_lock.h"
#include "settings.h"

namespace software_npu {

namespace {

std::atomic<int> streams_made{0};
std::mutex error_mutex;
int pending_error = 0;
std::string error_message = "the software NPU has nothing to report";

// Longest pause before a piece of work, to shake the order in which streams get on.
long longest_pause_us() {
    static const long longest = number("SOFTWARE_NPU_DELAY_US", 0);
    return longest;
}

uint64_t now_us() {
    using namespace std::chrono;
    return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Stream::Stream(int device)
    : id(streams_made++), device(device), chance_(static_cast<unsigned>(number("SOFTWARE_NPU_SEED", 0) * 1000 + id)) {}

Stream::~Stream() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
        arrived_.notify_one();
    }
    if (worker_.joinable()) worker_.join();
}

void Stream::enqueue(std::function<void()> work) {
    if (!is_async()) return work();
    std::lock_guard<std::mutex> lock(mutex_);
    if (!worker_.joinable()) worker_ = std::thread([this] { serve(); });
    waiting_.push_back(std::move(work));
    arrived_.notify_one();
}

void Stream::serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        arrived_.wait(lock, [this] { return closing_ || !waiting_.empty(); });
        if (waiting_.empty()) return;
        auto work = std::move(waiting_.front());
        waiting_.pop_front();
        busy_ = true;
        lock.unlock();
        if (longest_pause_us() > 0) {
            std::uniform_int_distribution<long> pause(0, longest_pause_us());
            std::this_thread::sleep_for(std::chrono::microseconds(pause(chance_)));
        }
        work();
        lock.lock();
        busy_ = false;
        if (waiting_.empty()) finished_.notify_all();
    }
}

void Stream::synchronize() {
    // Work that waits for its own stream, such as a callback that frees memory, would never end.
    if (worker_.get_id() == std::this_thread::get_id()) return;
    WithoutPythonsLock waiting;
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return waiting_.empty() && !busy_; });
}

bool Stream::is_idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return waiting_.empty() && !busy_;
}

void Recording::complete() {
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    microseconds_ = now_us();
    completed_.notify_all();
}

void Recording::wait() {
    WithoutPythonsLock waiting;
    std::unique_lock<std::mutex> lock(mutex_);
    completed_.wait(lock, [this] { return done_; });
}

bool Recording::is_complete() {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_;
}

uint64_t Recording::microseconds() {
    std::lock_guard<std::mutex> lock(mutex_);
    return microseconds_;
}

std::shared_ptr<Recording> Event::record() {
    auto recording = std::make_shared<Recording>();
    std::lock_guard<std::mutex> lock(mutex_);
    return last_ = recording;
}

std::shared_ptr<Recording> Event::last() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!last_) {
        last_ = std::make_shared<Recording>();
        last_->complete();
    }
    return last_;
}

void report_error(int error, const std::string &message) {
    std::lock_guard<std::mutex> lock(error_mutex);
    // What comes after a failure that nobody has seen yet follows from it.
    if (pending_error) return;
    pending_error = error;
    error_message = message;
}

int take_error() {
    std::lock_guard<std::mutex> lock(error_mutex);
    int error = pending_error;
    pending_error = 0;
    return error;
}

std::string last_message() {
    std::lock_guard<std::mutex> lock(error_mutex);
    return error_message;
}

}  // namespace software_npu
