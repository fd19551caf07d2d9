/* libemulated_mount.so, for LD_PRELOAD: a program's own calls on the mount answer as the library's do. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <unistd.h>

#include "hf3fs_abi.h"

HF3FS_API int symlink(const char *target, const char *link) { return hf3fs_emulator_symlink(target, link); }

HF3FS_API int unlink(const char *path) { return hf3fs_emulator_unlink(path); }

HF3FS_API ssize_t readlink(const char *restrict path, char *restrict target, size_t capacity) {
    return hf3fs_emulator_readlink(path, target, capacity);
}

HF3FS_API int close(int fd) { return hf3fs_emulator_close(fd); }

static int open_any(const char *path, int flags, va_list rest) {
    const unsigned mode = (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(rest, unsigned) : 0;
    return hf3fs_emulator_open(path, flags, mode);
}

HF3FS_API int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    const int fd = open_any(path, flags, rest);
    va_end(rest);
    return fd;
}

HF3FS_API int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    const int fd = open_any(path, flags, rest);
    va_end(rest);
    return fd;
}
