// A stand-in for the CUDA runtime: the functions that the native library uses, over plain memory.
//
// Everything on a stream is done late, by other threads: in order within a stream, in random order between streams. It
// is strict about what CUDA leaves undefined: whoever reuses a slot, frees memory, unlocks it or destroys a stream under
// a copy, or uses another device's stream, has broken a rule, and `standin_violations` tells.
#include "standin.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <time.h>
#include <unistd.h>
#include <vector>

namespace {

constexpr int kInvalidValue = 1, kInvalidDevice = 101, kNotReady = 600;
constexpr int kDevices = 2;
constexpr int kWorkers = 2;
constexpr unsigned char kFresh = 0xA7, kFreed = 0xDD;

int64_t now_us() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t{t.tv_sec} * 1000000 + t.tv_nsec / 1000;
}

// `rows` of `width` bytes, `pitch` apart.
struct Area {
    char *base = nullptr;
    size_t pitch = 0, width = 0, rows = 0;

    char *row(size_t i) const { return base + i * pitch; }
    char *end() const { return rows == 0 ? base : row(rows - 1) + width; }
};

uint64_t digest(const Area &area) {
    uint64_t sum = 1469598103934665603ull;
    for (size_t i = 0; i < area.rows; i++) {
        for (size_t j = 0; j < area.width; j++) sum = (sum ^ static_cast<unsigned char>(area.row(i)[j])) * 1099511628211ull;
    }
    return sum;
}

struct Event {
    int device = 0;
    uint64_t recorded = 0, reached = 0;  // the number of the last record, and of that which was reached last
    int error = 0;
    bool alive = true;
};

struct Work {
    enum Kind { copy, fill, record, wait };
    Kind kind;
    int64_t not_before;
    Area to, from;
    uint64_t digest = 0;
    int value = 0;
    std::shared_ptr<Event> event;
    uint64_t number = 0;
};

struct Stream {
    int device = 0;
    bool busy = false, held = false;
    int error = 0;  // as on a device, it stays
    std::deque<Work> queue;
};

struct Memory {
    size_t bytes;
    bool live;
};

struct State {
    std::mutex mutex;
    std::condition_variable work;
    std::mt19937_64 random{1};
    uint32_t delay_us = 0, copy_faults = 0, call_faults = 0;
    bool hold_copies = false;
    uint32_t fail_copy_in = 0;
    int fail_copy_error = 0;
    std::map<std::string, std::pair<uint32_t, int>> fail_calls;
    std::map<char *, Memory> device;  // live and freed
    std::map<char *, size_t> pinned;
    std::map<Stream *, std::unique_ptr<Stream>> streams;  // and the default one, as nullptr
    std::map<Event *, std::shared_ptr<Event>> events;
    uint64_t numbers = 0, in_flight = 0, violations = 0;
    std::string first_violation;
    standin_done_info done{};
    bool started = false;
};

State &state() {
    static State *const all = [] {
        auto *made = new State();
        made->streams[nullptr] = std::make_unique<Stream>();
        return made;
    }();
    return *all;
}

thread_local int current_device = 0;
thread_local int last_error = 0;

using Locked = std::unique_lock<std::mutex>;

void pause(Locked &lock) {
    lock.unlock();
    usleep(20);
    lock.lock();
}

void violation(State &s, const char *text) {
    if (s.violations++ == 0) s.first_violation = text;
}

int failed(int error) {
    if (error != 0) last_error = error;
    return error;
}

// The error that was asked for at this call, if any.
int due(State &s, const char *function) {
    const auto found = s.fail_calls.find(function);
    if (found != s.fail_calls.end() && --found->second.first == 0) {
        const int error = found->second.second;
        s.fail_calls.erase(found);
        return error;
    }
    // Not what gives things back: whether that works, nobody can do anything about.
    static const std::set<std::string> *const faulty = new std::set<std::string>{
        "SetDevice", "MemcpyAsync", "Memcpy2DAsync", "StreamWaitEvent", "EventCreateWithFlags", "EventRecord"};
    if (s.call_faults == 0 || faulty->count(function) == 0) return 0;
    return s.random() % 1000 < s.call_faults ? 46 : 0;
}

bool inside_device(State &s, const Area &area) {
    auto after = s.device.upper_bound(area.base);
    if (after == s.device.begin()) return false;
    const auto &[begin, memory] = *--after;
    return memory.live && area.end() <= begin + memory.bytes;
}

bool inside_pinned(State &s, const Area &area) {
    auto after = s.pinned.upper_bound(area.base);
    if (after == s.pinned.begin()) return false;
    const auto &[begin, bytes] = *--after;
    return area.end() <= begin + bytes;
}

// --- doing -----------------------------------------------------------------------------------------------------------

bool can_begin(State &s, const Stream *key, Stream &stream, int64_t now) {
    if (stream.busy || stream.held || stream.queue.empty() || (key != nullptr && s.hold_copies)) return false;
    const Work &work = stream.queue.front();
    if (work.kind == Work::wait && work.event->reached < work.number) return false;
    return now >= work.not_before;
}

void do_copy(State &s, Stream &stream, const Work &work, Locked &lock) {
    if (!inside_device(s, work.to)) return violation(s, "a copy went to memory that had been freed");
    if (!inside_pinned(s, work.from)) return violation(s, "a copy came from memory that was page-locked no more");
    const bool chosen = s.fail_copy_in != 0 && --s.fail_copy_in == 0;
    if (chosen || (s.copy_faults != 0 && s.random() % 1000 < s.copy_faults)) {
        stream.error = chosen ? s.fail_copy_error : 700;
        return;
    }
    lock.unlock();
    const bool changed = digest(work.from) != work.digest;
    for (size_t i = 0; i < work.to.rows; i++) std::memcpy(work.to.row(i), work.from.row(i), work.to.width);
    lock.lock();
    if (changed) violation(s, "a slot was written to under a copy");
}

void carry_out(State &s, Stream &stream, Locked &lock) {
    const Work work = stream.queue.front();
    stream.busy = true;
    switch (work.kind) {
        case Work::copy:
            do_copy(s, stream, work, lock);
            s.in_flight--;
            break;
        case Work::fill:
            lock.unlock();
            std::memset(work.to.base, work.value, work.to.width);
            lock.lock();
            break;
        case Work::record:
            work.event->error = stream.error;
            work.event->reached = work.number;
            break;
        case Work::wait:
            break;
    }
    stream.queue.pop_front();
    stream.busy = false;
}

void work_for_ever() {
    State &s = state();
    Locked lock(s.mutex);
    for (;;) {
        const int64_t now = now_us();
        std::vector<Stream *> ready;
        bool any = false;
        for (auto &[key, stream] : s.streams) {
            any = any || !stream->queue.empty();
            if (can_begin(s, key, *stream, now)) ready.push_back(stream.get());
        }
        if (!ready.empty()) {
            carry_out(s, *ready[s.random() % ready.size()], lock);
        } else if (any) {
            pause(lock);
        } else {
            s.work.wait(lock);
        }
    }
}

void enqueue(State &s, Stream &stream, Work work) {
    if (!s.started) {
        s.started = true;
        for (int i = 0; i < kWorkers; i++) std::thread(work_for_ever).detach();
    }
    work.not_before = now_us() + (s.delay_us == 0 ? 0 : static_cast<int64_t>(s.random() % s.delay_us));
    stream.queue.push_back(std::move(work));
    s.work.notify_all();
}

Stream *find_stream(State &s, void *handle) {
    const auto found = s.streams.find(static_cast<Stream *>(handle));
    if (found == s.streams.end()) {
        violation(s, "a stream was used that does not exist");
        return nullptr;
    }
    return found->second.get();
}

std::shared_ptr<Event> find_event(State &s, void *handle) {
    const auto found = s.events.find(static_cast<Event *>(handle));
    if (found == s.events.end()) {
        violation(s, "an event was used that does not exist");
        return nullptr;
    }
    return found->second;
}

int start_copy(const char *function, Area to, Area from, void *handle) {
    State &s = state();
    Locked lock(s.mutex);
    const int error = due(s, function);
    if (error != 0) return failed(error);
    Stream *stream = find_stream(s, handle);
    if (stream == nullptr || to.pitch < to.width || from.pitch < from.width) return failed(kInvalidValue);
    if (stream->error != 0) return failed(stream->error);
    if (stream->device != current_device) violation(s, "a copy was begun on a stream of a device that is not current");
    if (!inside_device(s, to)) violation(s, "a copy was begun to memory that is not the device's");
    if (!inside_pinned(s, from)) violation(s, "a copy was begun from memory that is not page-locked");
    Work work{Work::copy, 0, to, from, digest(from), 0, nullptr, 0};
    enqueue(s, *stream, std::move(work));
    s.in_flight++;
    s.done.copies++;
    s.done.copies_2d += to.rows > 1;
    s.done.bytes += to.width * to.rows;
    s.done.most_in_flight = std::max(s.done.most_in_flight, s.in_flight);
    return 0;
}

// Copies from a range that is not page-locked any more: named, and not done, for the memory may be unmapped next.
void unpin(State &s, char *begin, size_t bytes, Locked &lock) {
    for (auto &[key, stream] : s.streams) {
        while (stream->busy) pause(lock);
        for (Work &work : stream->queue) {
            if (work.kind != Work::copy || work.from.base < begin || work.from.base >= begin + bytes) continue;
            violation(s, "memory was unlocked under a copy");
            work.to.rows = work.from.rows = 0;
        }
    }
    s.pinned.erase(begin);
}

}  // namespace

#define ENTER(name)                          \
    State &s = state();                      \
    Locked lock(s.mutex);                    \
    if (const int error = due(s, name)) return failed(error)

extern "C" {

int cudaSetDevice(int device) {
    ENTER("SetDevice");
    if (device < 0 || device >= kDevices) return failed(kInvalidDevice);
    current_device = device;
    return 0;
}

int cudaGetDevice(int *device) {
    *device = current_device;
    return 0;
}

int cudaHostRegister(void *memory, size_t bytes, unsigned) {
    ENTER("HostRegister");
    s.pinned[static_cast<char *>(memory)] = bytes;
    return 0;
}

int cudaHostUnregister(void *memory) {
    ENTER("HostUnregister");
    const auto found = s.pinned.find(static_cast<char *>(memory));
    if (found == s.pinned.end()) return failed(kInvalidValue);
    unpin(s, found->first, found->second, lock);
    return 0;
}

int cudaHostAlloc(void **memory, size_t bytes, unsigned) {
    ENTER("HostAlloc");
    void *made = nullptr;
    if (posix_memalign(&made, 4096, bytes) != 0) return failed(2);
    std::memset(made, kFresh, bytes);
    s.pinned[static_cast<char *>(made)] = bytes;
    *memory = made;
    return 0;
}

int cudaFreeHost(void *memory) {
    ENTER("FreeHost");
    const auto found = s.pinned.find(static_cast<char *>(memory));
    if (found == s.pinned.end()) return failed(kInvalidValue);
    unpin(s, found->first, found->second, lock);
    std::free(memory);
    return 0;
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int, void *stream) {
    auto *source = static_cast<char *>(const_cast<void *>(from));
    return start_copy("MemcpyAsync", Area{static_cast<char *>(to), bytes, bytes, 1}, Area{source, bytes, bytes, 1}, stream);
}

int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int,
                      void *stream) {
    auto *source = static_cast<char *>(const_cast<void *>(from));
    return start_copy("Memcpy2DAsync", Area{static_cast<char *>(to), to_pitch, width, height},
                      Area{source, from_pitch, width, height}, stream);
}

int cudaStreamCreateWithFlags(void **stream, unsigned) {
    ENTER("StreamCreateWithFlags");
    auto made = std::make_unique<Stream>();
    made->device = current_device;
    *stream = made.get();
    s.streams[made.get()] = std::move(made);
    return 0;
}

int cudaStreamDestroy(void *handle) {
    ENTER("StreamDestroy");
    Stream *stream = find_stream(s, handle);
    if (stream == nullptr || handle == nullptr) return failed(kInvalidValue);
    if (!stream->queue.empty()) {
        violation(s, "a stream was destroyed with work on it");
        while (stream->busy) pause(lock);
        for (const Work &work : stream->queue) s.in_flight -= work.kind == Work::copy;
    }
    s.streams.erase(stream);
    return 0;
}

int cudaStreamWaitEvent(void *handle, void *waited, unsigned) {
    ENTER("StreamWaitEvent");
    Stream *stream = find_stream(s, handle);
    const auto event = find_event(s, waited);
    if (stream == nullptr || event == nullptr) return failed(kInvalidValue);
    enqueue(s, *stream, Work{Work::wait, 0, {}, {}, 0, 0, event, event->recorded});
    return 0;
}

int cudaStreamSynchronize(void *handle) {
    ENTER("StreamSynchronize");
    while (true) {
        Stream *stream = find_stream(s, handle);
        if (stream == nullptr) return failed(kInvalidValue);
        if (stream->queue.empty()) return failed(stream->error);
        pause(lock);
    }
}

int cudaEventCreateWithFlags(void **event, unsigned) {
    ENTER("EventCreateWithFlags");
    auto made = std::make_shared<Event>();
    made->device = current_device;
    *event = made.get();
    s.events[made.get()] = made;
    return 0;
}

int cudaEventRecord(void *recorded, void *handle) {
    ENTER("EventRecord");
    Stream *stream = find_stream(s, handle);
    const auto event = find_event(s, recorded);
    if (stream == nullptr || event == nullptr) return failed(kInvalidValue);
    if (handle != nullptr && event->device != stream->device) violation(s, "an event was recorded on another device");
    event->recorded = ++s.numbers;
    enqueue(s, *stream, Work{Work::record, 0, {}, {}, 0, 0, event, event->recorded});
    return 0;
}

int cudaEventQuery(void *queried) {
    State &s = state();
    Locked lock(s.mutex);
    const auto event = find_event(s, queried);
    if (event == nullptr) return failed(kInvalidValue);
    if (event->reached < event->recorded) return failed(kNotReady);
    return failed(event->error);
}

int cudaEventDestroy(void *destroyed) {
    ENTER("EventDestroy");
    const auto event = find_event(s, destroyed);
    if (event == nullptr) return failed(kInvalidValue);
    s.events.erase(event.get());
    return 0;
}

int cudaGetLastError(void) {
    const int error = last_error;
    last_error = 0;
    return error;
}

const char *cudaGetErrorString(int error) {
    switch (error) {
        case 0: return "no error";
        case 2: return "out of memory";
        case 46: return "all CUDA-capable devices are busy or unavailable";
        case kInvalidDevice: return "invalid device ordinal";
        case 700: return "an illegal memory access was encountered";
        default: return "some other error";
    }
}

int cudaDeviceGetPCIBusId(char *id, int capacity, int device) {
    std::snprintf(id, static_cast<size_t>(capacity), "0000:0%d:00.0", device);
    return 0;
}

// --- for the tests ---------------------------------------------------------------------------------------------------

void standin_reset(uint64_t seed) {
    State &s = state();
    Locked lock(s.mutex);
    s.random.seed(seed);
    s.delay_us = s.copy_faults = s.call_faults = s.fail_copy_in = 0;
    s.hold_copies = false;
    s.fail_calls.clear();
    s.violations = 0;
    s.first_violation.clear();
    s.done = {};
    for (auto &[key, stream] : s.streams) stream->held = false;
    for (auto memory = s.device.begin(); memory != s.device.end();) {
        if (memory->second.live) {
            ++memory;
            continue;
        }
        std::free(memory->first);
        memory = s.device.erase(memory);
    }
}

void standin_delay(uint32_t most_us) {
    Locked lock(state().mutex);
    state().delay_us = most_us;
}

void standin_hold(void *handle, int held) {
    Locked lock(state().mutex);
    Stream *stream = find_stream(state(), handle);
    if (stream != nullptr) stream->held = held != 0;
}

void standin_hold_copies(int held) {
    Locked lock(state().mutex);
    state().hold_copies = held != 0;
}

void standin_fail_call(const char *function, uint32_t nth, int error) {
    Locked lock(state().mutex);
    state().fail_calls[function] = {nth, error};
}

void standin_fail_copy(uint32_t nth, int error) {
    Locked lock(state().mutex);
    state().fail_copy_in = nth;
    state().fail_copy_error = error;
}

void standin_faults(uint32_t copies, uint32_t calls) {
    Locked lock(state().mutex);
    state().copy_faults = copies;
    state().call_faults = calls;
}

void *standin_malloc(size_t bytes) {
    State &s = state();
    void *memory = nullptr;
    if (posix_memalign(&memory, 256, std::max<size_t>(bytes, 1)) != 0) return nullptr;
    std::memset(memory, kFresh, bytes);
    Locked lock(s.mutex);
    s.device[static_cast<char *>(memory)] = Memory{bytes, true};
    return memory;
}

void standin_free(void *memory) {
    State &s = state();
    Locked lock(s.mutex);
    const auto found = s.device.find(static_cast<char *>(memory));
    if (found == s.device.end() || !found->second.live) return violation(s, "memory was freed that is not the device's");
    const char *begin = found->first, *end = begin + found->second.bytes;
    for (auto &[key, stream] : s.streams) {
        for (const Work &work : stream->queue) {
            if (work.kind != Work::copy || work.to.base < begin || work.to.base >= end) continue;
            violation(s, "memory was freed under a copy");
            while (stream->busy) {
                pause(lock);
            }
            break;
        }
    }
    found->second.live = false;
    std::memset(memory, kFreed, found->second.bytes);
}

void standin_fill(void *handle, void *memory, int value, size_t bytes) {
    State &s = state();
    Locked lock(s.mutex);
    Stream *stream = find_stream(s, handle);
    if (stream == nullptr) return;
    const Area to{static_cast<char *>(memory), bytes, bytes, 1};
    enqueue(s, *stream, Work{Work::fill, 0, to, {}, 0, value, nullptr, 0});
}

void standin_live(standin_live_info *info) {
    State &s = state();
    Locked lock(s.mutex);
    uint64_t allocations = 0;
    for (const auto &[begin, memory] : s.device) allocations += memory.live;
    *info = {s.pinned.size(), s.streams.size() - 1, s.events.size(), allocations};
}

void standin_done(standin_done_info *info) {
    Locked lock(state().mutex);
    *info = state().done;
}

uint64_t standin_in_flight(void) {
    Locked lock(state().mutex);
    return state().in_flight;
}

int standin_is_live(const void *memory, size_t bytes) {
    State &s = state();
    Locked lock(s.mutex);
    return inside_device(s, Area{static_cast<char *>(const_cast<void *>(memory)), bytes, bytes, 1});
}

void standin_violate(const char *text) {
    State &s = state();
    Locked lock(s.mutex);
    violation(s, text);
}

int standin_idle(void *handle) {
    Locked lock(state().mutex);
    Stream *stream = find_stream(state(), handle);
    return stream == nullptr || stream->queue.empty();
}

uint64_t standin_violations(char *text, size_t capacity) {
    State &s = state();
    Locked lock(s.mutex);
    if (text != nullptr && capacity > 0) std::snprintf(text, capacity, "%s", s.first_violation.c_str());
    return s.violations;
}

}  // extern "C"
