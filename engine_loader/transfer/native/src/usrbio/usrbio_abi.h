// The C ABI of libhf3fs_api_shared.so (x86-64), as published in deepseek-ai/3FS, src/lib/api/hf3fs_usrbio.h (2026-03).
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <time.h>

namespace el {

struct Hf3fsIov {
    uint8_t *base;
    void *iovh;
    uint8_t id[16];
    char mount_point[256];
    size_t size;
    size_t block_size;
    int numa;
};

struct Hf3fsIor {
    Hf3fsIov iov;
    void *iorh;
    char mount_point[256];
    bool for_read;
    int io_depth;
    int priority;
    int timeout;
    uint64_t flags;
};

struct Hf3fsCqe {
    int32_t index;
    int32_t reserved;
    int64_t result;
    const void *userdata;
};

static_assert(sizeof(Hf3fsIov) == 312 && offsetof(Hf3fsIov, size) == 288);
static_assert(sizeof(Hf3fsIor) == 600 && offsetof(Hf3fsIor, for_read) == 576 && offsetof(Hf3fsIor, flags) == 592);
static_assert(sizeof(Hf3fsCqe) == 24 && offsetof(Hf3fsCqe, userdata) == 16);

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
