// Memory: scratch buffers, and making pages present before they are touched.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace el {

constexpr uint64_t kHugePage = 2 << 20;

// A buffer that grows when needed and is given back with its owner. It is of huge pages where it can be: direct reads into
// small pages, which lie anywhere, are cut into many small requests (measured: 1.3 GB/s against 2.2).
class Scratch {
  public:
    Scratch() = default;
    ~Scratch() { release(); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    // At least `bytes`, or nullptr when memory is short.
    char *get(size_t bytes);
    void release();

  private:
    char *memory_ = nullptr;
    size_t bytes_ = 0;
};

// Fresh memory that begins at a huge page, of huge pages where there is room for one; nullptr when memory is short.
// munmap gives it back.
char *map_memory(uint64_t bytes);

uint64_t page_bytes();

// Whether the page at an address has been made; true where the kernel does not say.
bool present(uint64_t address);

// Make all pages of a range present and writable (MADV_POPULATE_WRITE); 0 or an errno.
int populate(uint64_t address, uint64_t bytes);

// Whether (nearly) all of a file's range lies in the page cache; false where the kernel does not say.
bool in_page_cache(int fd, uint64_t offset, uint64_t bytes);

}  // namespace el
