// How many IOs of a ring are in flight, and how large they are.
#pragma once

#include <algorithm>
#include <stdint.h>

#include "threads/sync.h"

namespace el {

class Window {
  public:
    void reset(uint32_t depth, uint64_t io_bytes) {
        depth_ = slots_ = depth;
        io_bytes_ = read_bytes_ = io_bytes;
        latency_ns_ = copy_ns_ = 0;
    }
    // What one IO took: the least is what the storage takes when nothing waits before it.
    void came(int64_t latency_ns) { latency_ns_ = latency_ns_ == 0 ? latency_ns : std::min(latency_ns_, latency_ns); }
    void copied(int64_t ns) { copy_ns_ = copy_ns_ == 0 ? ns : (7 * copy_ns_ + ns) / 8; }
    uint32_t slots() const { return slots_; }            // that are used at most
    uint64_t read_bytes() const { return read_bytes_; }  // of an IO at most

    // The storage sets the pace: all of the window in flight, so that it never waits for us. We do: fewer, so that what
    // is copied is still in the cache (measured without a limit: 2.0 GB/s with 16 in flight, 4.5 with 4).
    void adapt(int64_t waited_ns, bool copying_to_device) {
        if (copying_to_device) {
            slots_ = depth_;  // the device's copies want memory, not the processor's cache
        } else if (waited_ns > kWaited) {
            slots_ = std::min(2 * slots_, depth_);
            read_bytes_ = std::min(2 * read_bytes_, io_bytes_);
            ready_in_a_row_ = 0;
        } else if (++ready_in_a_row_ >= kReadyBeforeShrinking) {
            if (slots_ <= fewest() && latency_ns_ < kStorage) read_bytes_ = std::min(std::max(read_bytes_ / 2, kSmallestRead), io_bytes_);
            slots_ = std::max(slots_ - 1, fewest());
            ready_in_a_row_ = 0;
        }
    }

  private:
    // As many as are copied while one comes: with fewer, the copying would wait for the storage.
    uint32_t fewest() const {
        const int64_t meanwhile = copy_ns_ == 0 ? 0 : latency_ns_ / copy_ns_;
        return static_cast<uint32_t>(std::min<int64_t>(std::max<int64_t>(kSmallest, 1 + meanwhile), depth_));
    }

    static constexpr int64_t kStorage = 2 * kMillisecond;  // an IO that takes as long waits for storage, not for a CPU
    static constexpr int64_t kWaited = kMillisecond / 20;
    static constexpr uint32_t kReadyBeforeShrinking = 2;
    static constexpr uint32_t kSmallest = 2;
    static constexpr uint64_t kSmallestRead = 1 << 20;

    uint32_t depth_ = 0;
    uint64_t io_bytes_ = 0;
    uint32_t slots_ = 0;
    uint64_t read_bytes_ = 0;
    uint32_t ready_in_a_row_ = 0;
    int64_t latency_ns_ = 0;
    int64_t copy_ns_ = 0;
};

}  // namespace el
