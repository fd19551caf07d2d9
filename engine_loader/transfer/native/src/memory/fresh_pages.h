// The pages of fresh destinations: huge ones where those are made sooner than as many bytes of small ones.
#pragma once

#include <atomic>
#include <stdint.h>
#include <vector>

#include "threads/sync.h"

namespace el {

struct Range {
    uint64_t begin;
    uint64_t end;
};

// What making pages costs in this process, and which kind to make next. A huge page mostly takes half the time of 512 small
// ones. Where a host has taken a guest's free pages back (free page reporting), it takes ten times their time, for as long as
// the memory that the host has yet to give lasts. Pages that it has given come in a row, mostly those that were freed last. So
// one thread tries a huge page while the others make small ones; where it was quicker, all threads make huge ones, for as long
// as what those gained is more than what they lost. After that a small share of the time that small ones take is spent on
// trying a huge one again.
class PageCosts {
  public:
    enum class Kind { small, huge, trial };

    // Which to make now; end a trial with tried() or give_up_trial().
    Kind next();
    bool prefers_huge() const { return huge_.load(std::memory_order_relaxed); }
    // A huge page was made in `ns`, or small ones of that many bytes in all.
    void made_huge(int64_t ns);
    void made_small(int64_t ns, uint64_t bytes);
    void tried(int64_t ns);
    void give_up_trial() { trying_.store(false, std::memory_order_release); }

  private:
    int64_t gain(int64_t ns);
    int64_t small_ns() const;

    // Threads add at the same time; one that is lost to another makes no difference that lasts.
    std::atomic<int64_t> gained_ns_{0};
    std::atomic<int64_t> small_ns_{0};  // for the bytes of a huge page; 0: none was timed
    std::atomic<bool> huge_{false};
    std::atomic<bool> trying_{false};
};

enum class HugePages { never, where_quicker, always };

// Where a transfer writes to in memory of the CPU.
class Destinations {
  public:
    // Take over the large ranges that are written, in any order, and advise the kernel.
    void open(std::vector<Range> ranges, HugePages use);
    // Make the pages of a large fresh part present in one call rather than fault by fault. Costs next to nothing where
    // they are present already. Best effort.
    void prefault(void *address, uint64_t bytes);
    // Nothing is written any more: the kernel may make huge pages of small ones in its own time again.
    void close();

  private:
    enum class Advice { none, huge, small };

    void make(uint64_t begin, uint64_t end);
    bool make_huge(uint64_t place, bool trial);
    bool is_fresh(uint64_t place) const;
    void ensure(Advice advice);
    void advise(Advice advice);

    std::vector<Range> ranges_;
    HugePages use_ = HugePages::never;
    std::atomic<Advice> advised_{Advice::none};
    Mutex advising_;
};

}  // namespace el
