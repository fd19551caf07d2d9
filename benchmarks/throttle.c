/* Preloaded: reads by pread, preadv and preadv2 (Python's os.preadv), of whatever file, go over one link that all
 * processes share.
 *
 * THROTTLE_FILE: a file of 16 bytes, zeros, that they share; THROTTLE_BYTES_PER_S: the link's bandwidth. Reads of up to
 * 64 KiB pass freely: headers, and what Python itself reads. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static struct { _Atomic int64_t free_at, bytes; } *link_;
static double bytes_per_s;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("THROTTLE_FILE"), *rate = getenv("THROTTLE_BYTES_PER_S");
    if (path == NULL || rate == NULL) return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    void *memory = fd < 0 ? MAP_FAILED : mmap(NULL, 16, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0) close(fd);
    if (memory == MAP_FAILED) abort();
    bytes_per_s = atof(rate);
    link_ = memory;
}

static void pass(ssize_t bytes) {
    if (link_ == NULL || bytes <= 65536) return;
    const int saved = errno;
    atomic_fetch_add(&link_->bytes, bytes);
    int64_t seen = atomic_load(&link_->free_at), until;
    do {
        const int64_t at = now();
        until = (seen > at ? seen : at) + (int64_t)((double)bytes / bytes_per_s * 1e9);
    } while (!atomic_compare_exchange_weak(&link_->free_at, &seen, until));
    struct timespec when = {until / 1000000000, until % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR) continue;
    errno = saved;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t preadv(int fd, const struct iovec *vectors, int n, off_t offset) {
    const ssize_t got = REAL(preadv)(fd, vectors, n, offset);
    pass(got);
    return got;
}

ssize_t preadv64(int fd, const struct iovec *vectors, int n, off64_t offset) {
    const ssize_t got = REAL(preadv64)(fd, vectors, n, offset);
    pass(got);
    return got;
}

ssize_t pread(int fd, void *memory, size_t bytes, off_t offset) {
    const ssize_t got = REAL(pread)(fd, memory, bytes, offset);
    pass(got);
    return got;
}

ssize_t pread64(int fd, void *memory, size_t bytes, off64_t offset) {
    const ssize_t got = REAL(pread64)(fd, memory, bytes, offset);
    pass(got);
    return got;
}

ssize_t preadv2(int fd, const struct iovec *vectors, int n, off_t offset, int flags) {
    const ssize_t got = REAL(preadv2)(fd, vectors, n, offset, flags);
    pass(got);
    return got;
}

ssize_t preadv64v2(int fd, const struct iovec *vectors, int n, off64_t offset, int flags) {
    const ssize_t got = REAL(preadv64v2)(fd, vectors, n, offset, flags);
    pass(got);
    return got;
}
