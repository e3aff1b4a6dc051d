// libascendcl.so: streams, events and callbacks, over stream.h. Exports `software_npu_*` for libhccl.so.
#include <acl/acl.h>
#include <acl/acl_rt.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "settings.h"
#include "stream.h"

using software_npu::Stream;

namespace {

std::mutex streams_mutex;
std::set<Stream *> streams;

Stream *stream_of(aclrtStream stream) { return static_cast<Stream *>(stream); }
software_npu::Event *event_of(aclrtEvent event) { return static_cast<software_npu::Event *>(event); }

// The null stream runs its work at once.
void enqueue(aclrtStream stream, std::function<void()> work) {
    if (stream) {
        stream_of(stream)->enqueue(std::move(work));
    } else {
        work();
    }
}

}  // namespace

extern "C" {

// --- for libhccl.so and the memory calls

void software_npu_enqueue(aclrtStream stream, void (*work)(void *), void *argument) {
    enqueue(stream, [work, argument] { work(argument); });
}
void software_npu_wait_for_streams(int device) {
    std::vector<Stream *> mine;
    {
        std::lock_guard<std::mutex> lock(streams_mutex);
        std::copy_if(streams.begin(), streams.end(), std::back_inserter(mine),
                     [device](Stream *stream) { return stream->device == device; });
    }
    for (auto *stream : mine) stream->synchronize();
}
void software_npu_report_error(int error, const char *message) { software_npu::report_error(error, message); }

// --- streams

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t) {
    int32_t device = 0;
    if (aclError error = aclrtGetDevice(&device)) return error;
    auto *made = new Stream(device);
    std::lock_guard<std::mutex> lock(streams_mutex);
    streams.insert(made);
    *stream = made;
    return ACL_SUCCESS;
}
aclError aclrtCreateStream(aclrtStream *stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }
aclError aclrtDestroyStream(aclrtStream stream) {
    {
        std::lock_guard<std::mutex> lock(streams_mutex);
        streams.erase(stream_of(stream));
    }
    delete stream_of(stream);
    return ACL_SUCCESS;
}
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
aclError aclrtSynchronizeStream(aclrtStream stream) {
    if (stream) stream_of(stream)->synchronize();
    return software_npu::take_error();
}
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return aclrtSynchronizeStream(stream); }
aclError aclrtSynchronizeDevice() {
    int32_t device = 0;
    if (aclError error = aclrtGetDevice(&device)) return error;
    software_npu_wait_for_streams(device);
    return software_npu::take_error();
}
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    bool idle = !stream || stream_of(stream)->is_idle();
    *status = idle ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    return ACL_SUCCESS;
}
aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) {
    *id = stream ? stream_of(stream)->id : -1;
    return ACL_SUCCESS;
}
aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t on) {
    if (stream) stream_of(stream)->overflow_switch = on;
    return ACL_SUCCESS;
}
aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *on) {
    *on = stream ? stream_of(stream)->overflow_switch : 0;
    return ACL_SUCCESS;
}
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue *) { return ACL_SUCCESS; }

// --- events

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t) {
    *event = new software_npu::Event;
    return ACL_SUCCESS;
}
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
aclError aclrtDestroyEvent(aclrtEvent event) {
    // Work that outlives it shares the recording.
    delete event_of(event);
    return ACL_SUCCESS;
}
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    enqueue(stream, [recording = event_of(event)->record()] { recording->complete(); });
    return ACL_SUCCESS;
}
aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    enqueue(stream, [recording = event_of(event)->last()] { recording->wait(); });
    return ACL_SUCCESS;
}
aclError aclrtSynchronizeEvent(aclrtEvent event) {
    event_of(event)->last()->wait();
    return software_npu::take_error();
}
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    bool complete = event_of(event)->last()->is_complete();
    *status = complete ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return ACL_SUCCESS;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus *status) {
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
    aclError error = aclrtSynchronizeEvent(end);
    *milliseconds = (event_of(end)->last()->microseconds() - event_of(start)->last()->microseconds()) / 1000.0f;
    return error;
}
aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t *microseconds) {
    *microseconds = event_of(event)->last()->microseconds();
    return ACL_SUCCESS;
}

// --- callbacks: a stream calls them itself, so there is nothing to subscribe to

aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtProcessReport(int32_t timeout_ms) {
    // A thread of torch_npu calls this in a loop.
    usleep(1000 * (timeout_ms > 100 || timeout_ms < 0 ? 100 : timeout_ms));
    return ACL_SUCCESS;
}
aclError aclrtLaunchCallback(aclrtCallback callback, void *data, aclrtCallbackBlockType, aclrtStream stream) {
    enqueue(stream, [=] { callback(data); });
    return ACL_SUCCESS;
}
aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc callback, void *data) {
    enqueue(stream, [=] { callback(data); });
    return ACL_SUCCESS;
}

// --- errors

const char *aclGetRecentErrMsg() {
    static thread_local std::string message;
    message = software_npu::last_message();
    return message.c_str();
}
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

}  // extern "C"
