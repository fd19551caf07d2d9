#include "memory/memory.h"

#include <errno.h>
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

uint64_t down(uint64_t value, uint64_t unit) { return value / unit * unit; }
uint64_t up(uint64_t value, uint64_t unit) { return down(value + unit - 1, unit); }

void unmap(uint64_t begin, uint64_t end) {
    if (begin < end) munmap(reinterpret_cast<void *>(begin), end - begin);
}

}  // namespace

uint64_t page_bytes() {
    static const uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

bool present(uint64_t address) {
    unsigned char state = 0;
    if (mincore(reinterpret_cast<void *>(down(address, page_bytes())), 1, &state) != 0) return true;
    return (state & 1) != 0;
}

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
