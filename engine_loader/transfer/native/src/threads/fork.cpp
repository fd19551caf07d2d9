#include "threads/fork.h"

#include <atomic>
#include <pthread.h>

namespace el {
namespace {

std::atomic<uint32_t> generation{0};
pthread_once_t registered = PTHREAD_ONCE_INIT;

void in_child() { generation.fetch_add(1, std::memory_order_relaxed); }

void register_handler() { pthread_atfork(nullptr, nullptr, in_child); }

}  // namespace

uint32_t process_generation() {
    pthread_once(&registered, register_handler);
    return generation.load(std::memory_order_relaxed);
}

}  // namespace el
