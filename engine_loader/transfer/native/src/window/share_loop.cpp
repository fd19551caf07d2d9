// What a member's thread does in turn: it looks at the blocks under way, and wants more.
#include "window/sharing.h"

#include <algorithm>
#include <utility>

namespace el {
namespace {

constexpr uint64_t kMostWaiting = 256;  // blocks that others read; what comes after them is looked at later
constexpr uint32_t kMostCopying = 64;
constexpr uint32_t kSmallPerLarge = 8;  // so many small blocks are read at once in place of a large one
constexpr int64_t kNap = 20 * kMillisecond;  // where nobody may ring: a dead member, a slot that is given back
constexpr int64_t kIdle = 500 * kMillisecond;
constexpr int64_t kGrace = 500 * kMillisecond;
constexpr int64_t kSweepEvery = 50 * kMillisecond;

}  // namespace

void *Sharing::run(void *self) {
    static_cast<Sharing *>(self)->work();
    return nullptr;
}

void Sharing::work() {
    Bell &bell = window().bell();
    for (;;) {
        const uint32_t heard = bell.load(std::memory_order_acquire);
        {
            Lock lock(mutex);
            if (closing_) break;
        }
        if (step()) continue;
        const bool idle = active_.empty() && pending_.empty();
        const int64_t begin = now_ns();
        wait_for(bell, heard, idle ? kIdle : kNap);
        if (!idle && reading_ == 0 && copying_ == 0) {
            Lock lock(mutex);
            stats_.waited_ns += static_cast<uint64_t>(now_ns() - begin);
        }
    }
    const bool quiet = drop_all();
    if (!quiet) window().keep_mapped();
    Lock lock(mutex);
    ended_.notify_all();
}

bool Sharing::step() {
    bool progress = take_new();
    for (size_t i = 0; i < active_.size();) {
        const State before = active_[i].block->state;
        progress |= go_on(active_[i]);
        const State now = active_[i].block->state;
        progress |= now != before;
        if (now == State::over || now == State::pending) {
            if (now == State::pending) {
                // To be wanted again, before what comes after it.
                SharedTransfer &transfer = *active_[i].transfer;
                const auto number = static_cast<uint64_t>(active_[i].block - transfer.plan.blocks.data());
                transfer.next = std::min(transfer.next, number);
                if (std::find(pending_.begin(), pending_.end(), active_[i].transfer) == pending_.end()) {
                    pending_.push_front(active_[i].transfer);
                }
            }
            active_[i].transfer->active--;
            const std::shared_ptr<SharedTransfer> transfer = std::move(active_[i].transfer);
            if (i + 1 < active_.size()) active_[i] = std::move(active_.back());
            active_.pop_back();
            end_if_over(*transfer);
            continue;
        }
        i++;
    }
    progress |= claim_more();
    const int64_t now = now_ns();
    if ((!active_.empty() || !pending_.empty()) && now - swept_ > kSweepEvery) {
        swept_ = now;
        if (window().sweep() != 0) {
            late_ = 0;  // another one may have its number soon
            progress = true;
        }
    }
    return progress;
}

bool Sharing::take_new() {
    Lock lock(mutex);
    const bool any = !submitted_.empty();
    for (auto &transfer : submitted_) pending_.push_back(std::move(transfer));
    submitted_.clear();
    return any;
}

bool Sharing::go_on(Active &active) {
    switch (active.block->state) {
        case State::reading:
            return go_on_reading(active);
        case State::copying:
            return go_on_copying(active);
        case State::waiting:
            return go_on_waiting(active);
        default:
            return false;
    }
}

bool Sharing::go_on_waiting(Active &active) {
    SharedTransfer &transfer = *active.transfer;
    SharedBlock &block = *active.block;
    NodeWindow &window = this->window();
    {
        Lock lock(mutex);
        if (transfer.stop) {
            block.state = State::over;
            lock.unlock();
            window.forget(block.claim);
            return true;
        }
    }
    const uint32_t owner = window.owner_of(block.claim);
    // Where the storage is slow, all are late with each block, but none is idle.
    const int64_t since = std::max(block.since, window.delivered(owner));
    const int64_t now = now_ns();
    const bool in_time = window.is_ours(block.claim) || ((late_ >> owner & 1) == 0 && now - since < timeout_ns_);
    if (in_time && window.still_busy(block.claim)) return false;
    switch (window.look(block.claim)) {
        case Got::ready:
            pins_[block.claim.slot]++;
            late_ &= ~(uint64_t{1} << owner);
            return begin_copying(transfer, block);
        case Got::busy:
            if (in_time) return false;
            if ((late_ >> owner & 1) == 0) note_wait(now - since);
            late_ |= uint64_t{1} << owner;
            window.take_from(block.claim);
            block.state = State::pending;
            return true;
        case Got::broken: {
            block.state = State::over;
            Lock lock(mutex);
            leave_over(transfer, block);
            return true;
        }
        default:
            block.state = State::pending;
            return true;
    }
}

bool Sharing::claim_more() {
    bool progress = false;
    bool full = false;
    for (size_t i = 0; i < pending_.size() && !full;) {
        const std::shared_ptr<SharedTransfer> transfer = pending_[i];
        auto &blocks = transfer->plan.blocks;
        bool stop;
        {
            Lock lock(mutex);
            stop = transfer->stop;
        }
        while (transfer->next < blocks.size()) {
            SharedBlock &block = blocks[transfer->next];
            if (block.state == State::pending && !stop) {
                if (is_busy()) return progress;
                full = !begin(transfer, block);
                if (full) break;
                progress = true;
            }
            transfer->next++;
        }
        if (full) break;
        pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(i));
        end_if_over(*transfer);
    }
    if (full && full_since_ == 0) {
        full_since_ = now_ns();
        window().want_room(true);
    }
    return progress;
}

// Whether so much is under way that nothing more is begun now.
bool Sharing::is_busy() const {
    // Whoever else carries out reads carries out so many at once; what waits behind them others can read as well.
    const uint32_t most = reads_ == nullptr ? ahead_ : ahead_ * kSmallPerLarge;
    if (reading_bytes_ >= ahead_ * slot_bytes_ || reading_ >= most) return true;
    return copying_ >= kMostCopying || active_.size() >= kMostWaiting;
}

void Sharing::has_room() {
    if (full_since_ == 0) return;
    if (!went_on_) note_wait(now_ns() - full_since_);
    full_since_ = 0;
    went_on_ = false;
    window().want_room(false);
}

// The caller waited so long, in vain or for room.
void Sharing::note_wait(int64_t ns) {
    Lock lock(mutex);
    stats_.longest_wait_ns = std::max(stats_.longest_wait_ns, static_cast<uint64_t>(ns));
}

// Want a block; false where there is no room for it now.
bool Sharing::begin(const std::shared_ptr<SharedTransfer> &transfer, SharedBlock &block) {
    NodeWindow &window = this->window();
    const bool again = std::exchange(block.begun, true);
    switch (window.want(block.key, block.expected, again, block.claim)) {
        case Got::mine:
            has_room();
            if (!begin_reading(*transfer, block)) {
                window.give_up(block.claim);
                Lock lock(mutex);
                leave_over(*transfer, block);
                block.state = State::over;
                return true;
            }
            break;
        case Got::ready:
            has_room();
            pins_[block.claim.slot]++;
            begin_copying(*transfer, block);
            if (block.state == State::over) return true;
            break;
        case Got::busy:
            block.state = State::waiting;
            block.since = now_ns();
            break;
        case Got::full:
            if (full_since_ == 0 || now_ns() - full_since_ < timeout_ns_) return false;
            if (!std::exchange(went_on_, true)) note_wait(now_ns() - full_since_);
            [[fallthrough]];
        default: {
            Lock lock(mutex);
            leave_over(*transfer, block);
            block.state = State::over;
            return true;
        }
    }
    transfer->active++;
    active_.push_back(Active{transfer, &block});
    return true;
}

// End all that is under way; false where something may still be written to the window.
bool Sharing::drop_all() {
    bool quiet = true;
    take_new();
    for (const Active &active : active_) {
        if (active.block->transfer != nullptr) el_cancel(active.block->transfer, 0);  // all at once, then wait
    }
    const int64_t until = now_ns() + kGrace;
    for (Active &active : active_) {
        SharedBlock &block = *active.block;
        if (block.state == State::copying) {
            const bool dropped = drop_transfer(block.transfer, until);
            if (dropped) unpin(block.claim);
            Lock lock(mutex);
            if (dropped) active.transfer->copying--;
            quiet &= dropped;
        } else if (block.state == State::reading && block.transfer != nullptr) {
            drop_reading(block, until);
        } else if (block.state == State::reading) {
            Lock lock(mutex);
            const auto found = pulled_.find(block.number);
            if (found->second.taken && !found->second.answered) {
                quiet = false;
            } else {
                pulled_.erase(found);
                lock.unlock();
                window().give_up(block.claim);
            }
        }
        block.state = State::over;
        Lock lock(mutex);
        fail(*active.transfer, el_failure_info{EL_FAIL_CANCELLED, 0, 0, EL_NO_EXTENT, 0, 0, 0});
        active.transfer->over = active.transfer->copying == 0;
    }
    active_.clear();
    Lock lock(mutex);
    for (const auto &transfer : pending_) {
        fail(*transfer, el_failure_info{EL_FAIL_CANCELLED, 0, 0, EL_NO_EXTENT, 0, 0, 0});
        transfer->over = transfer->copying == 0;
    }
    pending_.clear();
    return quiet;
}

}  // namespace el
