/* A preloadable pread and preadv that fail, or answer late, on demand, and a madvise that makes pages as late as asked.
 *
 * ENGINE_LOADER_FAULTS names a file that holds `struct faults`, mapped shared, so that a test can change it while the
 * program runs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
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
    uint32_t delay_us;    /* each call takes so much longer, as from storage at a distance: many at once take no more */
    uint32_t one_by_one;  /* unless this is set: then only one call at a time sleeps, as at a disk that is busy */
    uint32_t huge_us;     /* MADV_POPULATE_WRITE makes no pages, but takes this much CPU time after MADV_HUGEPAGE ... */
    uint32_t small_us;    /* ... and this much after MADV_NOHUGEPAGE; both 0: the kernel's is called */
    uint32_t calls;       /* counts */
    uint32_t stalled;     /* calls that sleep just now */
    uint32_t flying;      /* calls just now */
    uint32_t most_flying; /* the most at once so far */
    uint32_t huge_made;   /* calls of MADV_POPULATE_WRITE after MADV_HUGEPAGE ... */
    uint32_t small_made;  /* ... and after MADV_NOHUGEPAGE */
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

static void sleep_us(uint32_t us) {
    const struct timespec time = {us / 1000000, (us % 1000000) * 1000L};
    nanosleep(&time, NULL);
}

static uint64_t worked_us(void) {
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return (uint64_t)time.tv_sec * 1000000 + (uint64_t)time.tv_nsec / 1000;
}

static void work_us(uint32_t us) {
    for (uint64_t begin = worked_us(); worked_us() - begin < us;);
}

static void note_most(uint32_t now) {
    uint32_t most = get(&faults->most_flying);
    while (now > most) {
        if (__atomic_compare_exchange_n(&faults->most_flying, &most, now, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
    }
}

static void delay(void) {
    static pthread_mutex_t disk = PTHREAD_MUTEX_INITIALIZER;
    const uint32_t us = get(&faults->delay_us);
    if (us == 0) return;
    note_most(__atomic_add_fetch(&faults->flying, 1, __ATOMIC_RELAXED));
    const int alone = get(&faults->one_by_one) != 0;
    if (alone) pthread_mutex_lock(&disk);
    sleep_us(us);
    if (alone) pthread_mutex_unlock(&disk);
    __atomic_sub_fetch(&faults->flying, 1, __ATOMIC_RELAXED);
}

int madvise(void *address, size_t bytes, int advice) {
    static int last;
    if (advice == MADV_HUGEPAGE || advice == MADV_NOHUGEPAGE) __atomic_store_n(&last, advice, __ATOMIC_RELAXED);
    const uint32_t huge_us = faults == NULL ? 0 : get(&faults->huge_us), small_us = faults == NULL ? 0 : get(&faults->small_us);
    if (advice != 23 /* MADV_POPULATE_WRITE */ || (huge_us == 0 && small_us == 0)) {
        return (int)syscall(SYS_madvise, address, bytes, (long)advice);
    }
    const int huge = __atomic_load_n(&last, __ATOMIC_RELAXED) == MADV_HUGEPAGE;
    __atomic_add_fetch(huge ? &faults->huge_made : &faults->small_made, 1, __ATOMIC_RELAXED);
    work_us(huge ? huge_us : small_us);
    return 0;
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
    delay();
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
