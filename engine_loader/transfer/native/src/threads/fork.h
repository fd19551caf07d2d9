// Telling a process from its forked child: the child has the memory of the reader threads, but no threads.
#pragma once

#include <stdint.h>

namespace el {

// Goes up in a child at fork(). Threads of another generation do not exist here.
uint32_t process_generation();

}  // namespace el
