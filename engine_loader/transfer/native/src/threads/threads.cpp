#include "threads/threads.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>

namespace el {
namespace {

void set_affinity(pthread_attr_t &attributes, const std::vector<uint32_t> &cpus) {
    if (cpus.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const uint32_t cpu : cpus) {
        if (cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
    }
    pthread_attr_setaffinity_np(&attributes, sizeof set, &set);
}

// Signals are for the threads of the program; its handlers must not run here.
sigset_t block_signals() {
    sigset_t all, before;
    sigfillset(&all);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    return before;
}

}  // namespace

int start_thread(pthread_t &thread, const std::vector<uint32_t> &cpus, const char *name, void *(*body)(void *), void *argument) {
    const sigset_t before = block_signals();
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    set_affinity(attributes, cpus);
    int error = pthread_create(&thread, &attributes, body, argument);
    // CPUs may have gone meanwhile; a thread anywhere is better than none.
    if (error == EINVAL) error = pthread_create(&thread, nullptr, body, argument);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (error == 0) pthread_setname_np(thread, name);
    return error;
}

}  // namespace el
