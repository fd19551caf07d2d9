#include "memory/fresh_pages.h"

#include <algorithm>
#include <iterator>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "memory/memory.h"

namespace el {
namespace {

// Allocators put a header between two tensors; huge pages may span it. More would be memory that nobody asked for.
constexpr uint64_t kBridgedGap = 64 << 10;
// Below this, looking whether memory is fresh costs about what it saves.
constexpr uint64_t kPrefaultBytes = 128 << 10;
// A slow huge page took 7 to 13 ms: what many quick ones gained pays for one of these, and not for more.
constexpr int64_t kMostGainedNs = 12000000;
// The share of the time of small pages that may be spent on trying a huge one again: a fiftieth.
constexpr int64_t kTryingShare = 50;
// The bytes of a huge page made as small ones, before any were timed: 3.5 GB/s.
constexpr int64_t kAssumedSmallNs = 600000;
// Fewer bytes of small pages say too little of what they cost.
constexpr uint64_t kTimedBytes = 256 << 10;
constexpr int64_t kSmoothing = 8;
constexpr uint64_t kSmallestPage = 4096;

uint64_t down(uint64_t value, uint64_t unit) { return value / unit * unit; }
uint64_t up(uint64_t value, uint64_t unit) { return down(value + unit - 1, unit); }

bool read_text(const char *path, char *text, size_t capacity) {
    FILE *file = fopen(path, "re");
    if (file == nullptr) return false;
    const size_t n = fread(text, 1, capacity - 1, file);
    fclose(file);
    text[n] = '\0';
    return n > 0;
}

// Size of a transparent huge page, or 0 where the system has none to give.
uint64_t find_huge_page_bytes() {
    char text[128];
    if (!read_text("/sys/kernel/mm/transparent_hugepage/enabled", text, sizeof text)) return 0;
    if (strstr(text, "[never]") != nullptr) return 0;
    unsigned long long bytes = 0;
    if (!read_text("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", text, sizeof text)) return 0;
    return sscanf(text, "%llu", &bytes) == 1 ? bytes : 0;
}

uint64_t huge_page_bytes() {
    static const uint64_t bytes = find_huge_page_bytes();
    return bytes;
}

// Ranges in order, those that lie close together as one, cut to whole huge pages.
std::vector<Range> merge(std::vector<Range> ranges, uint64_t unit) {
    const auto by_begin = [](const Range &a, const Range &b) { return a.begin < b.begin; };
    // Allocators hand out ascending or descending addresses; both come sorted or nearly so.
    if (!std::is_sorted(ranges.begin(), ranges.end(), by_begin)) std::sort(ranges.begin(), ranges.end(), by_begin);
    std::vector<Range> merged;
    for (const Range &range : ranges) {
        if (merged.empty() || range.begin > merged.back().end + kBridgedGap) {
            merged.push_back(range);
        } else {
            merged.back().end = std::max(merged.back().end, range.end);
        }
    }
    for (Range &range : merged) range = Range{up(range.begin, unit), down(range.end, unit)};
    const auto empty = [](const Range &range) { return range.begin >= range.end; };
    merged.erase(std::remove_if(merged.begin(), merged.end(), empty), merged.end());
    return merged;
}

// Time of the calling thread on a processor: what the host takes to give memory counts, turns of other threads do not.
int64_t own_ns() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
}

PageCosts costs;

}  // namespace

int64_t PageCosts::gain(int64_t ns) {
    const int64_t sum = std::min(gained_ns_.load(std::memory_order_relaxed) + ns, kMostGainedNs);
    gained_ns_.store(sum, std::memory_order_relaxed);
    return sum;
}

int64_t PageCosts::small_ns() const {
    const int64_t timed = small_ns_.load(std::memory_order_relaxed);
    return timed == 0 ? kAssumedSmallNs : timed;
}

PageCosts::Kind PageCosts::next() {
    if (prefers_huge()) return Kind::huge;
    const bool due = gained_ns_.load(std::memory_order_relaxed) >= 0;
    return due && !trying_.exchange(true, std::memory_order_acquire) ? Kind::trial : Kind::small;
}

void PageCosts::made_huge(int64_t ns) {
    if (gain(small_ns() - ns) < 0) huge_.store(false, std::memory_order_relaxed);
}

void PageCosts::made_small(int64_t ns, uint64_t bytes) {
    gain(ns / kTryingShare);
    if (bytes < kTimedBytes) return;
    const int64_t all = std::max<int64_t>(ns * static_cast<int64_t>(kHugePage / bytes), 1);
    const int64_t before = small_ns_.load(std::memory_order_relaxed);
    small_ns_.store(before == 0 ? all : before + (all - before) / kSmoothing, std::memory_order_relaxed);
}

void PageCosts::tried(int64_t ns) {
    if (gain(small_ns() - ns) >= 0) huge_.store(true, std::memory_order_relaxed);
    give_up_trial();
}

void Destinations::open(std::vector<Range> ranges, HugePages use) {
    const uint64_t unit = huge_page_bytes();
    if (unit == 0 || use == HugePages::never) return;
    ranges_ = merge(std::move(ranges), unit);
    // Other sizes are of processors whose pages are large anyway; what they cost is not timed.
    use_ = unit == kHugePage ? use : HugePages::always;
    ensure(use_ == HugePages::always || costs.prefers_huge() ? Advice::huge : Advice::small);
}

void Destinations::prefault(void *address, uint64_t bytes) {
    const uint64_t begin = up(reinterpret_cast<uint64_t>(address), page_bytes());
    const uint64_t end = down(reinterpret_cast<uint64_t>(address) + bytes, page_bytes());
    if (bytes < kPrefaultBytes || present(begin + bytes / 2)) return;
    for (uint64_t at = begin; at < end;) {
        const uint64_t next = std::min(down(at, kHugePage) + kHugePage, end);
        make(at, next);
        at = next;
    }
}

// The part of a huge page from `begin` to `end`. Should it fail, the read that follows finds out and says why.
void Destinations::make(uint64_t begin, uint64_t end) {
    if (use_ != HugePages::where_quicker) {
        populate(begin, end - begin);
        return;
    }
    if (present(begin + (end - begin) / 2)) return;
    const PageCosts::Kind kind = costs.next();
    const bool trial = kind == PageCosts::Kind::trial;
    if (kind != PageCosts::Kind::small && make_huge(down(begin, kHugePage), trial)) return;
    if (trial) costs.give_up_trial();
    if (kind != PageCosts::Kind::huge) ensure(Advice::small);
    const int64_t since = own_ns();
    populate(begin, end - begin);
    if (kind != PageCosts::Kind::huge) costs.made_small(own_ns() - since, end - begin);
}

// All of the huge page at `place`. False where it cannot be one.
bool Destinations::make_huge(uint64_t place, bool trial) {
    if (!is_fresh(place)) return false;
    if (trial) {
        madvise(reinterpret_cast<void *>(place), kHugePage, MADV_HUGEPAGE);
    } else {
        ensure(Advice::huge);
    }
    const int64_t since = own_ns();
    populate(place, kHugePage);
    const int64_t ns = own_ns() - since;
    trial ? costs.tried(ns) : costs.made_huge(ns);
    return true;
}

// Whether there is room for a whole huge page, of which nothing has been made.
bool Destinations::is_fresh(uint64_t place) const {
    const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), place,
                                        [](uint64_t at, const Range &range) { return at < range.begin; });
    if (after == ranges_.begin() || place + kHugePage > std::prev(after)->end) return false;
    unsigned char states[kHugePage / kSmallestPage];
    if (mincore(reinterpret_cast<void *>(place), kHugePage, states) != 0) return false;
    const uint64_t pages = kHugePage / page_bytes();
    return std::none_of(states, states + pages, [](unsigned char state) { return (state & 1) != 0; });
}

// Tell the kernel which pages to make, unless it knows.
void Destinations::ensure(Advice advice) {
    if (advised_.load(std::memory_order_acquire) == advice) return;
    const Lock lock(advising_);
    if (advised_.load(std::memory_order_relaxed) != advice) advise(advice);
}

void Destinations::advise(Advice advice) {
    const int flag = advice == Advice::huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE;
    // The answer does not matter: memory that cannot have huge pages (pinned by a driver, of a file) does without.
    for (const Range &range : ranges_) madvise(reinterpret_cast<void *>(range.begin), range.end - range.begin, flag);
    advised_.store(advice, std::memory_order_release);
}

void Destinations::close() {
    if (advised_.load(std::memory_order_acquire) == Advice::small) advise(Advice::huge);
    std::vector<Range>().swap(ranges_);
    use_ = HugePages::never;
}

}  // namespace el
