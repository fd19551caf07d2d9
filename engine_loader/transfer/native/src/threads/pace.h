// How many threads read at once from storage that answers late.
#pragma once

#include <stdint.h>

namespace el {

// Twice as many threads bring twice the bytes from storage whose answers only take long, and none more from storage that
// is busy already. So where reads take long, more threads are tried, and kept where they bring more. Not safe for several
// threads: the mutex of the ReaderThreads guards it.
class Pace {
  public:
    Pace(uint32_t least, uint32_t most) : limit_(least), most_(most), fewer_(least) {}

    // Threads that may read.
    uint32_t limit() const { return limit_; }

    // A block of `bytes` was read in `took_ns`, up to `now_ns`; `more` are waiting. True when the limit has changed.
    bool note(uint64_t bytes, int64_t took_ns, int64_t now_ns, bool more);

  private:
    void start_over(int64_t now_ns, uint32_t unseen);
    bool judge(double rate, int64_t mean_ns);

    uint32_t limit_;
    const uint32_t most_;
    uint32_t fewer_;             // what the limit was before the trial
    bool trying_ = false;        // whether more threads bring more
    uint32_t rest_ = 0;          // windows before the next trial
    double best_rate_ = 0;       // bytes per ns, before the trial
    int64_t begin_ns_ = 0;       // of the window; 0: none is open
    uint32_t unseen_ = 0;        // blocks before the window begins
    uint32_t blocks_ = 0;        // in the window
    uint64_t bytes_ = 0;
    int64_t took_ns_ = 0;
};

}  // namespace el
