// The parts of a ring's buffer, and the blocks that are read into them.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/runs.h"
#include "device/device_ring.h"
#include "usrbio/usrbio_channel.h"
#include "usrbio/usrbio_mount_read.h"

namespace el {

// A block that is being read, in one or several runs.
struct Work {
    Transfer *transfer;
    Block block;
    uint32_t runs = 0;  // in slots
    bool cut = false;   // there are no more runs
    bool failed = false;
};

// A part of the ring's buffer, and the run that is read into it.
struct Slot final : Lander {
    // orphaned: in flight, but nobody wants it any more; mounted: being read through the mount; copying: has come, and is
    // on its way to a device
    enum State { free, waiting, flying, orphaned, mounted, copying };

    void landed(PinnedSlot &, bool complete, Lock &) override {
        copied.store(complete ? 1 : -1, std::memory_order_release);
    }

    State state = free;
    Work *work = nullptr;
    Run run;
    std::vector<Segment> segments;
    uint64_t done = 0;
    uint32_t tries = 0;
    int64_t since = 0;  // of the last progress; orphaned: when to give it up
    int64_t retry_at = 0;
    int64_t begun = 0;  // the IO in flight
    std::shared_ptr<Channel> channel;      // into whose buffer it is read; kept by copies to devices after a ring was given up
    std::shared_ptr<MountRead> mount_read;
    PinnedSlot pinned;  // its memory is the ring's
    DeviceRing *device = nullptr;  // of which the event is
    std::atomic<int> copied{0};  // copies to the device: 1 when they have landed, -1 when one failed
};

File &file(const Slot &slot);

// So many bytes more have come.
void note_progress(Slot &slot, uint64_t bytes);

// The memory node of the device that the bytes are for; -1 where there is none, or only one node.
int node_of(const Slot &slot);

// See to an event of this device's. 0, or the runtime's error.
int prepare_event(Slot &slot, DeviceRing &ring);

// The slot's run is over, well or not.
void release(Slot &slot, Slot::State state);

// End a block of which no run is left.
void finish_if_done(Worker &worker, Work *work);

// Fail the transfer at the slot's bytes. `at`: how far beyond what came so far.
void fail_slot(Worker &worker, Slot &slot, uint32_t kind, int error, uint32_t tries, uint64_t at = 0);

class Slots {
  public:
    void reset(uint32_t depth) { slots_ = std::vector<Slot>(depth); }
    size_t size() const { return slots_.size(); }
    Slot &operator[](size_t index) { return slots_[index]; }
    auto begin() { return slots_.begin(); }
    auto end() { return slots_.end(); }
    auto begin() const { return slots_.begin(); }
    auto end() const { return slots_.end(); }

    uint32_t number(const Slot &slot) const { return static_cast<uint32_t>(&slot - slots_.data()); }
    uint32_t count(Slot::State state) const {
        return static_cast<uint32_t>(
            std::count_if(slots_.begin(), slots_.end(), [state](const Slot &slot) { return slot.state == state; }));
    }
    uint32_t used() const { return static_cast<uint32_t>(slots_.size()) - count(Slot::free); }
    bool wanted() const { return count(Slot::free) + count(Slot::orphaned) < slots_.size(); }

    // A free one if fewer than `window` are used: the first, whose memory is the likeliest to be in the processor's cache.
    Slot *unused(uint32_t window) {
        if (used() >= window) return nullptr;
        for (Slot &slot : slots_) {
            if (slot.state == Slot::free) return &slot;
        }
        return nullptr;
    }

  private:
    std::vector<Slot> slots_;
};

}  // namespace el
