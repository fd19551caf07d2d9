#include "readers/usrbio_slots.h"

#include "core/transfer.h"

namespace el {

File &file(const Slot &slot) { return slot.work->transfer->files[slot.run.file]; }

void note_progress(Slot &slot, uint64_t bytes) {
    slot.done += bytes;
    slot.tries = 0;
    slot.since = now_ns();
    slot.retry_at = 0;
    file(slot).count(slot.since - slot.begun, bytes);
}

int prepare_event(Slot &slot, DeviceRing &ring) {
    if (slot.device == &ring && slot.pinned.event.get() != nullptr) return 0;
    slot.pinned.event.reset();
    slot.device = &ring;
    return slot.pinned.event.create(ring.runtime());
}

void release(Slot &slot, Slot::State state) {
    slot.work->runs--;
    slot.work = nullptr;
    slot.state = state;
    slot.channel.reset();
    slot.mount_read.reset();
}

void finish_if_done(Worker &worker, Work *work) {
    if (work->runs > 0 || !work->cut) return;
    Transfer *transfer = work->transfer;
    const bool on_device = transfer->device != nullptr;
    if (!work->failed && !on_device) worker.counters.bytes.add(work->block.bytes);
    Lock lock(worker.readers.mutex);
    if (!work->failed && on_device) worker.readers.device_bytes += work->block.bytes;
    const bool last = finish_block(*transfer, work->block, !work->failed);
    lock.unlock();
    if (last) delete transfer;
    delete work;
}

void fail_slot(Worker &worker, Slot &slot, uint32_t kind, int error, uint32_t tries, uint64_t at) {
    const uint64_t offset = slot.run.offset + slot.done + at;
    Lock lock(worker.readers.mutex);
    fail(*slot.work->transfer, el_failure_info{kind, error, slot.run.file, slot.run.extent, offset, tries, 0});
}

int node_of(const Slot &slot) {
    const DeviceRing *device = slot.work->transfer->device;
    return device == nullptr ? -1 : device->node();
}

}  // namespace el
