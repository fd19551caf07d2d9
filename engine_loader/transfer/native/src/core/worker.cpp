#include "core/worker.h"

#include <algorithm>
#include <new>
#include <stdio.h>

#include "readers/reader_device.h"
#include "readers/readers.h"
#include "threads/threads.h"
#include "core/transfer.h"
#include "usrbio/usrbio_channel.h"

namespace el {
namespace {

int start_worker(ReaderThreads &readers, bool ring);

struct Task {
    Transfer *transfer;
    Block block;
    bool wide;
};

// The lane to take from next: the one whose head comes first in the plan.
Lane *next_lane(Transfer &transfer, bool wide_only) {
    if (transfer.narrow.empty() || wide_only) return transfer.wide.empty() ? nullptr : &transfer.wide;
    if (transfer.wide.empty()) return &transfer.narrow;
    return transfer.wide.head() < transfer.narrow.head() ? &transfer.wide : &transfer.narrow;
}

bool is_wide_only(const Worker &worker) { return worker.index >= worker.readers.config.threads; }

bool take_task(Worker &worker, Task &task) {
    ReaderThreads &readers = worker.readers;
    if (worker.index >= readers.pace.limit()) return false;
    for (size_t i = 0; i < readers.queue.size(); i++) {
        Transfer &transfer = *readers.queue[i];
        Lane *lane = next_lane(transfer, is_wide_only(worker));
        if (lane == nullptr) continue;
        task = Task{&transfer, transfer.blocks[lane->blocks[lane->next++]], lane == &transfer.wide};
        transfer.in_flight++;
        worker.transfer = &transfer;
        if (transfer.narrow.empty() && transfer.wide.empty() && transfer.rings.empty()) {
            readers.queue.erase(readers.queue.begin() + static_cast<std::ptrdiff_t>(i));
        }
        return true;
    }
    return false;
}

void read_task(Worker &worker, const Task &task, Lock &lock) {
    lock.unlock();
    const Reader reader{worker, *task.transfer};
    if (task.transfer->device != nullptr) {
        read_block_to_device(reader, task.block);
        lock.lock();
        return;
    }
    const Outcome outcome = read_block(reader, task.block);
    const bool copied = task.transfer->files[task.block.file].mode == EL_MEMORY;  // and read by somebody
    if (outcome == Outcome::done && !copied) worker.counters.bytes.add(task.block.bytes);
    lock.lock();
    worker.transfer = nullptr;
    if (!finish_block(*task.transfer, task.block, outcome == Outcome::done)) return;
    lock.unlock();
    delete task.transfer;
    lock.lock();
}

// More threads where they bring more, fewer where they do not. Those above the limit wait.
void follow_pace(ReaderThreads &readers) {
    while (readers.plain_workers < readers.pace.limit()) {
        try {
            if (start_worker(readers, false) != 0) return;
        } catch (const std::bad_alloc &) {
            return;
        }
    }
    readers.wide_work.notify_all();
}

void work_on(Worker &worker, const Task &task, Lock &lock) {
    ReaderThreads &readers = worker.readers;
    const int64_t begin = now_ns();
    read_task(worker, task, lock);
    if (!task.wide || readers.closing) return;
    const int64_t now = now_ns();
    if (readers.pace.note(task.block.bytes, now - begin, now, !readers.queue.empty())) follow_pace(readers);
}

void wait_for_work(Worker &worker, Lock &lock) {
    ReaderThreads &readers = worker.readers;
    const int64_t begin = now_ns();
    (is_wide_only(worker) ? readers.wide_work : readers.narrow_work).wait(lock);
    worker.counters.idle_ns.add(static_cast<uint64_t>(now_ns() - begin));
}

void *worker_main(void *argument) {
    Worker &worker = *static_cast<Worker *>(argument);
    ReaderThreads &readers = worker.readers;
    if (worker.ring) read_by_usrbio(worker);
    Lock lock(readers.mutex);
    while (!readers.closing) {
        Task task;
        if (take_task(worker, task)) {
            work_on(worker, task, lock);
        } else {
            wait_for_work(worker, lock);
        }
    }
    worker.scratch.release();
    readers.running--;
    readers.ended.notify_all();
    lock.unlock();
    unreference(readers);  // may free the worker too
    return nullptr;
}

int start_worker(ReaderThreads &readers, bool ring) {
    uint32_t &started = ring ? readers.ring_workers : readers.plain_workers;
    const uint32_t index = started;
    readers.workers.push_back(std::make_unique<Worker>(readers, index));
    Worker &worker = *readers.workers.back();
    worker.ring = ring;
    char name[16];
    snprintf(name, sizeof name, ring ? "el-ring-%u" : "el-read-%u", index % 1000u);
    const int error = start_thread(worker.thread, readers.cpus, name, worker_main, &worker);
    if (error != 0) {
        readers.workers.pop_back();
        return error;
    }
    started++;
    readers.running++;
    readers.references.fetch_add(1);
    return 0;
}

uint32_t rings_for(const Transfer &transfer) {
    uint32_t rings = 0;
    for (uint32_t i = 0; i < transfer.n_files; i++) {
        const File &file = transfer.files[i];
        if (file.mode == EL_USRBIO) rings = std::max(rings, file.usrbio->rings);
    }
    return rings;
}

int start_ring_workers(ReaderThreads &readers, const Transfer &transfer) {
    const uint32_t wanted = rings_for(transfer);
    int error = 0;
    while (readers.ring_workers < wanted && error == 0) error = start_worker(readers, true);
    return readers.ring_workers == 0 ? error : 0;
}

}  // namespace

int start_workers(ReaderThreads &readers, const Transfer &transfer) {
    int error = transfer.rings.empty() ? 0 : start_ring_workers(readers, transfer);
    if (error != 0 || (transfer.narrow.empty() && transfer.wide.empty())) return error;
    const uint32_t wanted = transfer.wide.empty() ? readers.config.threads : readers.pace.limit();
    while (readers.plain_workers < wanted && error == 0) error = start_worker(readers, false);
    return readers.plain_workers == 0 ? error : 0;
}

}  // namespace el
