/* The C ABI of libhf3fs_api_shared.so, as far as reading goes: layouts and prototypes as 3FS publishes them (x86-64). */
#ifndef HF3FS_ABI_H
#define HF3FS_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#define HF3FS_API __attribute__((visibility("default")))

enum { /* hf3fs_ior.flags */
    HF3FS_IOR_ALLOW_READ_UNCOMMITTED = 1,
    HF3FS_IOR_FORBID_READ_HOLES = 2,
};

struct hf3fs_iov {
    uint8_t *base;
    void *iovh;
    uint8_t id[16];
    char mount_point[256];
    size_t size;
    size_t block_size;
    int numa;
};

struct hf3fs_ior {
    struct hf3fs_iov iov;
    void *iorh;
    char mount_point[256];
    bool for_read;
    int io_depth;
    int priority;
    int timeout;
    uint64_t flags;
};

struct hf3fs_cqe {
    int32_t index;
    int32_t reserved;
    int64_t result;
    const void *userdata;
};

_Static_assert(sizeof(struct hf3fs_iov) == 312, "hf3fs_iov");
_Static_assert(sizeof(struct hf3fs_ior) == 600, "hf3fs_ior");
_Static_assert(sizeof(struct hf3fs_cqe) == 24, "hf3fs_cqe");
_Static_assert(offsetof(struct hf3fs_iov, numa) == 304, "hf3fs_iov.numa");
_Static_assert(offsetof(struct hf3fs_ior, flags) == 592, "hf3fs_ior.flags");

HF3FS_API bool hf3fs_is_hf3fs(int fd);
HF3FS_API int hf3fs_extract_mount_point(char *mount, int size, const char *path);

HF3FS_API int hf3fs_iovcreate(struct hf3fs_iov *iov, const char *mount, size_t size, size_t block_size, int numa);
HF3FS_API int hf3fs_iovopen(struct hf3fs_iov *iov, const uint8_t id[16], const char *mount, size_t size,
                            size_t block_size, int numa);
HF3FS_API int hf3fs_iovwrap(struct hf3fs_iov *iov, void *base, const uint8_t id[16], const char *mount, size_t size,
                            size_t block_size, int numa);
HF3FS_API void hf3fs_iovunlink(struct hf3fs_iov *iov);
HF3FS_API void hf3fs_iovdestroy(struct hf3fs_iov *iov);

HF3FS_API size_t hf3fs_ior_size(int entries);
HF3FS_API int hf3fs_iorcreate(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth,
                              int numa);
HF3FS_API int hf3fs_iorcreate2(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth,
                               int priority, int numa);
HF3FS_API int hf3fs_iorcreate3(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth,
                               int priority, int timeout, int numa);
HF3FS_API int hf3fs_iorcreate4(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth,
                               int timeout, int numa, uint64_t flags);
HF3FS_API void hf3fs_iordestroy(struct hf3fs_ior *ior);
HF3FS_API int hf3fs_io_entries(const struct hf3fs_ior *ior);

HF3FS_API int hf3fs_reg_fd(int fd, uint64_t flags);
HF3FS_API void hf3fs_dereg_fd(int fd);

HF3FS_API int hf3fs_prep_io(const struct hf3fs_ior *ior, const struct hf3fs_iov *iov, bool read, void *ptr, int fd,
                            size_t offset, uint64_t length, const void *userdata);
HF3FS_API int hf3fs_submit_ios(const struct hf3fs_ior *ior);
HF3FS_API int hf3fs_wait_for_ios(const struct hf3fs_ior *ior, struct hf3fs_cqe *cqes, int cqec, int min_results,
                                 const struct timespec *abs_timeout);

HF3FS_API int hf3fs_hardlink(const char *target, const char *link_name);
HF3FS_API int hf3fs_punchhole(int fd, int n, const size_t *start, const size_t *end, size_t flags);

/* Functions that only the emulator has. */
HF3FS_API int hf3fs_emulator_configure(const char *options); /* 0, or -EINVAL: an unknown option */
HF3FS_API int64_t hf3fs_emulator_count(const char *what);    /* -1: there is no such counter */
HF3FS_API void hf3fs_emulator_sweep(void);                   /* clean up after processes that have ended */

/* What libemulated_mount.so passes a program's own calls on to. */
HF3FS_API int hf3fs_emulator_symlink(const char *target, const char *link);
HF3FS_API int hf3fs_emulator_unlink(const char *path);
HF3FS_API int hf3fs_emulator_open(const char *path, int flags, unsigned mode);
HF3FS_API int hf3fs_emulator_close(int fd);
HF3FS_API ssize_t hf3fs_emulator_readlink(const char *path, char *target, size_t capacity);

#endif
