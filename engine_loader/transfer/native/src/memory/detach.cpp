// Detaching mapped memory from its file: see guard.h.
#include "memory/guard.h"

#include <cerrno>
#include <cstring>

#include <sys/mman.h>
#include <unistd.h>

extern "C" int el_detach(uint64_t address, uint64_t nbytes) {
    if (nbytes == 0) {
        return 0;
    }
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    const uint64_t begin = address & ~(page - 1);
    const uint64_t bytes = ((address + nbytes + page - 1) & ~(page - 1)) - begin;
    void *own = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (own == MAP_FAILED) {
        return errno;
    }
    // Best effort: huge pages make filling fresh memory several times faster.
    (void)madvise(own, bytes, MADV_HUGEPAGE);
    std::memcpy(own, reinterpret_cast<const void *>(begin), bytes);
    if (mremap(own, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, reinterpret_cast<void *>(begin)) == MAP_FAILED) {
        const int error = errno;
        munmap(own, bytes);
        return error;
    }
    return 0;
}
