// The threads: each takes a block, reads it, gives it back, until el_readers_close.
#pragma once

#include "core/state.h"

namespace el {

// Start the threads that this transfer can use, unless they run already. The mutex is held. 0 or an errno
// when there is not a single thread; fewer than wanted will do.
int start_workers(ReaderThreads &readers, const Transfer &transfer);

}  // namespace el
