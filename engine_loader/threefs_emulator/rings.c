/* Rings: preparing, submitting and reaping IOs. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "emulator.h"

static bool is_mount(const char *path) {
    char real[PATH_MAX];
    return realpath(path, real) != NULL && strcmp(real, emulator.options.mount) == 0;
}

size_t hf3fs_ior_size(int entries) { return 4 * sizeof(int32_t) + 32 + 96 * ((size_t)entries + 1) + 4096; }

/* The link by which the daemon knows a ring. The real library makes it with the flags in base 2 and removes one with
 * the flags in base 10: with flags of 2 or more, the link stays. */
static void ring_link(char *path, const struct hf3fs_ior *ior, bool as_removed) {
    char text[40], flags[72] = "";
    uuid_text(ior->iov.id, text);
    if (ior->flags != 0 && as_removed) snprintf(flags, sizeof flags, ".f%llu", (unsigned long long)ior->flags);
    if (ior->flags != 0 && !as_removed) {
        char *at = flags + sprintf(flags, ".f");
        for (int bit = 63 - __builtin_clzll(ior->flags); bit >= 0; bit--) *at++ = (ior->flags >> bit & 1) != 0 ? '1' : '0';
        *at = '\0';
    }
    const char *priority = ior->priority == 0 ? "" : ior->priority < 0 ? ".ph" : ".pl";
    snprintf(path, PATH_MAX, "%s/3fs-virt/iovs/%s.%c%d%s.t%d%s", ior->mount_point, text, ior->for_read ? 'r' : 'w',
             ior->io_depth, priority, ior->timeout, flags);
}

/* Shared memory with a link to it, whose name the client can remove at once. */
static int register_ring(struct hf3fs_ior *ior) {
    char text[40], name[64], target[96], link[PATH_MAX];
    uint8_t of_memory[16];
    if (getrandom(ior->iov.id, sizeof ior->iov.id, 0) != sizeof ior->iov.id) return -EIO;
    if (getrandom(of_memory, sizeof of_memory, 0) != sizeof of_memory) return -EIO;
    uuid_text(of_memory, text);
    snprintf(name, sizeof name, "/hf3fs-iov-%s", text);
    note_memory(name);
    const int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0666);
    if (fd < 0) return -EIO;
    int error = ftruncate(fd, (off_t)ior->iov.size) == 0 ? 0 : -EIO;
    void *memory = mmap(NULL, ior->iov.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory == MAP_FAILED) error = -EIO;
    ring_link(link, ior, false);
    snprintf(target, sizeof target, "/dev/shm%s", name);
    hold_mount(ior->mount_point);
    if (error == 0 && mounted_symlink(target, link) != 0) error = -errno;
    unlink_memory(name);
    if (error != 0 && memory != MAP_FAILED) munmap(memory, ior->iov.size);
    if (error == 0) ior->iov.base = memory;
    return error;
}

static int create(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth, int priority,
                  int timeout, uint64_t flags) {
    if (ior == NULL || mount == NULL || *mount == '\0' || strlen(mount) >= sizeof ior->mount_point) return -EINVAL;
    if (timeout < 0 || entries <= 0 || io_depth > entries) return -EINVAL;
    lock();
    read_control_file();
    if (!is_mount(mount) || emulator.options.ior_error != 0 || emulator.options.dead) {
        const int error = emulator.options.ior_error != 0 ? -(int)emulator.options.ior_error : -ENOENT;
        unlock();
        return error;
    }
    const bool refused = io_depth < 0 && emulator.options.no_negative_depth;
    const int semaphore_error = (int)emulator.options.semaphore_error;
    unlock();
    if (refused) return -EINVAL; /* of the symlink */
    *ior = (struct hf3fs_ior){.for_read = for_read, .io_depth = io_depth, .priority = priority, .timeout = timeout};
    ior->flags = flags;
    strcpy(ior->mount_point, mount);
    strcpy(ior->iov.mount_point, mount);
    ior->iov.size = hf3fs_ior_size(entries);
    const int error = register_ring(ior);
    if (error != 0) return error;
    if (semaphore_error != 0) {
        munmap(ior->iov.base, ior->iov.size);
        return -semaphore_error;
    }
    struct ring *ring = calloc(1, sizeof *ring);
    ring_link(ring->link, ior, false);
    ring->flags = flags;
    ring->place_done = calloc((size_t)entries + 1, sizeof *ring->place_done);
    ring->entries = ring->free_slots = entries;
    ring->io_depth = io_depth;
    ring->timeout = timeout;
    ring->for_read = for_read;
    ring->queued_end = &ring->queued;
    ring->slot_taken = calloc((size_t)entries, sizeof *ring->slot_taken);
    ring->cqes = calloc((size_t)entries, sizeof *ring->cqes);
    pthread_cond_init(&ring->completed, NULL); /* CLOCK_REALTIME, as wait_for_ios needs */
    lock();
    ring->next = emulator.rings;
    emulator.rings = ring;
    emulator.counters.rings++;
    emulator.counters.rings_made++;
    start_workers();
    unlock();
    ior->iorh = ring;
    return 0;
}

int hf3fs_iorcreate4(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth, int timeout,
                     int numa, uint64_t flags) {
    (void)numa;
    return create(ior, mount, entries, for_read, io_depth, 0, timeout, flags);
}

int hf3fs_iorcreate3(struct hf3fs_ior *ior, const char *mount, int entries, bool for_read, int io_depth, int priority,
                     int timeout, int numa) {
    (void)numa;
    return create(ior, mount, entries, for_read, io_depth, priority, timeout, 0);
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
    const bool here = is_here(ring);
    unlock();
    if (!here) return;
    char link[PATH_MAX];
    ring_link(link, ior, true);
    mounted_unlink(link);
    munmap(ior->iov.base, ior->iov.size);
    lock();
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
    const bool queue_full = (ring->head + 1) % (ring->entries + 1) == ring->tail;
    if (ring->free_slots == 0 || queue_full || early) return -EAGAIN;
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
    io->position = ring->head;
    ring->head = (ring->head + 1) % (ring->entries + 1);
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
    struct ring *ring = ior->iorh;
    if (is_here(ring)) {
        struct stat status;
        ring->unregistered = lstat(ring->link, &status) != 0; /* the daemon looks at the rings that it knows */
        start_batches(ring);
    }
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
