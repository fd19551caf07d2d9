// A bell: a word that changes whenever there is something to look at, in this process or in memory that several share.
#pragma once

#include <atomic>
#include <limits.h>
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace el {

using Bell = std::atomic<uint32_t>;
static_assert(sizeof(Bell) == 4 && Bell::is_always_lock_free, "the kernel waits for a word of 32 bits");

inline void ring(Bell &bell) {
    bell.fetch_add(1, std::memory_order_release);
    syscall(SYS_futex, &bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Until the bell has been rung since it was `heard`, at most `ns`; it may end early.
inline void wait_for(Bell &bell, uint32_t heard, int64_t ns) {
    timespec limit;
    limit.tv_sec = static_cast<time_t>(ns / 1000000000);
    limit.tv_nsec = static_cast<long>(ns % 1000000000);
    syscall(SYS_futex, &bell, FUTEX_WAIT, heard, &limit, nullptr, 0);
}

}  // namespace el
