/* The window that a node's ranks share: the part of the C interface for it. A block of a file that several ranks want is
 * read by one of them into the window, and copied from there by all. */
#ifndef ENGINE_LOADER_WINDOW_H
#define ENGINE_LOADER_WINDOW_H

#include "core/c_interface.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct el_window el_window; /* one member's part in it */
typedef struct el_shared el_shared; /* a plan that is carried out by way of it */

typedef struct {
    uint32_t struct_bytes;  /* sizeof(el_window_config) */
    uint32_t ahead;         /* blocks that this member reads at a time */
    uint32_t timeout_ms;    /* for another member that does not deliver, or the lock */
    uint32_t reserved;
    uint64_t bytes;         /* of a window that is made because there is none */
    uint64_t slot_bytes;    /* blocks end at its multiples in the file */
    const char *directory;  /* of this user; nobody else can enter it */
    el_readers *reads;      /* that read blocks; NULL: whoever calls el_window_next_read does */
    el_readers *copies;     /* that copy from the window */
    const uint64_t (*keys)[2]; /* of the files that will be read, see el_shared_file */
    uint32_t n_keys;
    uint32_t reserved2;
} el_window_config;

typedef struct {
    el_file file;     /* without el_window_config.reads, `fd` is any number that the caller knows it by */
    uint64_t key[2];  /* of the file as it is now: the same bytes have the same key in each process */
} el_shared_file;

typedef struct { /* bytes of a file that each of several members will want all or parts of: a tensor */
    uint32_t file;
    uint32_t expected; /* so many members, this one counted; about twice as many of blocks that begin or end their parts */
    uint64_t offset;
    uint64_t bytes;
    uint32_t most;     /* members that will want any of it */
    uint32_t reserved;
} el_shared_region;

typedef struct {
    uint32_t number; /* of the read */
    int32_t file;    /* el_file.fd */
    uint64_t offset;
    uint64_t bytes;
    uint64_t address;
} el_window_read;

typedef struct {
    uint64_t bytes;         /* of the window */
    uint64_t read_bytes;    /* that this member read into it */
    uint64_t shared_bytes;  /* of blocks that this member did not have to read */
    uint64_t left_bytes;    /* of blocks that were to be read past the window */
    uint64_t taken_over;    /* claims of members, of all, that were dead or late */
    uint64_t evicted;       /* blocks, of all members, that made room before all had had them */
    uint64_t waited_ns;     /* that this member had nothing to do but to wait for others */
    uint64_t longest_wait_ns; /* for one that did not deliver, or for room */
    uint32_t members;       /* now */
    uint32_t most_members;  /* that this one has seen */
    uint32_t reading;       /* blocks that this member reads now, for all */
    uint32_t reserved;
} el_window_stats;

/* Join the node's window, or make one. EL_OK, an EL_E_..., or a positive errno. */
EL_API int el_window_join(const el_window_config *config, el_window **out);

/* Give up what is under way and leave. Afterwards all calls with the handle, but for el_window_free, return
 * EL_E_CLOSED. Its readers must be open until then. */
EL_API void el_window_leave(el_window *window);
EL_API void el_window_free(el_window *window);
EL_API int el_window_look(el_window *window, el_window_stats *out);

/* Start a plan; the arrays are copied. region_of[i] is the number of the region that extent i lies in. With device >= 0
 * destinations are on that device of `copies`, and `stream` as for el_submit_to_device. */
EL_API int el_shared_submit(el_window *window, const el_shared_file *files, uint32_t n_files,
                            const el_shared_region *regions, uint32_t n_regions, const el_extent *extents,
                            const uint32_t *region_of, uint64_t n_extents, int32_t device, uint64_t stream,
                            el_shared **out);

/* EL_OK: all that could be had by way of the window is there, see el_shared_left. EL_FAILED: a read of this member's own
 * is overdue, see el_shared_failure. */
EL_API int el_shared_wait(el_shared *shared, int64_t timeout_ms);
EL_API uint64_t el_shared_bytes_done(el_shared *shared);
/* Extents that have to be read past the window: copies up to `capacity` of them, and returns how many there are. */
EL_API uint64_t el_shared_left(el_shared *shared, el_extent *out, uint64_t capacity);
EL_API int el_shared_failure(el_shared *shared, el_failure_info *out);
/* EL_OK: nothing will be written to the destinations any more. */
EL_API int el_shared_cancel(el_shared *shared, int64_t timeout_ms);
EL_API void el_shared_release(el_shared *shared);

/* For windows without `reads`: the next block to read; EL_TIMEOUT, EL_E_CLOSED. Each is to be answered, also after that. */
EL_API int el_window_next_read(el_window *window, int64_t timeout_ms, el_window_read *out);
EL_API int el_window_answer(el_window *window, uint32_t number, int32_t complete);

#ifdef __cplusplus
}
#endif
#endif
