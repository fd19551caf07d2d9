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

// What making pages costs in this process, and which kind to make next. A huge page mostly takes a third of the time of
// 512 small ones. Where a host has taken a guest's free pages back (free page reporting), it takes many times that time,
// for as long as the memory that the host has yet to give lasts. So huge pages are made while what they gained is more
// than what they lost, and a small share of the time that small ones take is spent on trying a huge one again.
class PageCosts {
  public:
    bool prefers_huge() const { return gained_ns_.load(std::memory_order_relaxed) >= 0; }
    // A huge page was made in `ns`, or small ones of that many bytes in all.
    void made_huge(int64_t ns);
    void made_small(int64_t ns, uint64_t bytes);

  private:
    void gain(int64_t ns);

    // Threads add at the same time; one that is lost to another makes no difference that lasts.
    std::atomic<int64_t> gained_ns_{0};
    std::atomic<int64_t> small_ns_{0};  // for the bytes of a huge page; 0: none was timed
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

    bool choose_huge();
    void make(uint64_t begin, uint64_t end);
    void advise(Advice advice);

    std::vector<Range> ranges_;
    HugePages use_ = HugePages::never;
    std::atomic<Advice> advised_{Advice::none};
    Mutex advising_;
};

}  // namespace el
