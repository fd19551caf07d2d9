#include "memory/memory.h"

#include <algorithm>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

// Newer than the headers of the systems that we are built on; a kernel without them answers EINVAL or ENOSYS.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

namespace el {
namespace {

constexpr uint64_t kHugePage = 2 << 20;
// Allocators put a header between two tensors; huge pages may span it. More would be memory that nobody asked for.
constexpr uint64_t kBridgedGap = 64 << 10;
// Below this, looking whether memory is fresh costs about what it saves.
constexpr size_t kPrefaultBytes = 128 << 10;

uint64_t page_bytes() {
    static const uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

uint64_t down(uint64_t value, uint64_t unit) { return value / unit * unit; }
uint64_t up(uint64_t value, uint64_t unit) { return down(value + unit - 1, unit); }

void unmap(uint64_t begin, uint64_t end) {
    if (begin < end) munmap(reinterpret_cast<void *>(begin), end - begin);
}

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

void advise(Range range, uint64_t unit) {
    const uint64_t begin = up(range.begin, unit);
    const uint64_t end = down(range.end, unit);
    // The answer does not matter: memory that cannot have huge pages (pinned by a driver, of a file) does without.
    if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
}

bool present(uint64_t address) {
    unsigned char state = 0;
    if (mincore(reinterpret_cast<void *>(down(address, page_bytes())), 1, &state) != 0) return true;
    return (state & 1) != 0;
}

}  // namespace

void Scratch::release() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
    memory_ = nullptr;
    bytes_ = 0;
}

char *Scratch::get(size_t bytes) {
    if (bytes <= bytes_) return memory_;
    release();
    const uint64_t unit = bytes < kHugePage / 2 ? page_bytes() : kHugePage;
    memory_ = map_memory(up(bytes, unit));
    if (memory_ != nullptr) bytes_ = up(bytes, unit);
    return memory_;
}

char *map_memory(uint64_t bytes) {
    void *memory = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    const uint64_t all = reinterpret_cast<uint64_t>(memory);
    const uint64_t begin = up(all, kHugePage);
    unmap(all, begin);
    unmap(begin + bytes, all + bytes + kHugePage);
    if (bytes >= kHugePage) madvise(reinterpret_cast<void *>(begin), bytes, MADV_HUGEPAGE);
    return reinterpret_cast<char *>(begin);
}

void advise_huge_pages(std::vector<Range> &ranges) {
    const uint64_t unit = huge_page_bytes();
    if (unit == 0 || ranges.empty()) return;
    const auto by_begin = [](const Range &a, const Range &b) { return a.begin < b.begin; };
    // Allocators hand out ascending or descending addresses; both come sorted or nearly so.
    if (!std::is_sorted(ranges.begin(), ranges.end(), by_begin)) std::sort(ranges.begin(), ranges.end(), by_begin);
    Range merged = ranges.front();
    for (const Range &range : ranges) {
        if (range.begin > merged.end + kBridgedGap) {
            advise(merged, unit);
            merged = range;
        }
        merged.end = std::max(merged.end, range.end);
    }
    advise(merged, unit);
}

void prefault(void *address, size_t bytes) {
    const uint64_t begin = reinterpret_cast<uint64_t>(address);
    if (bytes < kPrefaultBytes || present(begin + bytes / 2)) return;
    const uint64_t first = up(begin, page_bytes());
    const uint64_t last = down(begin + bytes, page_bytes());
    // Should it fail, the read that follows finds out and says why.
    madvise(reinterpret_cast<void *>(first), last - first, MADV_POPULATE_WRITE);
}

int populate(uint64_t address, uint64_t bytes) {
    const uint64_t first = down(address, page_bytes());
    const uint64_t last = up(address + bytes, page_bytes());
    return madvise(reinterpret_cast<void *>(first), last - first, MADV_POPULATE_WRITE) == 0 ? 0 : errno;
}

bool in_page_cache(int fd, uint64_t offset, uint64_t bytes) {
    struct {
        uint64_t offset, bytes;
    } range = {offset, bytes};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages = {0, 0, 0, 0, 0};
    if (syscall(SYS_cachestat, fd, &range, &pages, 0) != 0) return false;
    return pages.cached * page_bytes() >= bytes - bytes / 8;
}

}  // namespace el
