// Starting threads: which CPUs they run on, and that no signal of the program is handled on them.
#pragma once

#include <pthread.h>
#include <stdint.h>
#include <vector>

namespace el {

// 0 or an errno. `cpus`: only there, as far as they still are; anywhere when empty.
int start_thread(pthread_t &thread, const std::vector<uint32_t> &cpus, const char *name, void *(*body)(void *), void *argument);

}  // namespace el
