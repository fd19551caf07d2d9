/* The daemon: threads that carry IOs out, the bandwidth that they share, simulated faults, and completions by batch. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "emulator.h"

enum { SHUFFLED = 4 }; /* the next IO is a random one of this many */

static bool every(int64_t number, int64_t n) { return n > 0 && number % n == 0; }

static bool is_dead(void) {
    const struct options *options = &emulator.options;
    return options->dead || (options->die_after > 0 && emulator.counters.ios >= options->die_after);
}

void push_due(struct io *io) {
    struct emulator *e = &emulator;
    if (e->due_count == e->due_capacity) {
        e->due_capacity = e->due_capacity ? 2 * e->due_capacity : 64;
        e->due = realloc(e->due, (size_t)e->due_capacity * sizeof *e->due);
    }
    int at = e->due_count++;
    while (at > 0 && e->due[(at - 1) / 2]->due_ns > io->due_ns) {
        e->due[at] = e->due[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    e->due[at] = io;
}

static struct io *pop_due(void) {
    struct emulator *e = &emulator;
    struct io *top = e->due[0], *last = e->due[--e->due_count];
    int at = 0;
    for (int child; (child = 2 * at + 1) < e->due_count; at = child) {
        if (child + 1 < e->due_count && e->due[child + 1]->due_ns < e->due[child]->due_ns) child++;
        if (e->due[child]->due_ns >= last->due_ns) break;
        e->due[at] = e->due[child];
    }
    e->due[at] = last;
    return top;
}

static void push_ready(struct io *io) {
    io->next = NULL;
    *emulator.ready_end = io;
    emulator.ready_end = &io->next;
}

static struct io *pop_ready(void) {
    struct io **at = &emulator.ready;
    for (uint64_t skip = random_below(SHUFFLED); skip > 0 && (*at)->next != NULL; skip--) at = &(*at)->next;
    struct io *io = *at;
    *at = io->next;
    if (emulator.ready_end == &io->next) emulator.ready_end = at;
    return io;
}

static void free_batch(struct batch *batch) {
    for (struct io *io = batch->ios, *next; io != NULL; io = next) {
        next = io->batch_next;
        free(io);
    }
    free(batch);
}

void free_ring_if_idle(struct ring *ring) {
    if (!ring->destroyed || ring->busy > 0) return;
    pthread_cond_destroy(&ring->completed);
    free(ring->slot_taken);
    free(ring->place_done);
    free(ring->cqes);
    free(ring);
}

/* Places of the queue are freed in order: behind a slow IO, those of completed ones stay taken. */
static void free_places(struct ring *ring, const struct batch *batch) {
    for (const struct io *io = batch->ios; io != NULL; io = io->batch_next) ring->place_done[io->position] = true;
    while (ring->tail != ring->head && ring->place_done[ring->tail]) {
        ring->place_done[ring->tail] = false;
        ring->tail = (ring->tail + 1) % (ring->entries + 1);
    }
}

static void complete_batch(struct batch *batch) {
    struct ring *ring = batch->ios->ring;
    const int begin = ring->cqe_count;
    free_places(ring, batch);
    emulator.counters.running_batches--;
    for (struct io *io = batch->ios; io != NULL; io = io->batch_next) {
        const int at = ring->cqe_count++;
        const int other = begin + (int)random_below((uint64_t)(at - begin + 1));
        ring->cqes[at] = ring->cqes[other];
        ring->cqes[other] = (struct hf3fs_cqe){io->slot, 0, io->result, io->userdata};
    }
    ring->busy -= batch->count;
    free_batch(batch);
    pthread_cond_broadcast(&ring->completed);
    free_ring_if_idle(ring);
    start_what_may();
}

static void complete_request(struct io *request) {
    struct batch *batch = request->batch;
    request_done(request);
    free(request);
    send_requests();
    if (--batch->missing == 0) complete_batch(batch);
}

static void complete(struct io *io) {
    if (io->is_request) {
        complete_request(io);
        return;
    }
    emulator.counters.in_flight--;
    if (io->file != NULL) release_file(io->file);
    if (io->buffer != NULL) release_buffer(io->buffer);
    io->file = NULL;
    io->buffer = NULL;
    if (--io->batch->missing == 0) complete_batch(io->batch);
}

void forget_hung(struct ring *ring) {
    ring->busy++; /* the last IO of a ring must not free the ring here */
    for (struct io **at = &emulator.hung; *at != NULL;) {
        struct io *io = *at;
        if (io->ring != ring) {
            at = &io->next;
            continue;
        }
        *at = io->next;
        complete(io);
    }
    ring->busy--;
}

/* Where the file has no data; a hole that an IO reads beyond is found, one that it ends in is a short read. */
struct hole {
    uint64_t begin, end; /* in the file */
    bool inside;
};

static struct hole hole_of(const struct io *io) {
    const uint64_t begin = (uint64_t)emulator.options.hole_at, end = begin + (uint64_t)emulator.options.hole_bytes;
    struct stat status;
    if (begin == end || fstat(io->file->dup_fd, &status) != 0) return (struct hole){0};
    const uint64_t size = (uint64_t)status.st_size, io_end = io->offset + io->length;
    const bool touched = io->offset < end && io_end > begin;
    return touched ? (struct hole){begin, end, io_end > end && size > end} : (struct hole){0};
}

static uint64_t wanted_length(const struct io *io, const struct hole *hole) {
    const struct options *options = &emulator.options;
    uint64_t length = io->length;
    if (hole->end > hole->begin && !hole->inside) length = io->offset >= hole->begin ? 0 : hole->begin - io->offset;
    if (every(io->number, options->zero_every)) length = 0;
    if (every(io->number, options->short_every)) length = random_below(length);
    return length;
}

/* Map pages of the file into the client's buffer; returns the number of bytes for which that was possible. */
static uint64_t map_pages(const struct io *io, uint64_t length) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t whole = length / page * page;
    if (whole == 0 || io->offset % page != 0 || (uintptr_t)io->client % page != 0) return 0;
    const int flags = MAP_PRIVATE | MAP_FIXED | MAP_POPULATE;
    void *mapped = mmap(io->client, whole, PROT_READ, flags, io->file->dup_fd, (off_t)io->offset);
    return mapped == MAP_FAILED ? 0 : whole;
}

/* Without CPU time, as from a NIC, except for parts of pages at the edges. */
static int64_t read_by_dma(const struct io *io, uint64_t length) {
    struct stat status;
    if (fstat(io->file->dup_fd, &status) != 0) return -errno;
    const uint64_t size = (uint64_t)status.st_size;
    if (io->offset >= size) return 0;
    if (length > size - io->offset) length = size - io->offset;
    uint64_t done = map_pages(io, length);
    if (done < length) { /* mapped pages of the file must not be written to */
        const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)(io->client + done) / page * page;
        const uint64_t last = ((uintptr_t)io->client + length + page - 1) / page * page;
        const int flags = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS;
        if (mmap((void *)first, last - first, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return -ENOMEM;
    }
    while (done < length) {
        const ssize_t n = pread(io->file->dup_fd, io->client + done, length - done, (off_t)(io->offset + done));
        if (n <= 0) return n < 0 ? -errno : (int64_t)done;
        done += (uint64_t)n;
    }
    return (int64_t)done;
}

/* Read into the daemon's mapping, without the lock. */
static int64_t read_file(const struct io *io, uint64_t length) {
    if (emulator.options.dma) return read_by_dma(io, length);
    uint64_t done = 0;
    while (done < length) {
        uint8_t *to = io->buffer->memory + io->buffer_offset + done;
        const ssize_t n = pread(io->file->dup_fd, to, length - done, (off_t)(io->offset + done));
        if (n < 0) return errno == EFAULT ? -EACCES : -errno;
        if (n == 0) break;
        done += (uint64_t)n;
    }
    return (int64_t)done;
}

static void pad(const struct io *io, const struct hole *hole, int64_t result) {
    const uint64_t begin = hole->begin > io->offset ? hole->begin - io->offset : 0;
    const uint64_t end = hole->end - io->offset;
    const uint64_t limit = result > 0 && end > (uint64_t)result ? (uint64_t)result : end;
    if (result > 0 && begin < limit) memset(io->buffer->memory + io->buffer_offset + begin, 0, limit - begin);
}

static void carry_out(struct io *io) {
    const struct options *options = &emulator.options;
    io->carried_out = true;
    if (io->result < 0) return; /* refused when it was prepared */
    if (every(io->number, options->error_every)) {
        io->result = -options->error;
        emulator.counters.errors++;
        return;
    }
    const struct hole hole = hole_of(io);
    if (hole.inside && (io->ring->flags & HF3FS_IOR_FORBID_READ_HOLES) != 0) {
        io->result = -ENODATA;
        return;
    }
    const uint64_t length = wanted_length(io, &hole);
    unlock();
    const int64_t result = read_file(io, length);
    if (hole.inside) pad(io, &hole, result);
    lock();
    io->result = result;
    if (result > 0) {
        emulator.counters.bytes += result;
        if (emulator.shared_bytes != NULL) *emulator.shared_bytes += result;
    }
}

/* The link carries one after the other: from when it is free, and not before `from`. */
static int64_t take_link(_Atomic int64_t *free_ns, int64_t from, int64_t duration) {
    int64_t seen = atomic_load(free_ns), until;
    do {
        until = (seen > from ? seen : from) + duration;
    } while (!atomic_compare_exchange_weak(free_ns, &seen, until));
    return until;
}

int64_t arrival(const struct io *io, int64_t now) {
    const struct options *options = &emulator.options;
    int64_t due = now + options->latency_us * 1000;
    if (options->bandwidth > 0) {
        const bool shared = options->shared_link && emulator.shared_link_free_ns != NULL;
        due = take_link(shared ? emulator.shared_link_free_ns : &emulator.link_free_ns, due,
                        (int64_t)((double)io->length * 1e9 / (double)options->bandwidth));
    }
    return due + (int64_t)random_below((uint64_t)options->jitter_us * 1000 + 1);
}

static void start_io(struct io *io, int64_t now) {
    const struct options *options = &emulator.options;
    emulator.counters.in_flight++;
    io->number = ++emulator.counters.ios;
    if (emulator.counters.in_flight > emulator.counters.max_in_flight) {
        emulator.counters.max_in_flight = emulator.counters.in_flight;
    }
    if (is_dead() || every(io->number, options->hang_every)) {
        io->next = emulator.hung;
        emulator.hung = io;
        return;
    }
    io->due_ns = requests_are_limited() ? now : arrival(io, now);
    io->late = every(io->number, options->late_every);
    if (io->late) {
        io->due_ns = now + options->late_ms * 1000000;
        push_due(io);
    } else {
        push_ready(io);
    }
}

static bool overlap(const struct io *a, const struct io *b) {
    if (a->buffer == NULL || a->buffer != b->buffer) return false;
    return a->buffer_offset < b->buffer_offset + b->length && b->buffer_offset < a->buffer_offset + a->length;
}

static void start_batch(struct ring *ring, int count) {
    struct batch *batch = calloc(1, sizeof *batch);
    const int64_t now = now_ns();
    batch->missing = batch->count = count;
    for (int i = 0; i < count; i++) {
        struct io *io = ring->queued;
        ring->queued = io->next;
        for (const struct io *other = batch->ios; other != NULL; other = other->batch_next) {
            if (overlap(io, other)) violation("two IOs of one batch write to the same memory");
        }
        io->batch = batch;
        io->batch_next = batch->ios;
        batch->ios = io;
    }
    if (ring->queued == NULL) ring->queued_end = &ring->queued;
    ring->queued_count -= count;
    ring->busy += count;
    emulator.counters.batches++;
    if (++emulator.counters.running_batches > emulator.counters.max_batches) {
        emulator.counters.max_batches = emulator.counters.running_batches;
    }
    if (requests_are_limited()) queue_requests(batch);
    for (struct io *io = batch->ios; io != NULL; io = io->batch_next) start_io(io, now);
    send_requests();
    pthread_cond_broadcast(&emulator.work);
}

void start_batches(struct ring *ring) {
    const int depth = ring->io_depth < 0 ? -ring->io_depth : ring->io_depth;
    while (ring->queued_count > 0 && !ring->destroyed && !ring->unregistered && may_start_batch()) {
        const bool whole_only = ring->io_depth > 0 || (ring->io_depth < 0 && ring->timeout > 0);
        if (whole_only && ring->queued_count < depth) return;
        start_batch(ring, depth == 0 || ring->queued_count < depth ? ring->queued_count : depth);
    }
}

static bool work_left(void) { return emulator.ready != NULL || emulator.due_count > 0; }

static void wait_for_work(void) {
    if (emulator.due_count == 0) {
        pthread_cond_wait(&emulator.work, &emulator.lock);
        return;
    }
    const int64_t due = emulator.due[0]->due_ns;
    const struct timespec until = {(time_t)(due / 1000000000), (long)(due % 1000000000)};
    pthread_cond_timedwait(&emulator.work, &emulator.lock, &until);
}

static void *run(void *unused) {
    (void)unused;
    prctl(PR_SET_TIMERSLACK, 1000);
    prctl(PR_SET_NAME, "3fs-emulator");
    lock();
    while (emulator.rings != NULL || work_left()) {
        const bool due = emulator.due_count > 0 && emulator.due[0]->due_ns <= now_ns();
        if (!due && emulator.ready == NULL) {
            wait_for_work();
            continue;
        }
        struct io *io = due ? pop_due() : pop_ready();
        if (!io->carried_out) carry_out(io);
        if (io->due_ns > now_ns()) {
            push_due(io);
            pthread_cond_signal(&emulator.work);
        } else {
            complete(io);
        }
    }
    emulator.counters.threads--;
    pthread_cond_broadcast(&emulator.work);
    unlock();
    return NULL;
}

void start_workers(void) {
    while (emulator.counters.threads < emulator.options.threads) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, run, NULL) != 0) return;
        pthread_detach(thread);
        emulator.counters.threads++;
    }
}
