/* Types and functions of all files of the emulator. One mutex guards the whole state. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "hf3fs_abi.h"

/* Options: numbers, except for the mount. `*_every` = n selects every n-th IO, prep or buffer; 0: none. */
struct options {
    int64_t latency_us;   /* of each IO */
    int64_t jitter_us;    /* at most this is added to the latency of an IO */
    int64_t bandwidth;    /* bytes per second of the link that all IOs of the process share; 0: no limit */
    int64_t threads;      /* of the daemon */
    int64_t eager_every;  /* preps that start IOs before they are submitted */
    int64_t error;        /* errno of failing IOs */
    int64_t error_every;
    int64_t short_every;  /* IOs that come back short */
    int64_t zero_every;   /* IOs that come back empty before the end of the file */
    int64_t hole_at;      /* a hole in every file: reads end there; one that goes on behind it gets zeros, or ENODATA */
    int64_t hole_bytes;
    int64_t hang_every;   /* IOs that never complete */
    int64_t late_every;   /* IOs that are carried out late_ms later */
    int64_t late_ms;
    int64_t full_every;   /* preps that find the ring full before it is */
    int64_t buffer_every; /* buffers that cannot be registered: EACCES for every IO into them */
    int64_t dead;         /* the daemon has ended: no IO completes any more */
    int64_t die_after;    /* the daemon ends after this many IOs */
    int64_t iov_error;    /* errno of iovcreate */
    int64_t ior_error;    /* errno of iorcreate */
    int64_t semaphore_error; /* errno of iorcreate after it made the ring's link, which then stays */
    int64_t no_negative_depth; /* a daemon that refuses rings of negative io_depth, as those of 2026 do */
    int64_t mount_hang;   /* symlink, unlink, readlink and open below 3fs-virt/iovs do not return */
    int64_t ioctl_hang;   /* nor does the question whether a descriptor is on 3FS */
    int64_t other_pid_namespace; /* the daemon sees every client as process 0 */
    int64_t register_error;
    int64_t batches;      /* that the daemon carries out at once; 0: no limit (limits=1 sets it and the next five) */
    int64_t requests;     /* to storage servers at once, each with the latency; 0: IOs are not cut into requests */
    int64_t server_requests; /* to one server at once */
    int64_t request_bytes; /* of a request */
    int64_t chunk_bytes;  /* of every file; a request has whole pieces of chunks */
    int64_t servers;
    int64_t shared_link;  /* the bandwidth is that of all processes with this mount */
    int64_t seed;
    int64_t dma;          /* bytes arrive without CPU time, as from a NIC: pages are mapped where that is possible */
    char mount[PATH_MAX]; /* the directory that is treated as the mount of 3FS */
};

struct counters {
    int64_t rings, iovs, registrations, threads, in_flight; /* at this moment */
    int64_t ios, bytes, rings_made, iovs_made, batches, errors, violations;
    int64_t running_batches, requests, blocked; /* blocked: calls that wait for a daemon that hangs */
    int64_t max_in_flight, max_batches, max_requests; /* since the last reset */
};

/* The daemon's mapping of a buffer, separate so that a late read is harmless after the client unmapped the buffer. */
struct buffer {
    struct buffer *next;
    uint8_t id[16];
    uint8_t *memory;
    size_t size, block_size;
    int references;
    bool wrapped, refused;
    char shm_name[64];
    char link[PATH_MAX];
};

/* A registered descriptor; read through a duplicate, as 3FS reads by inode. */
struct registered {
    int fd, dup_fd, references, access;
    uint64_t inode;
};

struct batch {
    int missing, count;
    struct io *ios;
};

struct io {
    struct io *next; /* in a queue */
    struct io *batch_next;
    struct ring *ring;
    struct batch *batch;
    struct registered *file;
    struct buffer *buffer;
    size_t buffer_offset, offset;
    uint8_t *client; /* the address in the client's mapping */
    uint64_t length;
    const void *userdata;
    int slot, position; /* in the ring's slots, and in its queue of submissions */
    int server;         /* of a request */
    int64_t result, due_ns;
    bool carried_out, late, is_request;
    int64_t number;
};

struct ring {
    struct ring *next;
    pthread_cond_t completed;
    int entries, io_depth, timeout, free_slots;
    uint64_t flags;
    bool for_read, destroyed, unregistered;
    bool *slot_taken;
    /* The queue of submissions has one place more than entries; places are freed in order. */
    bool *place_done;
    int head, tail;
    char link[PATH_MAX];
    struct io *queued, **queued_end;
    int queued_count;
    struct hf3fs_cqe *cqes;
    int cqe_count;
    int busy; /* IOs that the daemon holds */
    atomic_int preparing, reaping;
};

struct emulator {
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct options options;
    struct counters counters;
    struct ring *rings;
    struct buffer *buffers;
    struct registered **files;
    int max_files;
    struct io *ready, **ready_end; /* IOs for the daemon's threads */
    struct io *hung;               /* IOs that never complete; freed with their ring */
    struct io **due;               /* IOs that complete later: a heap by due_ns */
    struct io *unsent, **unsent_end; /* requests beyond the daemon's limits */
    int due_count, due_capacity;
    _Atomic int64_t link_free_ns, *shared_link_free_ns, *shared_bytes;
    uint64_t random;
    pid_t pid;
    int64_t preps;
};

extern struct emulator emulator;

void lock(void);
void unlock(void);
int64_t now_ns(void);
uint64_t random_below(uint64_t limit);
void violation(const char *what);

/* options.c */
int parse_options(const char *text);
void read_control_file(void);

/* buffers.c */
struct buffer *find_buffer(const struct hf3fs_iov *iov);
void uuid_text(const uint8_t id[16], char text[40]);
void release_buffer(struct buffer *buffer);
void forget_wrapped_buffers(void);

/* files.c */
void make_table(void);
void release_file(struct registered *file);

/* mount.c: without the lock */
int mounted_symlink(const char *target, const char *link);
int mounted_unlink(const char *path);
ssize_t mounted_readlink(const char *path, char *target, size_t capacity);
int mounted_open(const char *path, int flags, unsigned mode);
int mounted_close(int fd);
void hold_mount(const char *mount);
/* Shared memory gets a name, or has lost it: a sweep removes what a process had not unlinked when it ended. */
void note_memory(const char *name);
void unlink_memory(const char *name);
void forget_handles(void);

/* daemon.c: with the lock held */
void start_batches(struct ring *ring);
void start_workers(void);
void free_ring_if_idle(struct ring *ring);
void forget_hung(struct ring *ring);
void push_due(struct io *io);
int64_t arrival(const struct io *io, int64_t now);

/* requests.c: with the lock held */
bool may_start_batch(void);
bool requests_are_limited(void);
void queue_requests(struct batch *batch);
void send_requests(void);
void request_done(const struct io *request);
void forget_requests(void);
void start_what_may(void);

#endif
