// One read, with everything that can go wrong: retries, short reads, end of file, deadline, cancel.
#pragma once

#include "core/state.h"

namespace el {

enum class Outcome {
    done,
    refused,  // the file system does not take this kind of read (O_DIRECT)
    stopped,  // the transfer failed (recorded) or was cancelled
};

// Errors that may pass; EIO and ESTALE do on network file systems (a server that fails over). As in failures.py.
bool may_pass(int error);

// Who reads for whom.
struct Reader {
    Worker &worker;
    Transfer &transfer;
};

// A read at one offset of a file into memory. `vectors` are used up.
struct Request {
    uint32_t file;
    uint32_t extent;
    uint64_t offset;
    iovec *vectors;
    size_t n_vectors;
    uint64_t needed;       // bytes that have to come; the vectors may have room for more
    uint64_t granule = 1;  // a short read is resumed at a multiple of it (O_DIRECT)
    bool direct = false;
};

// Read until `needed` bytes have come.
Outcome read_all(Reader reader, Request request);

}  // namespace el
