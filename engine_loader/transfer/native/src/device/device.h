/* Placing bytes in the memory of a CUDA device (or one of ROCm's HIP): the part of the C interface for it.
 *
 * Extents of such a transfer have addresses on one device. Their bytes are read into page-locked slots, and copied from
 * there on streams of the library's own, after everything that was on the owner's stream when the transfer was submitted.
 * An extent is complete once its copies have been completed on the device, and a transfer is quiet only when no copy is
 * in flight: so what is launched after el_wait said EL_OK, on any stream, sees the bytes. */
#ifndef ENGINE_LOADER_DEVICE_H
#define ENGINE_LOADER_DEVICE_H

#include "core/c_interface.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    uint32_t struct_bytes; /* sizeof(el_device_config) */
    int32_t device;        /* its number in the runtime */
    uint32_t streams;      /* 0: 2 */
    uint32_t flags;        /* EL_DEVICE_NO_SLOTS */
    uint64_t pinned_bytes; /* of host memory for the slots, of which there are at least two; 0: 256 MiB */
    const char *library;   /* path of the runtime; NULL: the one that the process has loaded, or else can load */
} el_device_config;

enum { /* el_device_config.flags */
    EL_DEVICE_NO_SLOTS = 1, /* make no slots yet: transfers by USRBIO need none, as the rings' buffers are theirs. The first
                               other transfer, or el_device_add without this flag, makes them */
};

enum { /* el_device_failure.step */
    EL_DEVICE_LIBRARY = 1, /* no runtime was found, or it lacks a function */
    EL_DEVICE_SELECT = 2,  /* cudaSetDevice */
    EL_DEVICE_MEMORY = 3,  /* no page-locked memory */
    EL_DEVICE_STREAM = 4,  /* a stream or an event could not be made */
    EL_DEVICE_THREAD = 5,  /* `error` is an errno */
};

typedef struct {
    uint32_t step;
    int32_t error; /* the runtime's */
    char text[200]; /* what the runtime, or the loader of libraries, says to it */
} el_device_failure;

/* Whether there is a runtime that can be used: EL_OK, or EL_E_DEVICE with what was found wrong in *failure. */
EL_API int el_device_runtime(const char *library, el_device_failure *failure);

/* A number for el_submit_to_device (the same one for the same settings), or EL_E_...; EL_E_DEVICE: see *failure. */
EL_API int el_device_add(el_readers *readers, const el_device_config *config, el_device_failure *failure);

/* el_submit for destinations on a device. `stream`: a cudaStream_t of that device, 0 for its default stream.
 * EL_E_DEVICE: the stream was refused; errno is the runtime's error. */
EL_API int el_submit_to_device(el_readers *readers, const el_file *files, uint32_t n_files, const el_extent *extents,
                               uint64_t n_extents, uint32_t flags, uint32_t device, uint64_t stream, el_transfer **out);

/* What the runtime says to one of its errors, e.g. el_failure_info.error. */
EL_API void el_device_error_text(el_readers *readers, uint32_t device, int32_t error, char *text, uint64_t capacity);

#ifdef __cplusplus
}
#endif
#endif
