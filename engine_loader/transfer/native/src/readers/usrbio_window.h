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
    }
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
            if (slots_ <= kSmallest) read_bytes_ = std::min(std::max(read_bytes_ / 2, kSmallestRead), io_bytes_);
            slots_ = std::max(slots_ - 1, std::min(kSmallest, depth_));
            ready_in_a_row_ = 0;
        }
    }

  private:
    static constexpr int64_t kWaited = kMillisecond / 20;
    static constexpr uint32_t kReadyBeforeShrinking = 2;
    static constexpr uint32_t kSmallest = 2;
    static constexpr uint64_t kSmallestRead = 1 << 20;

    uint32_t depth_ = 0;
    uint64_t io_bytes_ = 0;
    uint32_t slots_ = 0;
    uint64_t read_bytes_ = 0;
    uint32_t ready_in_a_row_ = 0;
};

}  // namespace el
