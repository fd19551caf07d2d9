// The SIGBUS guard: see guard.h. Everything that the handler touches is lock-free, for it may interrupt any code.
#include "memory/guard.h"

#include <atomic>
#include <csignal>
#include <forward_list>
#include <mutex>

#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr int kEntries = 4096;

struct Entry {
    std::atomic<uint64_t> begin{0};
    std::atomic<uint64_t> end{0};  // 0: the entry is free
    std::atomic<int> tripped{0};
};

Entry entries[kEntries];
std::atomic<int> entries_used{0};  // how far the handler has to look
std::mutex adding;
// Handlers that were there before ours: the first one, and the one that ours last replaced. They are kept for good, as a
// thread may be in any of them.
std::atomic<const struct sigaction *> first{nullptr};
std::atomic<const struct sigaction *> latest{nullptr};
// How many handlers this thread is in that ours has passed its signal on to. In static storage, as the memory of other
// thread-local variables may be allocated on first use, which a signal handler must not do.
thread_local int passing __attribute__((tls_model("initial-exec"))) = 0;
uint64_t page_bytes = 4096;

bool replace_page(uint64_t address) {
    const uint64_t page = address & ~(page_bytes - 1);
    return mmap(reinterpret_cast<void *>(page), page_bytes, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

bool guarded(uint64_t address) {
    const int used = entries_used.load(std::memory_order_acquire);
    for (int i = 0; i < used; ++i) {
        const uint64_t end = entries[i].end.load(std::memory_order_acquire);
        if (address < end && address >= entries[i].begin.load(std::memory_order_relaxed)) {
            entries[i].tripped.store(1, std::memory_order_release);
            return replace_page(address);
        }
    }
    return false;
}

// A handler that was put over ours hands on to ours, as we hand on to it: each is asked once, and then the process ends.
const struct sigaction *next_handler() {
    if (passing == 0) return latest.load(std::memory_order_acquire);
    const struct sigaction *oldest = first.load(std::memory_order_acquire);
    return passing == 1 && oldest != latest.load(std::memory_order_acquire) ? oldest : nullptr;
}

// End the process as it would have ended without us. A fault happens again when the instruction runs again; a signal that
// a process sent does not.
void by_default(int number, const siginfo_t *info, bool ignored) {
    const bool sent = info->si_code <= 0;
    if (sent && ignored) return;
    signal(number, SIG_DFL);
    if (sent) raise(number);
}

void pass_on(int number, siginfo_t *info, void *context) {
    const struct sigaction *handler = next_handler();
    const bool informed = handler != nullptr && (handler->sa_flags & SA_SIGINFO) != 0;
    if (!informed && (handler == nullptr || handler->sa_handler == SIG_DFL || handler->sa_handler == SIG_IGN)) {
        by_default(number, info, handler != nullptr && handler->sa_handler == SIG_IGN);
        return;
    }
    passing++;
    if (informed) {
        handler->sa_sigaction(number, info, context);
    } else {
        handler->sa_handler(number);
    }
    passing--;
}

void on_sigbus(int number, siginfo_t *info, void *context) {
    if (info->si_code != BUS_ADRERR || !guarded(reinterpret_cast<uint64_t>(info->si_addr))) {
        pass_on(number, info, context);
    }
}

void remember(const struct sigaction &replaced) {
    static auto *const kept = new std::forward_list<struct sigaction>;
    kept->push_front(replaced);
    latest.store(&kept->front(), std::memory_order_release);
    const struct sigaction *none = nullptr;
    first.compare_exchange_strong(none, &kept->front(), std::memory_order_release, std::memory_order_relaxed);
}

// Installs the handler, again when somebody (Python's faulthandler, say) has put another one over it meanwhile.
bool install() {
    struct sigaction current {};
    if (sigaction(SIGBUS, nullptr, &current) != 0) {
        return false;
    }
    if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_sigbus) {
        return true;
    }
    page_bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action {};
    action.sa_sigaction = on_sigbus;
    // On the thread's alternate stack where it has one; NODEFER so that a handler we pass on to behaves as ever.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    remember(current);
    return sigaction(SIGBUS, &action, nullptr) == 0;
}

}  // namespace

extern "C" {

int32_t el_guard_add(uint64_t address, uint64_t nbytes) {
    const std::lock_guard<std::mutex> lock(adding);
    if (!install()) {
        return EL_E_MEMORY;
    }
    for (int i = 0; i < kEntries; ++i) {
        if (entries[i].end.load(std::memory_order_relaxed) == 0) {
            entries[i].tripped.store(0, std::memory_order_relaxed);
            entries[i].begin.store(address, std::memory_order_relaxed);
            entries[i].end.store(address + nbytes, std::memory_order_release);
            if (i >= entries_used.load(std::memory_order_relaxed)) {
                entries_used.store(i + 1, std::memory_order_release);
            }
            return i;
        }
    }
    return EL_E_MEMORY;
}

int el_guard_tripped(int32_t guard) {
    return guard >= 0 && guard < kEntries && entries[guard].tripped.load(std::memory_order_acquire) != 0 ? 1 : 0;
}

int el_guard_remove(int32_t guard) {
    if (guard < 0 || guard >= kEntries) {
        return 0;
    }
    const int tripped = el_guard_tripped(guard);
    entries[guard].end.store(0, std::memory_order_release);
    return tripped;
}

}  // extern "C"
