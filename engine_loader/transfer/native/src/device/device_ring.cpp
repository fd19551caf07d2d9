#include "device/device_ring.h"

#include <algorithm>
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "memory/memory.h"
#include "readers/readers.h"
#include "threads/threads.h"
#include "core/transfer.h"

namespace el {
namespace {

constexpr uint64_t kPinnedBytes = 256 << 20;
constexpr uint32_t kStreams = 2;
constexpr uint64_t kFewestSlots = 2;
constexpr uint64_t kLargestPitch = INT32_MAX;  // of copies in two dimensions
constexpr int64_t kLook = 50000;               // ns between two looks at copies in flight
constexpr int64_t kSlice = 5 * kMillisecond;   // how often cancellation and closing are looked at
constexpr int kPreferred = 1;                  // MPOL_PREFERRED

uint64_t slot_size(const el_config &config) {
    const uint64_t block = std::max(config.block_bytes, config.direct_block_bytes);
    // Rows stay whole, so a block may reach a quarter beyond its cell (planner.cpp); direct reads take whole sectors.
    return (block + block / 4 + 2 * kLargestSector + 4095) / 4096 * 4096;
}

// The memory node that a device hangs on; -1 where that is unknown, or where there is only one.
int near_node(const DeviceRuntime &runtime, int device) {
    if (access("/sys/devices/system/node/node1", F_OK) != 0) return -1;
    char id[32] = "";
    if (checked(runtime, runtime.DeviceGetPCIBusId(id, sizeof id, device)) != 0) return -1;
    for (char *c = id; *c != '\0'; c++) *c = static_cast<char>(tolower(*c));
    char path[96];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/numa_node", id);
    FILE *file = fopen(path, "re");
    if (file == nullptr) return -1;
    int node = -1;
    if (fscanf(file, "%d", &node) != 1) node = -1;
    fclose(file);
    return node;
}

void fail_with(Transfer &transfer, Position position, int error) {
    fail(transfer, el_failure_info{EL_FAIL_DEVICE, error, position.file, position.extent, position.offset, 1, 0});
}

void fail_late(Transfer &transfer, Position position) {
    fail(transfer, el_failure_info{EL_FAIL_DEADLINE, 0, position.file, position.extent, position.offset, 0, 0});
}

// Segments of equal size, equally far apart on both sides: how many from `first` on, up to `end`.
size_t equal_rows(const Segment *first, const Segment *end) {
    if (end - first < 2) return 1;
    const uint64_t from_pitch = first[1].at - first->at, to_pitch = first[1].address - first->address;
    if (first[1].address < first->address + first->bytes || from_pitch > kLargestPitch || to_pitch > kLargestPitch) return 1;
    const Segment *last = first;
    while (last + 1 < end && last[1].bytes == first->bytes && last[1].at - last->at == from_pitch &&
           last[1].address - last->address == to_pitch) {
        last++;
    }
    return static_cast<size_t>(last - first) + 1;
}

}  // namespace

DeviceConfig::DeviceConfig(const el_device_config &config)
    : device(config.device), streams(config.streams == 0 ? kStreams : config.streams),
      pinned_bytes(config.pinned_bytes == 0 ? kPinnedBytes : config.pinned_bytes),
      library(config.library == nullptr ? "" : config.library) {}

bool DeviceConfig::operator==(const DeviceConfig &other) const {
    return device == other.device && streams == other.streams && pinned_bytes == other.pinned_bytes &&
           library == other.library;
}

DeviceRing::DeviceRing(ReaderThreads &readers, const DeviceConfig &config)
    : readers_(readers), config_(config), slot_bytes_(slot_size(readers.config)) {}

// --- making and giving back ------------------------------------------------------------------------------------------

bool DeviceRing::open(el_device_failure &failure) {
    std::string problem;
    runtime_ = find_device_runtime(config_.library, problem);
    if (runtime_ == nullptr) {
        failure.step = EL_DEVICE_LIBRARY;
        snprintf(failure.text, sizeof failure.text, "%s", problem.c_str());
        return false;
    }
    const CurrentDevice current(*runtime_, config_.device);
    if (current.error() != 0) return explain(failure, EL_DEVICE_SELECT, current.error());
    for (uint32_t i = 0; i < config_.streams; i++) {
        DeviceStream stream = nullptr;
        const int error = checked(*runtime_, runtime_->StreamCreateWithFlags(&stream, kStreamNonBlocking));
        if (error != 0) return explain(failure, EL_DEVICE_STREAM, error);
        streams_.push_back(stream);
    }
    flights_.resize(streams_.size());
    node_ = near_node(*runtime_, config_.device);
    return true;
}

bool DeviceRing::ensure_slots(el_device_failure &failure) {
    Lock making(making_slots_);
    if (slots_ready_) return true;
    if (closed_) return explain(failure, EL_DEVICE_MEMORY, 0);
    const CurrentDevice current(*runtime_, config_.device);
    if (current.error() != 0) return explain(failure, EL_DEVICE_SELECT, current.error());
    slots_ready_ = make_slots(failure);
    if (!slots_ready_) give_slots_back();
    return slots_ready_;
}

bool DeviceRing::make_slots(el_device_failure &failure) {
    const uint64_t n = std::max(config_.pinned_bytes / slot_bytes_, kFewestSlots);
    int error = 0;
    memory_bytes_ = n * slot_bytes_;
    memory_ = pinned_memory(memory_bytes_, error);
    if (memory_ == nullptr) return explain(failure, EL_DEVICE_MEMORY, error);
    for (uint64_t i = 0; i < n; i++) {
        slots_.push_back(std::make_unique<PinnedSlot>());
        slots_.back()->memory = memory_ + i * slot_bytes_;
        error = slots_.back()->event.create(*runtime_);
        if (error != 0) return explain(failure, EL_DEVICE_STREAM, error);
        free_.push_back(slots_.back().get());
    }
    return true;
}

// Our own memory, since it can be of huge pages and near the device; where a sandbox cannot lock that, the runtime's.
char *DeviceRing::pinned_memory(uint64_t bytes, int &error) {
    char *memory = map_memory(bytes);
    if (memory != nullptr) {
        prefer_near_node(memory, bytes);
        error = checked(*runtime_, runtime_->HostRegister(memory, bytes, kHostPortable));
        registered_ = error == 0;
        if (registered_) return memory;
        munmap(memory, bytes);
    }
    void *theirs = nullptr;
    error = checked(*runtime_, runtime_->HostAlloc(&theirs, bytes, kHostPortable));
    return error == 0 ? static_cast<char *>(theirs) : nullptr;
}

void DeviceRing::prefer_near_node(char *memory, uint64_t bytes) const {
    if (node_ < 0 || node_ >= 1024) return;
    constexpr unsigned kWord = 8 * sizeof(unsigned long);
    unsigned long nodes[1024 / kWord + 1] = {};
    nodes[static_cast<unsigned>(node_) / kWord] |= 1ul << (static_cast<unsigned>(node_) % kWord);
    // Best effort: memory farther away is slower, not wrong.
    syscall(SYS_mbind, memory, bytes, kPreferred, nodes, 1024ul, 0u);
}

void DeviceRing::close() {
    if (runtime_ == nullptr) return;
    Lock making(making_slots_);
    closed_ = true;
    const CurrentDevice current(*runtime_, config_.device);
    for (DeviceStream stream : streams_) checked(*runtime_, runtime_->StreamDestroy(stream));
    streams_.clear();
    give_slots_back();
}

void DeviceRing::give_slots_back() {
    free_.clear();
    slots_.clear();
    if (memory_ != nullptr && registered_) {
        checked(*runtime_, runtime_->HostUnregister(memory_));
        munmap(memory_, memory_bytes_);
    } else if (memory_ != nullptr) {
        checked(*runtime_, runtime_->FreeHost(memory_));
    }
    memory_ = nullptr;
}

bool DeviceRing::explain(el_device_failure &failure, uint32_t step, int error) const {
    failure.step = step;
    failure.error = error;
    snprintf(failure.text, sizeof failure.text, "%s", runtime_->GetErrorString(error));
    return false;
}

int DeviceRing::start() {
    const int error = start_thread(thread_, readers_.cpus, "el-device", thread_main, this);
    if (error != 0) return error;
    readers_.running++;
    readers_.landing++;
    readers_.references.fetch_add(1);
    return 0;
}

// --- copies ----------------------------------------------------------------------------------------------------------

int DeviceRing::follow(DeviceStream owner, Transfer &transfer) {
    const CurrentDevice current(*runtime_, config_.device);
    if (current.error() != 0) return current.error();
    const int error = transfer.ready.create(*runtime_);
    return error != 0 ? error : checked(*runtime_, runtime_->EventRecord(transfer.ready.get(), owner));
}

PinnedSlot *DeviceRing::take(Reader reader, const Run &run) {
    const int64_t limit = readers_.config.deadline_ms * kMillisecond;
    const int64_t begin = now_ns();
    Lock lock(readers_.mutex);
    while (free_.empty() && !reader.transfer.stop.load(std::memory_order_relaxed)) {
        const int64_t now = now_ns();
        if (limit != 0 && now - begin > limit) {
            fail_late(reader.transfer, Position{run.file, run.extent, run.offset});
        } else {
            freed_.wait_until(lock, now + kSlice);
        }
    }
    reader.worker.counters.slot_wait_ns.add(static_cast<uint64_t>(now_ns() - begin));
    if (reader.transfer.stop.load(std::memory_order_relaxed)) return nullptr;
    PinnedSlot *slot = free_.back();
    free_.pop_back();
    return slot;
}

void DeviceRing::give(PinnedSlot &slot) {
    free_.push_back(&slot);
    freed_.notify_one();
}

int DeviceRing::begin(uint32_t stream, const Transfer &transfer) {
    return checked(*runtime_, runtime_->StreamWaitEvent(streams_[stream], transfer.ready.get(), 0));
}

int DeviceRing::copy(uint32_t stream, const Run &run, const char *span) {
    const Segment *segment = run.segments->data();
    const Segment *end = segment + run.segments->size();
    while (segment < end) {
        const size_t rows = equal_rows(segment, end);
        void *to = reinterpret_cast<void *>(segment->address);
        const char *from = span + segment->at;
        const int error =
            rows == 1 ? runtime_->MemcpyAsync(to, from, segment->bytes, kHostToDevice, streams_[stream])
                      : runtime_->Memcpy2DAsync(to, segment[1].address - segment->address, from, segment[1].at - segment->at,
                                                segment->bytes, rows, kHostToDevice, streams_[stream]);
        if (error != 0) return checked(*runtime_, error);
        segment += rows;
    }
    return 0;
}

void DeviceRing::launch(Flight flight) {
    int error = checked(*runtime_, runtime_->EventRecord(flight.slot->event.get(), streams_[flight.stream]));
    // Without an event there is nothing to ask: then what was begun has to be over here.
    if (error != 0) checked(*runtime_, runtime_->StreamSynchronize(streams_[flight.stream]));
    flight.since = now_ns();
    Lock lock(readers_.mutex);
    if (error != 0) {
        fail_with(*flight.transfer, flight.position, error);
        flight.lander->landed(*flight.slot, false, lock);
        return;
    }
    flights_[flight.stream].push_back(flight);
    if (flying_++ == 0) changed_.notify_all();
}

void DeviceRing::fail_copy(Transfer &transfer, Position position, int error) {
    Lock lock(readers_.mutex);
    fail_with(transfer, position, error);
}

// --- landing ---------------------------------------------------------------------------------------------------------

void *DeviceRing::thread_main(void *argument) {
    DeviceRing &ring = *static_cast<DeviceRing *>(argument);
    ReaderThreads &readers = ring.readers_;
    // Where this fails, every look at an event does, too, and says so.
    ring.enter();
    Lock lock(readers.mutex);
    ring.watch(lock);
    readers.running--;
    readers.landing--;
    readers.ended.notify_all();
    lock.unlock();
    unreference(readers);  // may free the ring too
    return nullptr;
}

// Until el_readers_close, and all who could begin a copy have ended.
void DeviceRing::watch(Lock &lock) {
    while (flying_ > 0 || !readers_.closing || readers_.running > readers_.landing || !old_events_.empty()) {
        if (destroy_events(lock) || land_some(lock)) continue;
        if (flying_ > 0) {
            changed_.wait_until(lock, now_ns() + kLook);
        } else {
            changed_.wait_until(lock, readers_.closing ? now_ns() + kSlice / 5 : kForever);
        }
    }
}

void DeviceRing::give_back(DeviceEvent event) {
    if (event == nullptr) return;
    old_events_.push_back(event);
    changed_.notify_all();
}

// Returns whether there were any: meanwhile the mutex was let go of.
bool DeviceRing::destroy_events(Lock &lock) {
    if (old_events_.empty()) return false;
    const std::vector<DeviceEvent> events = std::move(old_events_);
    old_events_.clear();
    lock.unlock();
    for (DeviceEvent event : events) checked(*runtime_, runtime_->EventDestroy(event));
    lock.lock();
    return true;
}

// The streams' oldest flights. Returns whether any had landed.
bool DeviceRing::land_some(Lock &lock) {
    bool any = false;
    for (auto &flights : flights_) {
        if (flights.empty()) continue;
        const Flight flight = flights.front();
        const int state = look_at(flight, lock);
        if (state == kDeviceNotReady) {
            check_deadline(flight);
            continue;
        }
        flights.pop_front();
        flying_--;
        if (state != 0) fail_with(*flight.transfer, flight.position, state);
        flight.lander->landed(*flight.slot, state == 0, lock);
        any = true;
    }
    return any;
}

int DeviceRing::look_at(const Flight &flight, Lock &lock) {
    lock.unlock();
    const int state = runtime_->EventQuery(flight.slot->event.get());
    if (state != 0) runtime_->GetLastError();
    // After an error the slot may be used again, and the destination freed, only when the stream is known to be at rest.
    if (state != 0 && state != kDeviceNotReady) checked(*runtime_, runtime_->StreamSynchronize(streams_[flight.stream]));
    lock.lock();
    return state;
}

void DeviceRing::check_deadline(const Flight &flight) {
    const int64_t limit = readers_.config.deadline_ms * kMillisecond;
    if (limit == 0 || now_ns() - flight.since <= limit) return;
    fail_late(*flight.transfer, flight.position);
}

}  // namespace el
