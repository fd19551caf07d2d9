#include "private_copy.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

namespace el {
namespace {

constexpr uint64_t kHugePage = 2 << 20;

uint64_t page_bytes() {
    static const uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

// Anonymous memory that lies to huge pages as `place` does, so that it can be moved there without splitting any.
class Spare {
  public:
    Spare(uint64_t place, uint64_t bytes) : bytes_(bytes) {
        void *memory = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return;
        const uint64_t begin = reinterpret_cast<uint64_t>(memory);
        begin_ = begin + (place - begin) % kHugePage;
        unmap(begin, begin_);
        unmap(begin_ + bytes, begin + bytes + kHugePage);
        if (bytes >= kHugePage) madvise(get(), bytes, MADV_HUGEPAGE);
    }
    ~Spare() {
        if (begin_ != 0) unmap(begin_, begin_ + bytes_);
    }
    Spare(const Spare &) = delete;
    Spare &operator=(const Spare &) = delete;

    char *get() const { return reinterpret_cast<char *>(begin_); }

    int move_to(uint64_t place) {
        void *moved = mremap(get(), bytes_, bytes_, MREMAP_MAYMOVE | MREMAP_FIXED, reinterpret_cast<void *>(place));
        if (moved == MAP_FAILED) return errno;
        bytes_ = 0;  // another thread's memory may lie here now
        return 0;
    }

  private:
    static void unmap(uint64_t begin, uint64_t end) {
        if (begin < end) munmap(reinterpret_cast<void *>(begin), end - begin);
    }

    uint64_t begin_ = 0;
    uint64_t bytes_;
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
