// Telling a process from its forked child: the child has the engine's memory, but none of its threads.
#pragma once

#include <stdint.h>

namespace el {

// Goes up in a child at fork(). An engine of another generation is dead here.
uint32_t process_generation();

}  // namespace el
