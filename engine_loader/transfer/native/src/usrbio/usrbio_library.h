// The library of 3FS: found by its path, loaded once.
#pragma once

#include "usrbio/usrbio_abi.h"

namespace el {

// The functions that reading takes.
struct Hf3fs {
    int (*iovcreate)(Hf3fsIov *, const char *mount, size_t size, size_t block_size, int numa);
    void (*iovunlink)(Hf3fsIov *);
    void (*iovdestroy)(Hf3fsIov *);
    int (*iorcreate4)(Hf3fsIor *, const char *mount, int entries, bool for_read, int io_depth, int timeout, int numa,
                      uint64_t flags);
    void (*iordestroy)(Hf3fsIor *);
    int (*prep_io)(const Hf3fsIor *, const Hf3fsIov *, bool read, void *ptr, int fd, size_t offset, uint64_t length,
                   const void *userdata);
    int (*submit_ios)(const Hf3fsIor *);
    int (*wait_for_ios)(const Hf3fsIor *, Hf3fsCqe *, int cqec, int min_results, const timespec *abs_timeout);
};

// The library at `path`, loaded once and never unloaded; nullptr where that fails.
const Hf3fs *load_hf3fs(const char *path);

}  // namespace el
