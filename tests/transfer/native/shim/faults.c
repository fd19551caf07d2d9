/* A preloadable pread and preadv that fail on demand.
 *
 * ENGINE_LOADER_FAULTS names a file that holds `struct faults`, mapped shared, so that a test can change it while the
 * program runs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct faults {
    uint32_t error_every; /* every n-th call fails (0: none) ... */
    uint32_t error;       /* ... with this errno */
    uint32_t short_every; /* every n-th call returns less than asked */
    uint32_t stall_every; /* every n-th call first sleeps ... */
    uint32_t stall_ms;    /* ... this long, or until this becomes 0 */
    uint32_t direct_error; /* calls on O_DIRECT descriptors fail with this errno (0: they do not) */
    uint32_t calls;       /* counts */
    uint32_t stalled;     /* calls that sleep just now */
};

static struct faults *faults;

__attribute__((constructor)) static void open_faults(void) {
    const char *path = getenv("ENGINE_LOADER_FAULTS");
    int fd = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *memory = mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory != MAP_FAILED) faults = memory;
}

static uint32_t get(uint32_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }

static int due(uint32_t *every, uint32_t call) {
    uint32_t n = get(every);
    return n != 0 && call % n == 0;
}

static void stall(void) {
    const struct timespec tick = {0, 1000000};
    __atomic_add_fetch(&faults->stalled, 1, __ATOMIC_RELAXED);
    for (uint32_t ms = 0; ms < get(&faults->stall_ms); ms++) nanosleep(&tick, NULL);
    __atomic_sub_fetch(&faults->stalled, 1, __ATOMIC_RELAXED);
}

/* The vectors cut to `bytes`. */
static int cut(const struct iovec *from, int n, struct iovec *to, size_t bytes) {
    int used = 0;
    for (; used < n && bytes > 0; used++) {
        to[used] = from[used];
        if (to[used].iov_len > bytes) to[used].iov_len = bytes;
        bytes -= to[used].iov_len;
    }
    return used;
}

static size_t total(const struct iovec *vectors, int n) {
    size_t bytes = 0;
    for (int i = 0; i < n; i++) bytes += vectors[i].iov_len;
    return bytes;
}

static ssize_t read_really(int fd, const struct iovec *vectors, int n, off_t offset) {
    return syscall(SYS_preadv, fd, vectors, (long)n, (long)offset, 0L);
}

ssize_t preadv(int fd, const struct iovec *vectors, int n, off_t offset) {
    if (faults == NULL) return read_really(fd, vectors, n, offset);
    uint32_t call = __atomic_add_fetch(&faults->calls, 1, __ATOMIC_RELAXED);
    if (due(&faults->stall_every, call)) stall();
    if (due(&faults->error_every, call)) {
        errno = (int)get(&faults->error);
        return -1;
    }
    if (get(&faults->direct_error) != 0 && (fcntl(fd, F_GETFL) & O_DIRECT) != 0) {
        errno = (int)get(&faults->direct_error);
        return -1;
    }
    size_t bytes = total(vectors, n);
    if (bytes < 2 || !due(&faults->short_every, call)) return read_really(fd, vectors, n, offset);
    struct iovec some[1024];
    int direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
    size_t fewer = 1 + (call * 2654435761u) % (bytes - 1);
    /* A file system returns whole sectors to direct reads, mostly; an odd number of bytes now and then. */
    if (direct && fewer >= 4096 && call % 3 != 0) fewer -= fewer % 4096;
    if (!direct) return read_really(fd, some, cut(vectors, n, some, fewer), offset);
    ssize_t got = read_really(fd, vectors, n, offset);
    return got > (ssize_t)fewer ? (ssize_t)fewer : got;
}

ssize_t preadv64(int fd, const struct iovec *vectors, int n, off_t offset) { return preadv(fd, vectors, n, offset); }

ssize_t pread(int fd, void *buffer, size_t bytes, off_t offset) {
    struct iovec vector = {buffer, bytes};
    return preadv(fd, &vector, 1, offset);
}

ssize_t pread64(int fd, void *buffer, size_t bytes, off_t offset) { return pread(fd, buffer, bytes, offset); }
