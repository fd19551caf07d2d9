// What the threads count. Each worker has counters of its own, so that counting never makes threads wait for each other.
#pragma once

#include <atomic>
#include <stdint.h>

#include "core/c_interface.h"

namespace el {

class Counter {
  public:
    // Only one thread adds to a counter; others may look at any time.
    void add(uint64_t n) { value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed); }
    uint64_t get() const { return value_.load(std::memory_order_relaxed); }

  private:
    std::atomic<uint64_t> value_{0};
};

struct alignas(64) Counters {
    Counter bytes, reads, retries, short_reads, overread_bytes, buffered_bytes, direct_bytes, direct_straight_bytes,
        direct_refused, read_ns, scatter_ns, backoff_ns, idle_ns, usrbio_bytes, slot_wait_ns;

    void add_to(el_stats_info &sum) const {
        sum.bytes += bytes.get();
        sum.reads += reads.get();
        sum.retries += retries.get();
        sum.short_reads += short_reads.get();
        sum.overread_bytes += overread_bytes.get();
        sum.buffered_bytes += buffered_bytes.get();
        sum.direct_bytes += direct_bytes.get();
        sum.direct_straight_bytes += direct_straight_bytes.get();
        sum.direct_refused += direct_refused.get();
        sum.read_ns += read_ns.get();
        sum.scatter_ns += scatter_ns.get();
        sum.backoff_ns += backoff_ns.get();
        sum.idle_ns += idle_ns.get();
        sum.usrbio_bytes += usrbio_bytes.get();
        sum.slot_wait_ns += slot_wait_ns.get();
    }
};

}  // namespace el
