#include "threads/pace.h"

#include <algorithm>

namespace el {
namespace {

// Reads that take less are not waiting for storage but for the processor or the bus.
constexpr int64_t kLateNs = 1000000;
// So much more has to come with twice as many threads.
constexpr double kWorthwhile = 1.15;
constexpr uint32_t kRestWindows = 32;

}  // namespace

bool Pace::note(uint64_t bytes, int64_t took_ns, int64_t now_ns, bool more) {
    // At the end of a transfer ever fewer threads read.
    if (!more || begin_ns_ == 0) {
        start_over(more ? now_ns : 0, 0);
        return false;
    }
    if (unseen_ > 0) {
        start_over(now_ns, unseen_ - 1);
        return false;
    }
    bytes_ += bytes;
    took_ns_ += took_ns;
    if (++blocks_ < 2 * limit_ || now_ns <= begin_ns_) return false;
    const double rate = static_cast<double>(bytes_) / static_cast<double>(now_ns - begin_ns_);
    const bool changed = judge(rate, took_ns_ / blocks_);
    start_over(now_ns, changed ? limit_ : 0);
    return changed;
}

void Pace::start_over(int64_t now_ns, uint32_t unseen) {
    begin_ns_ = now_ns;
    unseen_ = unseen;
    blocks_ = 0;
    bytes_ = 0;
    took_ns_ = 0;
}

bool Pace::judge(double rate, int64_t mean_ns) {
    if (trying_) {
        trying_ = false;
        if (rate < best_rate_ * kWorthwhile) {
            limit_ = fewer_;
            rest_ = kRestWindows;
            return true;
        }
    }
    best_rate_ = rate;
    if (rest_ > 0) {
        rest_--;
        return false;
    }
    if (limit_ == most_ || mean_ns < kLateNs) return false;
    fewer_ = limit_;
    limit_ = std::min(2 * limit_, most_);
    trying_ = true;
    return true;
}

}  // namespace el
