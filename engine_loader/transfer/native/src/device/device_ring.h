// How bytes get to one device: page-locked slots that are used over and over, streams of our own, and a thread that sees
// copies land.
#pragma once

#include <deque>
#include <string>

#include "device/device.h"
#include "device/device_runtime.h"
#include "readers/io.h"
#include "core/runs.h"

namespace el {

// One el_device_config, with a string of its own.
struct DeviceConfig {
    explicit DeviceConfig(const el_device_config &config);
    bool operator==(const DeviceConfig &other) const;

    int device;
    uint32_t streams;
    uint64_t pinned_bytes;
    std::string library;
};

// Page-locked memory, and the event behind the last copy from it.
struct PinnedSlot {
    char *memory = nullptr;
    OwnedEvent event;
};

// Waits for copies to land. The ring's thread calls it once for every flight, with the mutex held;
// `lock` may be let go of at the end.
class Lander {
  public:
    virtual void landed(PinnedSlot &slot, bool complete, Lock &lock) = 0;

  protected:
    ~Lander() = default;
};

// Copies under way from one slot.
struct Flight {
    Transfer *transfer;
    Lander *lander;
    PinnedSlot *slot;
    Position position;  // of the first byte, for messages
    uint32_t stream;
    int64_t since;
};

// Only slots and flights change after open; the mutex of the ReaderThreads guards them.
class DeviceRing {
  public:
    DeviceRing(ReaderThreads &readers, const DeviceConfig &config);
    ~DeviceRing() { close(); }
    DeviceRing(const DeviceRing &) = delete;
    DeviceRing &operator=(const DeviceRing &) = delete;

    // Make streams; false with `failure` set. Neither this nor close() wants the mutex.
    bool open(el_device_failure &failure);
    // Make slots unless there are: what comes by the rings of USRBIO needs none. False with `failure` set. It takes tenths of
    // a second, and may be called by several threads; not with the mutex.
    bool ensure_slots(el_device_failure &failure);
    // The memory node near the device; -1 where that is unknown, or where there is only one.
    int node() const { return node_; }
    // Give everything back. Nothing is in flight, and no thread uses the ring, any more.
    void close();
    // Start the thread. The mutex is held. 0 or an errno.
    int start();
    void join() { pthread_join(thread_, nullptr); }
    void detach() { pthread_detach(thread_); }
    void wake() { changed_.notify_all(); }

    const DeviceConfig &config() const { return config_; }
    const DeviceRuntime &runtime() const { return *runtime_; }
    uint64_t slot_bytes() const { return slot_bytes_; }
    uint32_t streams() const { return static_cast<uint32_t>(streams_.size()); }

    // Make the device this thread's, which is one of the library's: giving back the one before could make a context of the
    // runtime on a device that nobody uses. 0, or the runtime's error.
    int enter() { return checked(*runtime_, runtime_->SetDevice(config_.device)); }

    // Have the transfer's copies come after what is on the owner's stream now. 0, or the runtime's error.
    int follow(DeviceStream owner, Transfer &transfer);

    // A slot that nobody uses; waits for one. nullptr when the transfer was stopped, or now failed by its deadline.
    PinnedSlot *take(Reader reader, const Run &run);
    // The mutex is held.
    void give(PinnedSlot &slot);
    // Have the ring's thread give an event back, or nothing, since that can wait for the driver's own lock: all reader
    // threads would wait with it. The mutex is held.
    void give_back(DeviceEvent event);

    // Have a stream wait for what the transfer follows. Copies of a block come after it. 0, or the runtime's error.
    int begin(uint32_t stream, const Transfer &transfer);
    // Copy a run whose first byte lies at `span`. 0, or the runtime's error.
    int copy(uint32_t stream, const Run &run, const char *span);
    // From now on the ring's thread watches over the copies that were begun from a slot, also where one failed to begin.
    void launch(Flight flight);

    // Fail the transfer with an error of the runtime.
    void fail_copy(Transfer &transfer, Position position, int error);

  private:
    static void *thread_main(void *ring);
    void watch(Lock &lock);
    bool destroy_events(Lock &lock);
    // The state of the oldest flight of a stream: 0, kDeviceNotReady or an error.
    int look_at(const Flight &flight, Lock &lock);
    bool land_some(Lock &lock);
    void check_deadline(const Flight &flight);
    bool make_slots(el_device_failure &failure);
    void give_slots_back();
    char *pinned_memory(uint64_t bytes, int &error);
    void prefer_near_node(char *memory, uint64_t bytes) const;
    bool explain(el_device_failure &failure, uint32_t step, int error) const;

    ReaderThreads &readers_;
    const DeviceConfig config_;
    const DeviceRuntime *runtime_ = nullptr;
    const uint64_t slot_bytes_;
    int node_ = -1;
    Mutex making_slots_;  // guards the next two
    bool slots_ready_ = false;
    bool closed_ = false;
    char *memory_ = nullptr;
    uint64_t memory_bytes_ = 0;
    bool registered_ = false;  // our own memory; else the runtime's
    std::vector<DeviceStream> streams_;
    std::vector<std::unique_ptr<PinnedSlot>> slots_;
    std::vector<PinnedSlot *> free_;
    std::vector<std::deque<Flight>> flights_;  // by stream
    uint32_t flying_ = 0;
    std::vector<DeviceEvent> old_events_;  // of ended transfers
    Condition changed_;  // there are flights, or el_readers_close was called
    Condition freed_;    // a slot
    pthread_t thread_{};
};

}  // namespace el
