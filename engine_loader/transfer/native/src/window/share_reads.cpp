// Blocks that a member reads into the window, and what it copies from there.
#include "window/sharing.h"

#include <algorithm>

#include "api/api.h"
#include "core/transfer.h"
#include "device/device.h"

namespace el {
namespace {

// Have the end of a transfer, and every extent of it, ring a bell.
void listen(el_transfer *transfer, Bell &bell) {
    Transfer *listened = unwrap(transfer);
    Lock lock(listened->readers.mutex);
    listened->bell = &bell;
}

}  // namespace

bool drop_transfer(el_transfer *transfer, int64_t until) {
    const int64_t left = std::max<int64_t>(0, (until - now_ns()) / kMillisecond);
    const bool quiet = el_cancel(transfer, left) == EL_OK;
    {
        Transfer *listened = unwrap(transfer);
        Lock lock(listened->readers.mutex);
        listened->bell = nullptr;
    }
    el_release(transfer);
    return quiet;
}

// Whether a read of ours has ended, and how.
bool Sharing::read_is_over(SharedBlock &block, bool &complete, el_failure_info &failure) {
    if (block.transfer != nullptr) {
        const int result = el_wait(block.transfer, -1, 0);
        if (result == EL_TIMEOUT) return false;
        complete = result == EL_OK;
        if (!complete) el_failure(block.transfer, &failure);
        return true;
    }
    Lock lock(mutex);
    const auto found = pulled_.find(block.number);
    if (!found->second.answered) return false;
    complete = found->second.complete;
    pulled_.erase(found);
    return true;
}

bool Sharing::go_on_reading(Active &active) {
    SharedTransfer &transfer = *active.transfer;
    SharedBlock &block = *active.block;
    NodeWindow &window = this->window();
    bool stop;
    {
        Lock lock(mutex);
        stop = transfer.stop;
    }
    bool complete = false;
    el_failure_info failure{};
    if (!read_is_over(block, complete, failure)) {
        if (!stop) return false;
        if (block.number != 0) {
            end_if_over(transfer);
            return false;
        }
        if (el_cancel(block.transfer, 0) != EL_OK) return false;
        drop_reading(block, 0);
        note_reading(block, false);
        block.state = State::over;
        return true;
    }
    if (block.transfer != nullptr) {
        const bool quiet = drop_transfer(block.transfer, 0);
        block.transfer = nullptr;
        if (!quiet) window.keep_mapped();
        if (!complete) quiet ? window.give_up(block.claim) : window.take_from(block.claim);
    } else {
        block.number = 0;
        transfer.asked--;
        if (!complete) window.give_up(block.claim);
    }
    note_reading(block, false);
    if (!complete) {
        Lock lock(mutex);
        if (failure.kind == EL_FAIL_DEADLINE) {
            failure.file = block.file;
            failure.extent = EL_NO_EXTENT;
            fail(transfer, failure);
            ended_.notify_all();
        }
        block.state = State::over;
        if (!transfer.stop) leave_over(transfer, block);
        return true;
    }
    {
        Lock lock(mutex);
        stats_.read_bytes += block.key.bytes;
    }
    if (!window.publish(block.claim)) {
        block.state = window.broken() || stop ? State::over : State::pending;
        if (window.broken() && !stop) {
            Lock lock(mutex);
            leave_over(transfer, block);
        }
        return true;
    }
    pins_[block.claim.slot]++;
    block.by_us = true;
    if (stop) {
        unpin(block.claim);
        block.state = State::over;
        return true;
    }
    return begin_copying(transfer, block);
}

bool Sharing::begin_copying(SharedTransfer &transfer, SharedBlock &block) {
    NodeWindow &window = this->window();
    el_file file{};
    file.fd = file.direct_fd = -1;
    file.size = window.bytes();
    file.mode = EL_MEMORY;
    file.memory = window.for_reading();
    // To a device, rows go with what lies between them into page-locked memory, and from there in one 2-D copy.
    if (transfer.device >= 0) file.flags = EL_FILE_WIDE;
    const uint64_t base = window.slots_offset(block.claim.slot) + block.key.offset % kWindowAlign;
    std::vector<el_extent> extents(transfer.plan.extents.begin() + static_cast<std::ptrdiff_t>(block.first_extent),
                                   transfer.plan.extents.begin() +
                                       static_cast<std::ptrdiff_t>(block.first_extent + block.n_extents));
    for (el_extent &extent : extents) {
        extent.file = 0;
        extent.offset = base + (extent.offset - block.key.offset);
    }
    const uint32_t flags = EL_ORDERED | EL_FIRST;
    const int result = transfer.device < 0
                           ? el_submit(copies_, &file, 1, extents.data(), extents.size(), flags, &block.transfer)
                           : el_submit_to_device(copies_, &file, 1, extents.data(), extents.size(), flags,
                                                 static_cast<uint32_t>(transfer.device), transfer.stream, &block.transfer);
    if (result != EL_OK) {
        block.transfer = nullptr;
        unpin(block.claim);
        block.state = State::over;
        Lock lock(mutex);
        leave_over(transfer, block);  // the same call, past the window, says what is wrong
        return true;
    }
    copying_++;
    block.state = State::copying;
    listen(block.transfer, window.bell());
    Lock lock(mutex);
    transfer.copying++;
    return true;
}

bool Sharing::go_on_copying(Active &active) {
    SharedTransfer &transfer = *active.transfer;
    SharedBlock &block = *active.block;
    bool stop;
    {
        Lock lock(mutex);
        stop = transfer.stop;
    }
    const int result = el_wait(block.transfer, -1, 0);
    if (result == EL_TIMEOUT && (!stop || el_cancel(block.transfer, 0) != EL_OK)) return false;
    const bool quiet = drop_transfer(block.transfer, 0);
    block.transfer = nullptr;
    copying_--;
    block.state = State::over;
    if (quiet) unpin(block.claim);  // else the slot stays as it is for as long as the process lives
    Lock lock(mutex);
    if (quiet) transfer.copying--;
    if (result != EL_OK) {
        if (!stop) leave_over(transfer, block);
        return true;
    }
    if (!block.by_us) stats_.shared_bytes += block.key.bytes;
    transfer.bytes_done += block.wanted;
    return true;
}

void Sharing::unpin(const Claim &claim) {
    if (--pins_[claim.slot] == 0) window().done(claim);
}

bool Sharing::begin_reading(SharedTransfer &transfer, SharedBlock &block) {
    NodeWindow &window = this->window();
    char *slot = window.for_writing(block.claim.slot);
    if (slot == nullptr) return false;
    char *memory = slot + block.key.offset % kWindowAlign;
    if (reads_ == nullptr) {
        Lock lock(mutex);
        block.number = next_pulled_++;
        Pulled pulled{};
        pulled.read = el_window_read{block.number, transfer.files[block.file].fd, block.key.offset, block.key.bytes,
                                     reinterpret_cast<uint64_t>(memory)};
        pulled_.emplace(block.number, pulled);
        transfer.asked++;
        requested_.notify_one();
    } else {
        const el_extent extent{0, 1, block.key.offset, block.key.bytes, 0, reinterpret_cast<uint64_t>(memory), 0};
        if (el_submit(reads_, &transfer.files[block.file], 1, &extent, 1, EL_ORDERED | EL_FIRST | EL_LARGE,
                      &block.transfer) != EL_OK) {
            block.transfer = nullptr;
            return false;
        }
        listen(block.transfer, window.bell());
    }
    note_reading(block, true);
    block.state = State::reading;
    return true;
}

void Sharing::note_reading(const SharedBlock &block, bool begun) {
    reading_ = begun ? reading_ + 1 : reading_ - 1;
    reading_bytes_ = begun ? reading_bytes_ + block.key.bytes : reading_bytes_ - block.key.bytes;
    Lock lock(mutex);
    stats_.reading = reading_;
}

// Give up a read of ours that is under way.
void Sharing::drop_reading(SharedBlock &block, int64_t until) {
    NodeWindow &window = this->window();
    if (drop_transfer(block.transfer, until)) {
        window.give_up(block.claim);
    } else {
        window.take_from(block.claim);
        window.keep_mapped();
    }
    block.transfer = nullptr;
}

}  // namespace el
