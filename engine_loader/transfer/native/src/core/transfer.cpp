#include "core/transfer.h"

#include <algorithm>
#include <errno.h>

#include "device/device_ring.h"

namespace el {
namespace {

void notify(Transfer &transfer) {
    for (Waiter *waiter = transfer.waiters; waiter != nullptr; waiter = waiter->next) {
        if (transfer.phase != Phase::active || is_complete(transfer, waiter->extent)) waiter->condition.notify_one();
    }
    if (transfer.bell != nullptr) ring(*transfer.bell);
}

template <typename T>
void forget(std::vector<T> &items) {
    std::vector<T>().swap(items);
}

// No worker touches the transfer any more, and none will.
void settle(Transfer &transfer) {
    auto &active = transfer.readers.active;
    active.erase(std::find(active.begin(), active.end(), &transfer));
    transfer.quiet = true;
    transfer.references--;
    if (transfer.device != nullptr) transfer.device->give_back(transfer.ready.release());
    transfer.destinations.close();
    forget(transfer.pieces);
    forget(transfer.blocks);
    forget(transfer.narrow.blocks);
    forget(transfer.wide.blocks);
    forget(transfer.rings.blocks);
    transfer.narrow.next = transfer.wide.next = transfer.rings.next = 0;
    notify(transfer);
}

void remove_from_queue(Transfer &transfer) {
    auto &queue = transfer.readers.queue;
    queue.erase(std::remove(queue.begin(), queue.end(), &transfer), queue.end());
}

void count_bytes(Transfer &transfer, uint32_t extent, uint64_t bytes) {
    transfer.bytes_done += bytes;
    transfer.remaining[extent] -= bytes;
    if (transfer.remaining[extent] == 0) transfer.completed.push_back(extent);
}

// The worker whose system call for this transfer made no progress for longest.
const Worker *oldest_read(const Transfer &transfer) {
    const Worker *oldest = nullptr;
    int64_t since = kForever;
    for (const auto &worker : transfer.readers.workers) {
        if (worker->transfer != &transfer) continue;
        const int64_t begin = worker->io_since.load(std::memory_order_acquire);
        if (begin == 0 || begin >= since) continue;
        oldest = worker.get();
        since = begin;
    }
    return oldest;
}

// Since when every thread that could serve this transfer is in one and the same system call; 0 when one is free.
int64_t starved_since(const Transfer &transfer) {
    const ReaderThreads &readers = transfer.readers;
    const bool narrow_only = transfer.wide.empty();
    int64_t latest = 0;
    for (const auto &worker : readers.workers) {
        if (worker->ring || worker->index >= readers.pace.limit()) continue;
        if (narrow_only && worker->index >= readers.config.threads) continue;
        const int64_t begin = worker->io_since.load(std::memory_order_acquire);
        if (begin == 0) return 0;
        latest = std::max(latest, begin);
    }
    return latest;
}

void fail_by_deadline(Transfer &transfer, uint32_t file, uint32_t extent, uint64_t offset) {
    fail(transfer, el_failure_info{EL_FAIL_DEADLINE, 0, file, extent, offset, 1, 0});
}

// A transfer that no thread got to is overdue when all of them are stuck in reads for others.
int64_t check_starved(Transfer &transfer, int64_t now, int64_t limit) {
    if (transfer.narrow.empty() && transfer.wide.empty()) return now + limit;  // rings see to their deadlines
    const int64_t since = starved_since(transfer);
    if (since == 0) return now + limit;
    if (now < since + limit) return since + limit;
    const Lane &lane = transfer.narrow.empty() ? transfer.wide : transfer.narrow;
    const Block &block = transfer.blocks[lane.head()];
    fail_by_deadline(transfer, block.file, transfer.pieces[block.first_piece].extent, block.offset);
    return now;
}

int64_t check_read(Transfer &transfer, const Worker &worker, int64_t now, int64_t limit) {
    const int64_t since = worker.io_since.load(std::memory_order_acquire);
    if (since == 0) return now + limit;  // it came back this very moment
    if (now < since + limit) return since + limit;
    fail_by_deadline(transfer, worker.io_file.load(std::memory_order_relaxed),
                     worker.io_extent.load(std::memory_order_relaxed),
                     worker.io_offset.load(std::memory_order_relaxed));
    return now;
}

}  // namespace

void enqueue(Transfer &transfer) {
    ReaderThreads &readers = transfer.readers;
    if (transfer.blocks.empty()) {
        transfer.phase = Phase::done;
        transfer.quiet = true;
        return;
    }
    readers.active.reserve(readers.active.size() + 1);  // so that only the insertion can fail
    const auto less_urgent = [&transfer](const Transfer *other) { return other->urgency < transfer.urgency; };
    readers.queue.insert(std::find_if(readers.queue.begin(), readers.queue.end(), less_urgent), &transfer);
    readers.active.push_back(&transfer);
    transfer.references++;
    if (!transfer.rings.empty()) readers.ring_work.notify_all();
    if (transfer.narrow.empty() && transfer.wide.empty()) return;
    if (transfer.blocks.size() == 1 && transfer.wide.empty()) {
        readers.narrow_work.notify_one();
        return;
    }
    readers.narrow_work.notify_all();
    if (!transfer.wide.empty()) readers.wide_work.notify_all();
}

void fail(Transfer &transfer, el_failure_info failure) {
    if (transfer.phase != Phase::active) return;
    transfer.phase = Phase::failed;
    transfer.failure = failure;
    transfer.stop.store(true, std::memory_order_relaxed);
    remove_from_queue(transfer);
    transfer.readers.stopped.notify_all();
    if (transfer.in_flight == 0) {
        settle(transfer);
    } else {
        notify(transfer);
    }
}

void note_retry(Transfer &transfer, Position position, int error) {
    if (error == EINTR) return;  // no sign of trouble
    if (transfer.retries++ > 0) return;
    transfer.retried = el_failure_info{EL_FAIL_IO, error, position.file, position.extent, position.offset, 0, 0};
}

void cancel(Transfer &transfer) {
    fail(transfer, el_failure_info{EL_FAIL_CANCELLED, 0, 0, EL_NO_EXTENT, 0, 0, 0});
}

bool finish_block(Transfer &transfer, const Block &block, bool complete) {
    const size_t completed = transfer.completed.size();
    if (complete) {
        const Piece *pieces = transfer.pieces.data() + block.first_piece;
        for (uint32_t i = 0; i < block.pieces; i++) count_bytes(transfer, pieces[i].extent, pieces[i].bytes());
    }
    transfer.in_flight--;
    if (transfer.phase == Phase::active && transfer.completed.size() == transfer.n_extents) transfer.phase = Phase::done;
    if (transfer.phase != Phase::active && transfer.in_flight == 0) {
        settle(transfer);
    } else if (transfer.completed.size() != completed) {
        notify(transfer);
    }
    return transfer.references == 0;
}

int64_t check_deadline(Transfer &transfer, int64_t now) {
    const int64_t limit = transfer.readers.config.deadline_ms * kMillisecond;
    if (limit == 0 || transfer.quiet) return kForever;
    const Worker *worker = oldest_read(transfer);
    if (worker != nullptr) return check_read(transfer, *worker, now, limit);
    return transfer.in_flight == 0 ? check_starved(transfer, now, limit) : now + limit;
}

bool is_complete(const Transfer &transfer, int64_t extent) {
    if (transfer.phase == Phase::done) return true;
    return extent >= 0 && transfer.remaining[static_cast<uint64_t>(extent)] == 0;
}

void wait_until(Transfer &transfer, int64_t extent, int64_t when_ns, Lock &lock) {
    Waiter waiter{extent, transfer.waiters, {}};
    transfer.waiters = &waiter;
    waiter.condition.wait_until(lock, when_ns);
    Waiter **link = &transfer.waiters;
    while (*link != &waiter) link = &(*link)->next;
    *link = waiter.next;
}

bool dereference(Transfer &transfer) { return --transfer.references == 0; }

Transfer::Transfer(ReaderThreads &owner) : readers(owner) { readers.references.fetch_add(1); }

Transfer::~Transfer() { unreference(readers); }

}  // namespace el
