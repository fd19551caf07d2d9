/* Reading files on 3FS by USRBIO: the part of the C interface for it. */
#ifndef ENGINE_LOADER_USRBIO_H
#define ENGINE_LOADER_USRBIO_H

#include "core/c_interface.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How files of one mount are read. They have mode EL_USRBIO and flags EL_FILE_USRBIO(number); their descriptors are
 * registered with the library, and stay so until the transfer is quiet. */
typedef struct {
    uint32_t struct_bytes; /* sizeof(el_usrbio_config) */
    uint32_t rings;        /* reading threads, each with a ring and a buffer of its own; 0: 2 */
    uint32_t depth;        /* IOs in flight per ring; 0: 16 */
    uint32_t deadline_ms;  /* of one IO without progress; 0: 90000 (3FS itself tries for 60 s) */
    uint64_t io_bytes;     /* largest IO; files are cut at its multiples, so a multiple of the chunk size; 0: 4 MiB */
    const char *library;   /* path of libhf3fs_api_shared.so */
    const char *mount;
    uint64_t slot_io_bytes; /* the ring's buffer has room for `depth` IOs of this size, at least io_bytes: files whose
                               settings differ in io_bytes only are then read by the same rings; 0: io_bytes */
    uint32_t batch;         /* IOs that the daemon carries out as one job, which complete together; 0: 1 */
    uint32_t reserved;
} el_usrbio_config;

#define EL_FILE_USRBIO(number) ((uint32_t)(number) << 8)

enum { /* el_failure.tries where kind is EL_FAIL_USRBIO: which step failed with `error` */
    EL_USRBIO_LIBRARY = 1, /* the library cannot be loaded, or lacks a function */
    EL_USRBIO_MEMORY = 2,  /* /dev/shm has no room for the buffer */
    EL_USRBIO_BUFFER = 3,  /* hf3fs_iovcreate */
    EL_USRBIO_RING = 4,    /* hf3fs_iorcreate4 */
};

/* A number for EL_FILE_USRBIO (the same one for the same settings), or EL_E_... */
EL_API int el_usrbio_add(el_readers *readers, const el_usrbio_config *config);

#ifdef __cplusplus
}
#endif
#endif
