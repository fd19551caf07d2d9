/* The plain C interface of the native reader threads.
 *
 * Every call may come from any thread, blocks only where it says so, and tolerates NULL. Handles stay valid until they
 * are destroyed or released; calls on closed reader threads return EL_E_CLOSED, and in a child after fork() EL_E_FORKED
 * (the threads did not come along, and a lock may be held for ever by one of them).
 */
#ifndef ENGINE_LOADER_C_INTERFACE_H
#define ENGINE_LOADER_C_INTERFACE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EL_API __attribute__((visibility("default")))
#define EL_ABI_VERSION 8u /* goes up with every change of this file; the binding refuses another one */

enum { /* what calls return */
    EL_OK = 0,
    EL_TIMEOUT = 1,     /* time ran out first; nothing else happened */
    EL_FAILED = 2,      /* see el_failure */
    EL_E_CLOSED = -1,   /* the handle is NULL, or its reader threads were closed */
    EL_E_FORKED = -2,   /* the reader threads belong to the parent process */
    EL_E_ARGUMENT = -3, /* an argument makes no sense: the caller has a bug */
    EL_E_MEMORY = -4,
    EL_E_THREAD = -5, /* no thread could be started; errno says why */
    EL_E_DEVICE = -6, /* the runtime of CUDA or HIP refused, see device.h */
};

enum { /* el_file.mode: how a file is read */
    EL_BUFFERED = 0, /* through the page cache */
    EL_DIRECT = 1,   /* around it (O_DIRECT); buffered where the file system refuses */
    EL_MIXED = 2,    /* direct, but blocks that lie in the page cache come from there */
    EL_USRBIO = 3,   /* by 3FS's library, see usrbio.h */
    EL_MEMORY = 4,   /* its bytes lie in memory */
};

enum {
    EL_FILE_WIDE = 1, /* el_file.flags: reads wait for storage rather than for a CPU: use the wide threads too */
    EL_FILE_REMOTE = 2, /* el_file.flags: on another machine: direct reads are of block_bytes, which its file system divides */
    EL_ORDERED = 1,   /* el_submit flags: by file and offset; otherwise largest blocks first */
    EL_FIRST = 2,     /* el_submit flags: before what was submitted earlier */
    EL_LARGE = 4,     /* el_submit flags: reads are as large as they can be, also where that leaves threads without one */
    EL_HUGE_PAGES = 1, /* el_config.flags: huge pages for large destinations, where they are made sooner than small ones */
    EL_ALWAYS_HUGE_PAGES = 2 /* el_config.flags: huge pages for large destinations, whatever they cost */
};

enum { /* el_failure.kind */
    EL_FAIL_NONE = 0,
    EL_FAIL_IO = 1,          /* a read failed with `error` */
    EL_FAIL_EOF = 2,         /* the file ended before the size that el_file gives */
    EL_FAIL_DEADLINE = 3,    /* no byte came for deadline_ms; the read may still be stuck in the kernel. With tries 0 it was a
                                copy to a device that did not end */
    EL_FAIL_CANCELLED = 4,   /* el_cancel, el_release or el_readers_close */
    EL_FAIL_USRBIO = 5,      /* no ring could be made: `error`, and the step in `tries`, see usrbio.h */
    EL_FAIL_DEVICE = 6,      /* a copy to the device failed, see device.h: `error` is the runtime's */
};

#define EL_NO_EXTENT UINT32_MAX

typedef struct el_readers el_readers;
typedef struct el_transfer el_transfer;

typedef struct {
    uint32_t struct_bytes;  /* sizeof(el_config) */
    uint32_t flags;         /* EL_HUGE_PAGES */
    uint32_t threads;       /* for reads that cost CPU time; 0: 2 */
    uint32_t wide_threads;  /* for reads that wait for storage, at least `threads`; 0: 8 */
    uint32_t max_tries;     /* of one read without progress; 0: 5 */
    uint32_t retry_base_ms; /* pause before the second try; doubles up to retry_cap_ms; 0: 20 */
    uint32_t retry_cap_ms;  /* 0: 2000 */
    uint32_t deadline_ms;   /* of one read without progress; 0: none */
    uint64_t block_bytes;   /* what a thread reads at a time, buffered; 0: the tuned default */
    uint64_t direct_block_bytes;
    uint64_t gap_bytes;     /* unwanted bytes between wanted ones that are read through, buffered; 0: tuned */
    uint64_t wide_gap_bytes; /* the same for wide and direct files */
    const uint32_t *cpus;   /* the threads run on these CPUs only; NULL: like the creating thread */
    uint32_t n_cpus;
    uint32_t most_wide_threads; /* up to so many where reads take long and more at once bring more; 0: wide_threads */
} el_config;

typedef struct {
    int32_t fd;        /* stays open until the transfer is quiet */
    int32_t direct_fd; /* the same file with O_DIRECT, or -1 */
    uint64_t size;     /* an end of file before this is a failure */
    uint32_t mode;
    uint32_t flags;
    const char *memory; /* EL_MEMORY: where its bytes lie; fd is -1 */
} el_file;

typedef struct { /* the layout of EXTENT in transfer/plan.py */
    uint32_t file;
    uint32_t rows;
    uint64_t offset;
    uint64_t row_bytes;
    uint64_t src_stride;
    uint64_t address;
    uint64_t dst_stride;
} el_extent;

typedef struct {
    uint32_t kind;
    int32_t error; /* errno, or 0 */
    uint32_t file;
    uint32_t extent; /* one that waits for these bytes, or EL_NO_EXTENT */
    uint64_t offset; /* in the file */
    uint32_t tries;
    uint32_t in_flight; /* blocks whose reads, or copies to a device, have not ended: while there are any, the destinations
                           may be written */
} el_failure_info;

typedef struct {
    uint64_t bytes;             /* that reached their destinations */
    uint64_t reads;             /* system calls that read */
    uint64_t retries;
    uint64_t short_reads;
    uint64_t overread_bytes;    /* read and thrown away: gaps, alignment */
    uint64_t buffered_bytes;
    uint64_t direct_bytes;
    uint64_t direct_straight_bytes; /* of these without a copy */
    uint64_t direct_refused;    /* files whose file system refused O_DIRECT */
    uint64_t read_ns;           /* in reads, summed over the threads; so are the next three */
    uint64_t scatter_ns;        /* copying from scratch memory to destinations */
    uint64_t backoff_ns;        /* pauses before another try */
    uint64_t idle_ns;           /* threads waiting for work */
    uint64_t wait_ns;           /* callers waiting in el_wait */
    uint64_t usrbio_bytes;
    uint64_t device_bytes;      /* copied to devices */
    uint64_t slot_wait_ns;      /* threads waiting for a slot, because the device is slower than the source */
    uint64_t threads;           /* that were started, but for those of rings and devices */
} el_stats_info;

EL_API uint32_t el_abi_version(void);

/* Reader threads, or NULL with *error set (EL_E_...). Threads start with the first transfer that needs them. */
EL_API el_readers *el_readers_create(const el_config *config, int *error);

/* Threads that start from now on run on these CPUs only; anywhere with n_cpus 0. */
EL_API int el_readers_place(el_readers *readers, const uint32_t *cpus, uint32_t n_cpus);

/* Cancel everything, end the threads and join them. EL_TIMEOUT: a read is stuck in the kernel; call again, or destroy:
 * the thread then frees the handle's memory when its read comes back. timeout_ms < 0: as long as it takes. */
EL_API int el_readers_close(el_readers *readers, int64_t timeout_ms);

/* Give the handle back (after el_readers_close(readers, 0) if that was not done). */
EL_API void el_readers_destroy(el_readers *readers);

EL_API int el_stats(el_readers *readers, el_stats_info *out);

/* The flags by which el_file says what O_DIRECT reads of this descriptor want offsets and lengths, and memory, to be multiples
 * of (without them: 4096); to be asked once for an open file. EL_E_ARGUMENT: it takes none. */
EL_API int el_direct_flags(int32_t direct_fd);

/* Start a plan; the arrays are copied. Transfers are served first come, first served. The destinations must stay alive
 * until the transfer is quiet: el_wait said EL_OK or EL_FAILED with in_flight 0, or el_cancel said EL_OK. */
EL_API int el_submit(el_readers *readers, const el_file *files, uint32_t n_files, const el_extent *extents,
                     uint64_t n_extents, uint32_t flags, el_transfer **out);

/* Wait for one extent, or with extent < 0 for all. timeout_ms < 0: without limit.
 * EL_FAILED comes only when no read is in flight any more, unless one is older than the deadline. */
EL_API int el_wait(el_transfer *transfer, int64_t extent, int64_t timeout_ms);

EL_API uint64_t el_bytes_done(el_transfer *transfer);

/* Extents complete so far, in order of completion: copies those from number `from` on, up to `capacity`, and returns
 * how many there are in all. */
EL_API uint64_t el_completed(el_transfer *transfer, uint64_t from, uint32_t *out, uint64_t capacity);

/* Give up what has not been read. EL_OK: nothing will be written any more. EL_TIMEOUT: a read is still in flight. */
EL_API int el_cancel(el_transfer *transfer, int64_t timeout_ms);

/* What went wrong, if anything; EL_OK or EL_FAILED or EL_E_... */
EL_API int el_failure(el_transfer *transfer, el_failure_info *out);

/* How many reads of the transfer were tried again, EINTR apart, and where and why the first one (kind EL_FAIL_IO, tries 0); or
 * EL_E_... */
EL_API int el_retried(el_transfer *transfer, el_failure_info *first);

/* The time that reads of each file of the transfer took, in ns and summed over all of them, and their bytes: fills the first
 * `capacity` places. EL_OK or EL_E_... */
EL_API int el_file_times(el_transfer *transfer, uint64_t *read_ns, uint64_t *bytes, uint32_t capacity);

/* Give the handle back. A transfer in flight is cancelled without waiting: call el_cancel first to know it is quiet. */
EL_API void el_release(el_transfer *transfer);

#ifdef __cplusplus
}
#endif
#endif
