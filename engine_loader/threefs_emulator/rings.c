/* Rings: preparing, submitting and reaping IOs. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "emulator.h"

static bool is_mount(const char *path) {
    char real[PATH_MAX];
    return realpath(path, real) != NULL && strcmp(real, emulator.options.mount) == 0;
}

size_t hf3fs_ior_size(int entries) { return (size_t)entries * 128 + 256; }

int hf3fs_iorcreate4(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth, int timeout,
                     int numa, uint64_t flags) {
    (void)numa;
    if (ior == NULL || mount == NULL || *mount == '\0' || strlen(mount) >= sizeof ior->mount_point) return -EINVAL;
    if (timeout < 0 || entries <= 0 || io_depth > entries) return -EINVAL;
    lock();
    read_control_file();
    if (!is_mount(mount) || emulator.options.ior_error != 0 || emulator.options.dead) {
        const int error = emulator.options.ior_error != 0 ? -(int)emulator.options.ior_error : -ENOENT;
        unlock();
        return error;
    }
    struct ring *ring = calloc(1, sizeof *ring);
    ring->entries = ring->free_slots = entries;
    ring->io_depth = io_depth;
    ring->timeout = timeout;
    ring->for_read = for_read;
    ring->queued_end = &ring->queued;
    ring->slot_taken = calloc((size_t)entries, sizeof *ring->slot_taken);
    ring->cqes = calloc((size_t)entries, sizeof *ring->cqes);
    pthread_cond_init(&ring->completed, NULL); /* CLOCK_REALTIME, as wait_for_ios needs */
    ring->next = emulator.rings;
    emulator.rings = ring;
    emulator.counters.rings++;
    emulator.counters.rings_made++;
    start_workers();
    unlock();
    ior->iorh = ring;
    ior->iov.size = hf3fs_ior_size(entries);
    strcpy(ior->mount_point, mount);
    ior->for_read = for_read;
    ior->io_depth = io_depth;
    ior->timeout = timeout;
    ior->flags = flags;
    return 0;
}

int hf3fs_iorcreate3(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth, int priority,
                     int timeout, int numa) {
    (void)priority;
    return hf3fs_iorcreate4(ior, mount, entries, for_read, io_depth, timeout, numa, 0);
}

int hf3fs_iorcreate2(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth, int priority,
                     int numa) {
    return hf3fs_iorcreate3(ior, mount, entries, for_read, io_depth, priority, 0, numa);
}

int hf3fs_iorcreate(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth, int numa) {
    return hf3fs_iorcreate3(ior, mount, entries, for_read, io_depth, 0, 0, numa);
}

static void drop_queued(struct ring *ring) {
    while (ring->queued != NULL) {
        struct io *io = ring->queued;
        ring->queued = io->next;
        if (io->file != NULL) release_file(io->file);
        if (io->buffer != NULL) release_buffer(io->buffer);
        free(io);
    }
    ring->queued_count = 0;
}

static bool is_here(const struct ring *ring) {
    for (const struct ring *at = emulator.rings; at != NULL; at = at->next) {
        if (at == ring) return true;
    }
    violation("a ring is used after fork() or after it was destroyed");
    return false;
}

void hf3fs_iordestroy(struct hf3fs_ior *ior) {
    if (ior == NULL || ior->iorh == NULL) return;
    lock();
    struct ring *ring = ior->iorh;
    ior->iorh = NULL;
    if (!is_here(ring)) {
        unlock();
        return;
    }
    for (struct ring **at = &emulator.rings; *at != NULL; at = &(*at)->next) {
        if (*at != ring) continue;
        *at = ring->next;
        break;
    }
    emulator.counters.rings--;
    drop_queued(ring);
    ring->destroyed = true;
    forget_hung(ring);
    free_ring_if_idle(ring);
    if (emulator.rings == NULL) forget_wrapped_buffers();
    pthread_cond_broadcast(&emulator.work);
    unlock();
}

int hf3fs_io_entries(const struct hf3fs_ior *ior) { return ((const struct ring *)ior->iorh)->entries; }

static int take_slot(struct ring *ring) {
    const int64_t number = ++emulator.preps;
    const bool early = emulator.options.full_every > 0 && number % emulator.options.full_every == 0;
    if (ring->free_slots == 0 || early) return -EAGAIN;
    int slot = 0;
    while (ring->slot_taken[slot]) slot++;
    ring->slot_taken[slot] = true;
    ring->free_slots--;
    return slot;
}

static struct registered *find_file(int fd) {
    const int positive = fd < 0 ? -fd : fd;
    return emulator.files != NULL && positive < emulator.max_files ? emulator.files[positive] : NULL;
}

static int prepare(struct ring *ring, const struct hf3fs_iov *iov, size_t at, int fd, size_t offset, uint64_t length,
                   const void *userdata) {
    struct registered *file = find_file(fd);
    if (file == NULL) return -EBADF;
    const int slot = take_slot(ring);
    if (slot < 0) return slot;
    struct buffer *buffer = find_buffer(iov);
    struct io *io = calloc(1, sizeof *io);
    *io = (struct io){.ring = ring, .file = file, .buffer = buffer, .buffer_offset = at, .client = iov->base + at, .offset = offset,
                      .length = length, .slot = slot, .userdata = userdata};
    file->references++;
    if (buffer == NULL) {
        io->result = -EINVAL; /* no link by which the daemon would find the buffer */
    } else {
        buffer->references++;
        if (buffer->refused) io->result = -EACCES;
        if (at / buffer->block_size != (at + length - 1) / buffer->block_size || at + length > buffer->size) {
            io->result = -EINVAL;
        }
    }
    *ring->queued_end = io;
    ring->queued_end = &io->next;
    ring->queued_count++;
    const int64_t eager = emulator.options.eager_every;
    if (eager > 0 && emulator.preps % eager == 0) start_batches(ring);
    return slot;
}

int hf3fs_prep_io(const struct hf3fs_ior *ior, const struct hf3fs_iov *iov, bool read, void *ptr, int fd, size_t offset,
                  uint64_t length, const void *userdata) {
    if (ior == NULL || ior->iorh == NULL || read != ior->for_read || iov == NULL || ptr == NULL || iov->base == NULL) {
        return -EINVAL;
    }
    const uintptr_t base = (uintptr_t)iov->base, address = (uintptr_t)ptr;
    if (length == 0 || address < base || address - base > iov->size || length > iov->size - (address - base)) return -EINVAL;
    if (!read) return -EOPNOTSUPP; /* the emulator only reads */
    struct ring *ring = ior->iorh;
    lock();
    int result = -EINVAL;
    if (is_here(ring)) {
        if (atomic_exchange(&ring->preparing, 1) != 0) violation("two threads prepare IOs on one ring");
        unlock();
        lock(); /* time in which a concurrent call by another thread, which is not allowed, is detected */
        result = prepare(ring, iov, address - base, fd, offset, length, userdata);
        atomic_store(&ring->preparing, 0);
    }
    unlock();
    return result;
}

int hf3fs_submit_ios(const struct hf3fs_ior *ior) {
    if (ior == NULL || ior->iorh == NULL) return -EINVAL;
    lock();
    read_control_file();
    if (is_here(ior->iorh)) start_batches(ior->iorh);
    unlock();
    return 0;
}

static int reap(struct ring *ring, struct hf3fs_cqe *cqes, int capacity) {
    const int count = ring->cqe_count < capacity ? ring->cqe_count : capacity;
    memcpy(cqes, ring->cqes, (size_t)count * sizeof *cqes);
    memmove(ring->cqes, ring->cqes + count, (size_t)(ring->cqe_count - count) * sizeof *cqes);
    ring->cqe_count -= count;
    for (int i = 0; i < count; i++) {
        ring->slot_taken[cqes[i].index] = false;
        ring->free_slots++;
    }
    return count;
}

static int wait(struct ring *ring, struct hf3fs_cqe *cqes, int capacity, int wanted, const struct timespec *until) {
    int filled = 0;
    for (;;) {
        filled += reap(ring, cqes + filled, capacity - filled);
        start_batches(ring);
        if (filled >= wanted) return filled;
        if (until == NULL) {
            pthread_cond_wait(&ring->completed, &emulator.lock);
        } else if (pthread_cond_timedwait(&ring->completed, &emulator.lock, until) != 0) {
            return filled + reap(ring, cqes + filled, capacity - filled);
        }
    }
}

int hf3fs_wait_for_ios(const struct hf3fs_ior *ior, struct hf3fs_cqe *cqes, int cqec, int min_results,
                       const struct timespec *abs_timeout) {
    if (cqec <= 0 || cqes == NULL || ior == NULL || ior->iorh == NULL) return -EINVAL;
    struct ring *ring = ior->iorh;
    int result = -EINVAL;
    lock();
    if (is_here(ring)) {
        if (atomic_exchange(&ring->reaping, 1) != 0) violation("two threads wait on one ring");
        result = wait(ring, cqes, cqec, min_results < cqec ? min_results : cqec, abs_timeout);
        atomic_store(&ring->reaping, 0);
    }
    unlock();
    return result;
}
