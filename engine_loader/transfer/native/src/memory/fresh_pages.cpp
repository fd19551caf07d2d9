#include "memory/fresh_pages.h"

#include <algorithm>
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
// The bytes of a huge page made as small ones, before any were timed: 3.5 GB/s.
constexpr int64_t kAssumedSmallNs = 600000;
// A slow huge page took 10 to 13 ms: what many quick ones gained pays for one of these, and not for more.
constexpr int64_t kMostGainedNs = 12000000;
// The share of the time of small pages that may be spent on trying a huge one again.
constexpr int64_t kTryingShare = 25;
constexpr int64_t kSmoothing = 8;

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

void PageCosts::gain(int64_t ns) {
    const int64_t sum = gained_ns_.load(std::memory_order_relaxed) + ns;
    gained_ns_.store(std::min(sum, kMostGainedNs), std::memory_order_relaxed);
}

void PageCosts::made_huge(int64_t ns) {
    const int64_t small = small_ns_.load(std::memory_order_relaxed);
    gain((small == 0 ? kAssumedSmallNs : small) - ns);
}

void PageCosts::made_small(int64_t ns, uint64_t bytes) {
    gain(ns / kTryingShare);
    if (bytes < kHugePage) return;
    const int64_t before = small_ns_.load(std::memory_order_relaxed);
    small_ns_.store(before == 0 ? ns : before + (ns - before) / kSmoothing, std::memory_order_relaxed);
}

void Destinations::open(std::vector<Range> ranges, HugePages use) {
    const uint64_t unit = huge_page_bytes();
    if (unit == 0 || use == HugePages::never) return;
    ranges_ = merge(std::move(ranges), unit);
    // Other sizes are of processors whose pages are large anyway; what they cost is not timed.
    use_ = unit == kHugePage ? use : HugePages::always;
    choose_huge();
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
    const bool huge = choose_huge();
    const int64_t since = own_ns();
    populate(begin, end - begin);
    const int64_t ns = own_ns() - since;
    if (huge) {
        costs.made_huge(ns);
    } else {
        costs.made_small(ns, end - begin);
    }
}

// Which pages to make next; the kernel has been told.
bool Destinations::choose_huge() {
    const bool huge = use_ == HugePages::always || costs.prefers_huge();
    const Advice advice = huge ? Advice::huge : Advice::small;
    if (advised_.load(std::memory_order_acquire) == advice) return huge;
    const Lock lock(advising_);
    if (advised_.load(std::memory_order_relaxed) != advice) advise(advice);
    return huge;
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
