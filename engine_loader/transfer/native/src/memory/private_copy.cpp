#include "memory/private_copy.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "memory/memory.h"

namespace el {
namespace {

uint64_t page_bytes() {
    static const uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

// Memory that can be moved to `place` without splitting huge pages.
class Spare {
  public:
    Spare(uint64_t place, uint64_t bytes) : memory_(map_memory(bytes, place)), bytes_(bytes) {}
    ~Spare() {
        if (memory_ != nullptr) munmap(memory_, bytes_);
    }
    Spare(const Spare &) = delete;
    Spare &operator=(const Spare &) = delete;

    char *get() const { return memory_; }

    int move_to(uint64_t place) {
        void *to = reinterpret_cast<void *>(place);
        if (mremap(memory_, bytes_, bytes_, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) return errno;
        memory_ = nullptr;  // another thread's memory may lie there now
        return 0;
    }

  private:
    char *memory_;
    const uint64_t bytes_;
};

// A memcpy by the kernel, which answers EFAULT where touching a page would be a SIGBUS.
int copy_checked(char *to, uint64_t from, uint64_t bytes) {
    for (uint64_t done = 0; done < bytes;) {
        iovec target{to + done, bytes - done};
        iovec source{reinterpret_cast<void *>(from + done), bytes - done};
        const ssize_t n = process_vm_readv(getpid(), &target, 1, &source, 1, 0);
        if (n <= 0) return n < 0 ? errno : EFAULT;
        done += static_cast<uint64_t>(n);
    }
    return 0;
}

}  // namespace

int make_private(uint64_t address, uint64_t bytes) {
    const uint64_t first = address / page_bytes() * page_bytes();
    const uint64_t last = (address + bytes + page_bytes() - 1) / page_bytes() * page_bytes();
    Spare spare(first, last - first);
    if (spare.get() == nullptr) return ENOMEM;
    const int error = copy_checked(spare.get(), first, last - first);
    return error != 0 ? error : spare.move_to(first);
}

}  // namespace el
