#include "window/sharing.h"

#include <algorithm>
#include <errno.h>

#include "threads/fork.h"
#include "threads/threads.h"

namespace el {
namespace {

WindowPlace place_of(const el_window_config &config) {
    return WindowPlace{config.directory, config.bytes, config.slot_bytes, int64_t{config.timeout_ms} * kMillisecond};
}

}  // namespace

Sharing::Sharing(const el_window_config &config)
    : member_(std::make_unique<Membership>()), generation_(process_generation()), reads_(config.reads),
      copies_(config.copies), ahead_(std::max(config.ahead, 1u)), timeout_ns_(int64_t{config.timeout_ms} * kMillisecond) {}

Sharing::~Sharing() { close(); }

int Sharing::start(const el_window_config &config) {
    window().declare(config.keys, config.n_keys);
    const int error = member_->join(place_of(config));
    if (error != 0) return error;
    slot_bytes_ = window().slot_bytes();
    pins_.resize(window().slots());
    const int failed = start_thread(thread_, {}, "el-share", run, this);
    if (failed != 0) return failed;
    running_ = true;
    return 0;
}

void Sharing::close() {
    {
        Lock lock(mutex);
        closing_ = true;
        requested_.notify_all();
    }
    if (running_) {
        ring(window().bell());
        pthread_join(thread_, nullptr);
        running_ = false;
    }
    std::unique_ptr<Membership> left;
    Lock lock(mutex);
    left.swap(member_);
    lock.unlock();
}

// Held.
void Sharing::ring_own_bell() {
    if (member_ != nullptr) ring(window().bell());
}

int Sharing::submit(std::shared_ptr<SharedTransfer> transfer) {
    Lock lock(mutex);
    if (closing_) return EL_E_CLOSED;
    transfer->over = transfer->plan.blocks.empty();
    if (!transfer->over) submitted_.push_back(std::move(transfer));
    ring_own_bell();
    return EL_OK;
}

int Sharing::wait(SharedTransfer &transfer, int64_t timeout_ms) {
    const int64_t until = deadline_in(timeout_ms);
    Lock lock(mutex);
    while (!transfer.over && transfer.failure.kind != EL_FAIL_DEADLINE) {
        if (now_ns() >= until) return EL_TIMEOUT;
        ended_.wait_until(lock, until);
    }
    return transfer.failure.kind == EL_FAIL_NONE ? EL_OK : EL_FAILED;
}

int Sharing::cancel(SharedTransfer &transfer, int64_t timeout_ms) {
    const int64_t until = deadline_in(timeout_ms);
    Lock lock(mutex);
    if (!transfer.over) fail(transfer, el_failure_info{EL_FAIL_CANCELLED, 0, 0, EL_NO_EXTENT, 0, 0, 0});
    ring_own_bell();
    while (!transfer.over) {
        if (now_ns() >= until) return EL_TIMEOUT;
        ended_.wait_until(lock, until);
    }
    return EL_OK;
}

// Held.
void Sharing::fail(SharedTransfer &transfer, const el_failure_info &failure) {
    if (transfer.failure.kind == EL_FAIL_NONE) transfer.failure = failure;
    transfer.stop = true;
}

int Sharing::next_read(int64_t timeout_ms, el_window_read &out) {
    const int64_t until = deadline_in(timeout_ms);
    Lock lock(mutex);
    for (;;) {
        if (closing_) return EL_E_CLOSED;
        for (auto &[number, pulled] : pulled_) {
            if (pulled.taken) continue;
            pulled.taken = true;
            out = pulled.read;
            return EL_OK;
        }
        if (now_ns() >= until) return EL_TIMEOUT;
        requested_.wait_until(lock, until);
    }
}

int Sharing::answer(uint32_t number, bool complete) {
    Lock lock(mutex);
    const auto found = pulled_.find(number);
    if (found == pulled_.end()) return EL_E_ARGUMENT;
    found->second.answered = true;
    found->second.complete = complete;
    ring_own_bell();
    return EL_OK;
}

void Sharing::look(el_window_stats &out) {
    Lock lock(mutex);
    out = stats_;
    if (member_ == nullptr) return;
    NodeWindow &window = this->window();
    out.bytes = stats_.bytes = window.bytes();
    out.taken_over = stats_.taken_over = window.taken_over();
    out.evicted = stats_.evicted = window.evicted();
    out.members = window.members();
    out.most_members = stats_.most_members = window.most_members();
}

// Held. The block's extents are to be read past the window.
void Sharing::leave_over(SharedTransfer &transfer, SharedBlock &block) {
    const auto first = transfer.plan.extents.begin() + static_cast<std::ptrdiff_t>(block.first_extent);
    transfer.left.insert(transfer.left.end(), first, first + static_cast<std::ptrdiff_t>(block.n_extents));
    stats_.left_bytes += block.wanted;
}

void Sharing::end_if_over(SharedTransfer &transfer) {
    Lock lock(mutex);
    if (transfer.over || transfer.copying > 0) return;
    if (transfer.active > (transfer.stop ? transfer.asked : 0)) return;
    if (!transfer.stop && transfer.next < transfer.plan.blocks.size()) return;
    transfer.over = true;
    ended_.notify_all();
}

}  // namespace el
