#include "readers/reader_usrbio.h"

#include <algorithm>
#include <errno.h>
#include <optional>

#include "device/device_ring.h"
#include "readers/readers.h"
#include "core/transfer.h"
#include "readers/usrbio_slots.h"
#include "readers/usrbio_window.h"
#include "usrbio/usrbio_channel.h"

namespace el {
namespace {

constexpr int64_t kSlice = 100 * kMillisecond;  // how often cancellation and deadlines are looked at, at least
constexpr int64_t kSliceWithRoom = 5 * kMillisecond;  // and new work, while IOs are in flight
constexpr int64_t kSliceWhenFull = kMillisecond;
constexpr int64_t kOrphanGrace = 5000 * kMillisecond;  // for IOs of a cancelled transfer to come back
constexpr int64_t kClosingGrace = 300 * kMillisecond;

Transfer *first_with_blocks(ReaderThreads &readers) {
    for (Transfer *transfer : readers.queue) {
        if (!transfer->rings.empty()) return transfer;
    }
    return nullptr;
}

const File &file(const Slot &slot) { return slot.work->transfer->files[slot.run.file]; }

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

void fail_slot(Worker &worker, Slot &slot, uint32_t kind, int error, uint32_t tries) {
    const uint64_t offset = slot.run.offset + slot.done;
    Lock lock(worker.readers.mutex);
    fail(*slot.work->transfer, el_failure_info{kind, error, slot.run.file, slot.run.extent, offset, tries, 0});
}

// Lets waiters see that this thread is in a system call for the transfer.
void note_transfer(Worker &worker, Transfer *transfer) {
    Lock lock(worker.readers.mutex);
    worker.transfer = transfer;
}

class RingReader {
  public:
    explicit RingReader(Worker &worker) : worker_(worker), readers_(worker.readers) {}

    // One round: drop what was cancelled, start what has room, take what came back. False after el_readers_close.
    bool step() {
        take_landed();
        drop_stopped();
        fill();
        if (slots_.used() == 0 && !current_) return wait_for_work();
        if (closing_ && current_ == nullptr && !slots_.wanted() && now_ns() > give_up_at_) return false;
        take_completions();
        check_deadlines();
        return true;
    }

  private:
    // --- taking work -------------------------------------------------------------------------------------------------

    bool wait_for_work() {
        Lock lock(readers_.mutex);
        const int64_t begin = now_ns();
        while (!readers_.closing && first_with_blocks(readers_) == nullptr) readers_.ring_work.wait(lock);
        worker_.counters.idle_ns.add(static_cast<uint64_t>(now_ns() - begin));
        return !readers_.closing;
    }

    void fill() {
        full_ = false;
        for (Slot &slot : slots_) {
            if (slot.state == Slot::waiting && slot.retry_at <= now_ns() && !full_) issue(slot);
        }
        while (!full_ && (current_ || take_block())) {
            Slot *slot = slots_.unused(window_.slots());
            if (slot == nullptr) return;
            if (cut_run(*slot)) issue(*slot);
        }
    }

    // Take the next block, and see to a ring for its mount. False when there is none that this thread can serve now.
    bool take_block() {
        const UsrbioConfig *config = nullptr;
        {
            Lock lock(readers_.mutex);
            if (readers_.closing && !closing_) give_up_at_ = now_ns() + kClosingGrace;
            closing_ = readers_.closing;
            Transfer *transfer = closing_ ? nullptr : first_with_blocks(readers_);
            if (transfer == nullptr) return false;
            const Block &block = transfer->blocks[transfer->rings.blocks[transfer->rings.next]];
            config = transfer->files[block.file].usrbio;
            if (config != config_ && slots_.used() > 0) return false;
            if (config == config_ && slots_.unused(window_.slots()) == nullptr) return false;
            current_ = std::make_unique<Work>(Work{transfer, block});
            transfer->rings.next++;
            transfer->in_flight++;
            if (transfer->narrow.empty() && transfer->wide.empty() && transfer->rings.empty()) {
                readers_.queue.erase(std::find(readers_.queue.begin(), readers_.queue.end(), transfer));
            }
        }
        if (config != config_) change_mount(*config);
        const RunLimits limits{std::min(window_.read_bytes(), config->slot_bytes()), readers_.config.wide_gap_bytes};
        cutter_.emplace(*current_->transfer, current_->block, limits, cut_segments_);
        return true;
    }

    void change_mount(const UsrbioConfig &config) {
        channel_.close();
        config_ = &config;
        slots_.reset(config.depth);
        window_.reset(config.depth, config.slot_bytes());
    }

    // Put the next run of the current block into a slot; false when there was none.
    bool cut_run(Slot &slot) {
        Run run;
        Work *work = current_.get();
        if (!cutter_->next(run)) {
            work->cut = true;
            current_.release();
            finish_if_done(worker_, work);
            return false;
        }
        slot.run = run;
        slot.segments.swap(cut_segments_);
        slot.run.segments = &slot.segments;
        slot.work = work;
        slot.state = Slot::waiting;
        slot.done = 0;
        slot.tries = 0;
        slot.since = now_ns();
        slot.retry_at = 0;
        work->runs++;
        return true;
    }

    // --- reading -----------------------------------------------------------------------------------------------------

    void issue(Slot &slot) {
        if (!channel_.is_open()) {
            UsrbioFailure failure{};
            if (!channel_.open(*config_, failure)) {
                fail_slot(worker_, slot, EL_FAIL_USRBIO, failure.error, failure.step);
                return;
            }
        }
        const uint64_t at = slot.done;
        const int error = channel_.read(slots_.number(slot), file(slot).fd, slot.run.offset + at, at, slot.run.span - at);
        if (error == 0) {
            slot.state = Slot::flying;
        } else if (error == EAGAIN) {
            full_ = true;
        } else {
            fail_slot(worker_, slot, EL_FAIL_IO, error, slot.tries + 1);
        }
    }

    void take_completions() {
        const uint32_t flying = slots_.count(Slot::flying) + slots_.count(Slot::orphaned);
        const int64_t begin = now_ns();
        const int64_t timeout = slice(begin);
        if (flying == 0) {
            Lock lock(readers_.mutex);
            readers_.stopped.wait_until(lock, begin + timeout);
            return;
        }
        Hf3fsCqe cqes[kReaped];
        const int n = channel_.reap(cqes, kReaped, timeout);
        const int64_t waited = now_ns() - begin;
        worker_.counters.read_ns.add(static_cast<uint64_t>(waited));
        if (n > 0) window_.adapt(waited, slots_.count(Slot::copying) > 0);
        for (int i = 0; i < n; i++) {
            const auto index = reinterpret_cast<uintptr_t>(cqes[i].userdata) - 1;
            if (index >= slots_.size()) continue;
            completed(slots_[index], cqes[i].result);
            fill();  // the storage works on while the next one is copied
        }
    }

    int64_t slice(int64_t now) const {
        if (full_) return kSliceWhenFull;
        int64_t timeout = slots_.used() < window_.slots() && !closing_ ? kSliceWithRoom : kSlice;
        for (const Slot &slot : slots_) {
            if (slot.state == Slot::waiting) timeout = std::min(timeout, std::max<int64_t>(slot.retry_at - now, 0));
            if (slot.state == Slot::copying) timeout = 0;
        }
        return std::max<int64_t>(timeout, kMillisecond / 10);
    }

    void completed(Slot &slot, int64_t result) {
        if (slot.state == Slot::orphaned) {
            slot.state = Slot::free;
            return;
        }
        if (slot.state != Slot::flying) return;
        slot.state = Slot::waiting;
        const uint64_t left = slot.run.span - slot.done;
        worker_.counters.reads.add(1);
        if (result > static_cast<int64_t>(left)) result = -EIO;
        if (result < 0) {
            retry(slot, static_cast<int>(-result));
        } else if (result == 0) {
            read_by_posix(slot);
        } else {
            progress(slot, static_cast<uint64_t>(result));
        }
    }

    void progress(Slot &slot, uint64_t bytes) {
        slot.done += bytes;
        slot.tries = 0;
        slot.since = now_ns();
        slot.retry_at = 0;
        if (slot.done == slot.run.span) {
            deliver(slot, 0);
        } else {
            worker_.counters.short_reads.add(1);
        }
    }

    // An empty result before the end of the file is a hole or a failure of 3FS; reading by the kernel shows which.
    void read_by_posix(Slot &slot) {
        Transfer &transfer = *slot.work->transfer;
        const uint64_t left = slot.run.span - slot.done;
        iovec vector{channel_.memory(slots_.number(slot)) + slot.done, left};
        const Request request{slot.run.file, slot.run.extent, slot.run.offset + slot.done, &vector, 1, left};
        note_transfer(worker_, &transfer);
        const Outcome outcome = read_all(Reader{worker_, transfer}, request);
        note_transfer(worker_, nullptr);
        if (outcome == Outcome::done) deliver(slot, left);
    }

    void deliver(Slot &slot, uint64_t by_posix) {
        Work *work = slot.work;
        worker_.counters.buffered_bytes.add(std::min(by_posix, slot.run.wanted));
        worker_.counters.usrbio_bytes.add(slot.run.wanted - std::min(by_posix, slot.run.wanted));
        worker_.counters.overread_bytes.add(slot.run.span - slot.run.wanted);
        if (work->transfer->device != nullptr) {
            copy_to_device(slot);
            return;
        }
        scatter(Reader{worker_, *work->transfer}, slot.run, channel_.memory(slots_.number(slot)));
        release(slot, Slot::free);
        finish_if_done(worker_, work);
    }

    // From the ring's own buffer, which is page-locked for it.
    void copy_to_device(Slot &slot) {
        Transfer &transfer = *slot.work->transfer;
        DeviceRing &ring = *transfer.device;
        const Position position{slot.run.file, slot.run.extent, slot.run.offset};
        const int entered = ring.enter();
        const int error = entered != 0 ? entered : prepare_event(slot, ring);
        slot.state = Slot::copying;
        if (error != 0) {
            ring.fail_copy(transfer, position, error);
            slot.copied.store(-1, std::memory_order_relaxed);
            return;
        }
        channel_.pin(ring.runtime());
        const uint32_t stream = worker_.index % ring.streams();
        int refused = ring.begin(stream, transfer);
        if (refused == 0) refused = ring.copy(stream, slot.run, channel_.memory(slots_.number(slot)));
        if (refused != 0) ring.fail_copy(transfer, position, refused);
        ring.launch(Flight{&transfer, &slot, &slot.pinned, position, stream, 0});
    }

    void take_landed() {
        for (Slot &slot : slots_) {
            if (slot.state != Slot::copying) continue;
            const int copied = slot.copied.exchange(0, std::memory_order_acquire);
            if (copied == 0) continue;
            Work *work = slot.work;
            work->failed |= copied < 0;
            release(slot, Slot::free);
            finish_if_done(worker_, work);
        }
    }

    // --- failing -----------------------------------------------------------------------------------------------------

    void retry(Slot &slot, int error) {
        const el_config &config = readers_.config;
        slot.tries++;
        if (!may_pass(error) || slot.tries >= config.max_tries) {
            fail_slot(worker_, slot, EL_FAIL_IO, error, slot.tries);
            return;
        }
        const uint64_t doubled = uint64_t{config.retry_base_ms} << std::min(slot.tries - 1, 20u);
        const uint64_t pause_ms = error == EINTR ? 0 : std::min<uint64_t>(doubled, config.retry_cap_ms);
        slot.retry_at = now_ns() + static_cast<int64_t>(pause_ms) * kMillisecond;
        worker_.counters.retries.add(1);
    }

    // Give up everything of transfers that failed or were cancelled. Their destinations are safe at once: what is still
    // read goes to the ring's buffer only.
    void drop_stopped() {
        for (Slot &slot : slots_) {
            Work *work = slot.work;
            if (work == nullptr || slot.state == Slot::copying) continue;
            if (!work->transfer->stop.load(std::memory_order_relaxed)) continue;
            release(slot, slot.state == Slot::flying ? Slot::orphaned : Slot::free);
            if (slot.state == Slot::orphaned) slot.since = now_ns() + kOrphanGrace;
            work->failed = true;
            finish_if_done(worker_, work);
        }
        if (current_ && current_->transfer->stop.load(std::memory_order_relaxed)) {
            Work *work = current_.release();
            work->cut = work->failed = true;
            finish_if_done(worker_, work);
        }
    }

    void check_deadlines() {
        const int64_t now = now_ns();
        const int64_t limit = config_->deadline_ms * kMillisecond;
        bool lost = false;
        for (Slot &slot : slots_) {
            if (slot.work != nullptr && slot.state != Slot::copying && now - slot.since > limit) {
                fail_slot(worker_, slot, EL_FAIL_DEADLINE, ETIMEDOUT, slot.tries + 1);
                lost |= slot.state == Slot::flying;
            }
            lost |= slot.state == Slot::orphaned && now > slot.since;
        }
        if (lost) retire_channel();
    }

    // An IO never came back, and its read may still land in the buffer: neither ring nor buffer is used again. What else
    // was in flight is read anew, by another ring.
    void retire_channel() {
        while (slots_.count(Slot::copying) > 0) {
            take_landed();
            Lock lock(readers_.mutex);
            readers_.stopped.wait_until(lock, now_ns() + kMillisecond / 10);
        }
        channel_.close();
        for (Slot &slot : slots_) {
            if (slot.state == Slot::orphaned) slot.state = Slot::free;
            if (slot.state == Slot::flying) slot.state = Slot::waiting;
            slot.done = 0;
        }
    }

    static constexpr int kReaped = 64;

    Worker &worker_;
    ReaderThreads &readers_;
    const UsrbioConfig *config_ = nullptr;
    Channel channel_;
    Slots slots_;
    Window window_;
    std::unique_ptr<Work> current_;  // being cut
    std::optional<RunCutter> cutter_;
    std::vector<Segment> cut_segments_;
    bool full_ = false;
    bool closing_ = false;
    int64_t give_up_at_ = 0;
};

}  // namespace

void read_by_usrbio(Worker &worker) {
    RingReader reader(worker);
    while (reader.step()) continue;
}

}  // namespace el
