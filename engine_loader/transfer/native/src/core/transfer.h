// The life of a transfer: queued, taken block by block, done or failed, quiet.
#pragma once

#include "core/state.h"

namespace el {

// All of these want the mutex of the ReaderThreads held.

// Put a planned transfer into the queue, or settle it where it has nothing to do.
void enqueue(Transfer &transfer);

// End a transfer as failed unless it ended before; its reads in flight go on until they come back.
void fail(Transfer &transfer, el_failure_info failure);
void cancel(Transfer &transfer);

// A read at this position failed with `error`, and will be tried again.
void note_retry(Transfer &transfer, Position position, int error);

// A worker gives a block back. Returns whether the caller has to delete the transfer (without the lock).
bool finish_block(Transfer &transfer, const Block &block, bool complete);

// Fail the transfer where its oldest read made no progress for deadline_ms, or, before a thread got to it, where all
// threads are stuck. Returns when a read will be overdue; `now` or before: one is.
int64_t check_deadline(Transfer &transfer, int64_t now);

// Whether an extent, or (-1) everything, has been read.
bool is_complete(const Transfer &transfer, int64_t extent);

// Let go of the lock until the extent, or (-1) the transfer, is complete, the transfer ends otherwise, or it is `when_ns`;
// like any condition's, the wait may end early.
void wait_until(Transfer &transfer, int64_t extent, int64_t when_ns, Lock &lock);

// Drop a reference; returns whether the caller has to delete the transfer (without the lock).
bool dereference(Transfer &transfer);

}  // namespace el
