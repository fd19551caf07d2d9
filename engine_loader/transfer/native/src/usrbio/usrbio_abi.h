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

constexpr uint64_t kForbidReadHoles = 2;  // HF3FS_IOR_FORBID_READ_HOLES: ENODATA in place of zeros

}  // namespace el
