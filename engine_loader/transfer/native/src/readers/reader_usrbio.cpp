// The threads that read by USRBIO: each keeps a window of IOs in flight on a ring of its own.
#include <algorithm>
#include <errno.h>
#include <optional>
#include <string.h>

#include "device/device_ring.h"
#include "readers/readers.h"
#include "core/transfer.h"
#include "readers/usrbio_slots.h"
#include "readers/usrbio_window.h"
#include "usrbio/usrbio_keeper.h"

namespace el {
namespace {

constexpr int64_t kSlice = 100 * kMillisecond;  // how often cancellation and deadlines are looked at, at least
constexpr int64_t kSliceWithRoom = 5 * kMillisecond;  // and new work, while IOs are in flight
constexpr int64_t kSliceWhenFull = kMillisecond;  // or while a ring is made
constexpr int64_t kOrphanGrace = 5000 * kMillisecond;  // for IOs of a cancelled transfer to come back
constexpr int64_t kMomentForMount = 1000 * kMillisecond;  // where it has given no answer for the whole deadline
constexpr int64_t kClosingGrace = 300 * kMillisecond;

Transfer *first_with_blocks(ReaderThreads &readers) {
    for (Transfer *transfer : readers.queue) {
        if (!transfer->rings.empty()) return transfer;
    }
    return nullptr;
}

class RingReader {
  public:
    explicit RingReader(Worker &worker) : worker_(worker), readers_(worker.readers) {}
    ~RingReader() { holder_.retire_and_wait(now_ns() + kClosingGrace); }
    RingReader(const RingReader &) = delete;
    RingReader &operator=(const RingReader &) = delete;

    // One round: drop what was cancelled, start what has room, take what came back. False after el_readers_close.
    bool step() {
        take_landed();
        take_mounted();
        drop_stopped();
        fill();
        if (slots_.used() == 0 && !current_) return wait_for_work();
        if (closing_ && current_ == nullptr && !slots_.wanted() && now_ns() > give_up_at_) return false;
        take_completions();
        check_deadlines();
        return true;
    }

  private:
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
            if (slot == nullptr) break;
            if (cut_run(*slot)) issue(*slot);
        }
        if (prepared_) holder_.get()->submit();
        prepared_ = false;
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
            const bool same = config_ != nullptr && config->same_ring(*config_);
            if (same ? slots_.unused(window_.slots()) == nullptr : slots_.used() > 0) return false;
            current_ = std::make_unique<Work>(Work{transfer, block});
            transfer->rings.next++;
            transfer->in_flight++;
            if (transfer->narrow.empty() && transfer->wide.empty() && transfer->rings.empty()) {
                readers_.queue.erase(std::find(readers_.queue.begin(), readers_.queue.end(), transfer));
            }
        }
        if (config_ == nullptr || !config->same_ring(*config_)) change_rings(*config);
        // Rows stay whole up to a quarter more, for which slots have room.
        const uint64_t bytes = std::min(window_.read_bytes(), config->io_bytes);
        const RunLimits limits{bytes + bytes / 4, readers_.config.wide_gap_bytes, bytes};
        cutter_.emplace(*current_->transfer, current_->block, limits, cut_segments_);
        return true;
    }

    void change_rings(const UsrbioConfig &config) {
        holder_.retire();
        config_ = &config;
        slots_.reset(config.depth);
        window_.reset(config.depth, config.slot_io_bytes);
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

    void issue(Slot &slot) {
        if (!holder_.ready(*config_, node_of(slot), readers_.cpus)) {
            full_ = true;
            UsrbioFailure failure{};
            // What was begun for others that are gone says nothing of now: the next look begins anew.
            if (holder_.failed(slot.since, failure)) fail_waiting(EL_FAIL_USRBIO, failure.error, failure.step);
            return;
        }
        if (slot.channel != holder_.get()) slot.done = 0;  // what came lies in the buffer of a ring that was given up
        const uint64_t at = slot.done;
        const int error = holder_.get()->prepare(slots_.number(slot), file(slot).fd, slot.run.offset + at, at, slot.run.span - at);
        if (error == 0) {
            slot.state = Slot::flying;
            slot.channel = holder_.get();
            slot.begun = now_ns();
            prepared_ = true;
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
            wait_without_ios(begin + timeout);
            return;
        }
        Hf3fsCqe cqes[kReaped];
        const int n = holder_.get()->reap(cqes, kReaped, timeout);
        const int64_t waited = now_ns() - begin;
        worker_.counters.read_ns.add(static_cast<uint64_t>(waited));
        if (n > 0) window_.adapt(waited, slots_.count(Slot::copying) > 0);
        for (int i = 0; i < n; i++) {
            const auto index = reinterpret_cast<uintptr_t>(cqes[i].userdata) - 1;
            if (index >= slots_.size()) continue;
            completed(slots_[index], cqes[i].result);
            // The storage works on while the next one is copied; whole batches are begun when all of one have come.
            if (config_->batch == 1) fill();
        }
    }

    void wait_without_ios(int64_t until) {
        if (holder_.is_making()) {
            holder_.wait(until);
            return;
        }
        Lock lock(readers_.mutex);
        readers_.stopped.wait_until(lock, until);
    }

    int64_t slice(int64_t now) const {
        if (full_) return kSliceWhenFull;
        int64_t timeout = slots_.used() < window_.slots() && !closing_ ? kSliceWithRoom : kSlice;
        for (const Slot &slot : slots_) {
            if (slot.state == Slot::waiting) timeout = std::min(timeout, std::max<int64_t>(slot.retry_at - now, 0));
            if (slot.state == Slot::copying || slot.state == Slot::mounted) timeout = 0;
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
        if (result == 0 || result == -ENODATA) {
            ask_mount(slot);
        } else if (result < 0) {
            file(slot).count(now_ns() - slot.begun, 0);
            retry(slot, static_cast<int>(-result));
        } else {
            progress(slot, static_cast<uint64_t>(result));
        }
    }

    void progress(Slot &slot, uint64_t bytes) {
        note_progress(slot, bytes);
        window_.came(slot.since - slot.begun);
        if (slot.done == slot.run.span) {
            deliver(slot, 0);
        } else {
            worker_.counters.short_reads.add(1);
        }
    }

    // Nothing before the end of the file, or ENODATA: a hole, or a failure of 3FS. The kernel's answer shows which.
    void ask_mount(Slot &slot) {
        slot.state = Slot::mounted;
        slot.mount_read =
            read_by_mount(file(slot).fd, slot.run.offset + slot.done, slot.run.span - slot.done, readers_.cpus);
    }

    void take_mounted() {
        for (Slot &slot : slots_) {
            if (slot.state != Slot::mounted || !slot.mount_read->done.load(std::memory_order_acquire)) continue;
            const std::shared_ptr<MountRead> read = std::move(slot.mount_read);
            slot.state = Slot::waiting;
            if (slot.work->transfer->stop.load(std::memory_order_relaxed)) continue;
            if (read->error != 0) {
                retry(slot, read->error);
            } else if (read->has_hole()) {
                // Zeros, for all that the mount says: data that comes yet (an upload), or is lost.
                retry(slot, ENODATA, read->hole);
            } else if (read->got < slot.run.span - slot.done) {
                fail_slot(worker_, slot, EL_FAIL_EOF, 0, slot.tries + 1, read->got);
            } else {
                memcpy(memory(slot) + slot.done, read->bytes.data(), read->got);
                deliver(slot, read->got);
            }
        }
    }

    char *memory(const Slot &slot) const { return slot.channel->memory(slots_.number(slot)); }
    void deliver(Slot &slot, uint64_t by_posix) {
        Work *work = slot.work;
        worker_.counters.buffered_bytes.add(std::min(by_posix, slot.run.wanted));
        worker_.counters.usrbio_bytes.add(slot.run.wanted - std::min(by_posix, slot.run.wanted));
        worker_.counters.overread_bytes.add(slot.run.span - slot.run.wanted);
        if (work->transfer->device != nullptr) {
            copy_to_device(slot);
            return;
        }
        const int64_t begin = now_ns();
        scatter(Reader{worker_, *work->transfer}, slot.run, memory(slot));
        window_.copied(now_ns() - begin);
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
        slot.channel->pin(ring.runtime(), ring.config().device);
        const uint32_t stream = worker_.index % ring.streams();
        int refused = ring.begin(stream, transfer);
        if (refused == 0) refused = ring.copy(stream, slot.run, memory(slot));
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

    // `at`: how far beyond what came so far it went wrong.
    void retry(Slot &slot, int error, uint64_t at = 0) {
        const el_config &config = readers_.config;
        slot.tries++;
        if (slot.tries >= config.max_tries || !(may_pass(error) || error == ENODATA)) {
            fail_slot(worker_, slot, EL_FAIL_IO, error, slot.tries, at);
            return;
        }
        const uint64_t doubled = uint64_t{config.retry_base_ms} << std::min(slot.tries - 1, 20u);
        const uint64_t pause_ms = error == EINTR ? 0 : std::min<uint64_t>(doubled, config.retry_cap_ms);
        slot.retry_at = now_ns() + static_cast<int64_t>(pause_ms) * kMillisecond;
        worker_.counters.retries.add(1);
        Lock lock(readers_.mutex);
        note_retry(*slot.work->transfer, Position{slot.run.file, slot.run.extent, slot.run.offset + slot.done + at}, error);
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
        const int64_t now = now_ns(), limit = config_->deadline_ms * kMillisecond;
        bool lost = false;
        for (Slot &slot : slots_) {
            if (slot.work != nullptr && slot.state != Slot::copying && now - slot.since > limit) {
                fail_slot(worker_, slot, EL_FAIL_DEADLINE, ETIMEDOUT, slot.tries + 1);
                lost |= slot.state == Slot::flying;
            }
            lost |= slot.state == Slot::orphaned && now > slot.since;
        }
        // Since then the mount has given no answer: what comes later waits for a moment only.
        if (holder_.is_making() && now - holder_.making_since() > limit) {
            fail_waiting(EL_FAIL_DEADLINE, ETIMEDOUT, 1, now - std::min(limit, kMomentForMount));
        }
        if (lost) retire_channel();
    }

    // `since`: only those that wait since then, at least.
    void fail_waiting(uint32_t kind, int error, uint32_t tries, int64_t since = kForever) {
        for (Slot &slot : slots_) {
            if (slot.state == Slot::waiting && slot.since <= since) fail_slot(worker_, slot, kind, error, tries);
        }
    }

    // An IO never came back, and its read may still land in the buffer: neither ring nor buffer is used again. What else
    // was in flight is read anew, by another ring, and its deadline begins anew. Copies to devices keep the buffer for as
    // long as they take.
    void retire_channel() {
        holder_.retire();
        for (Slot &slot : slots_) {
            if (slot.state != Slot::orphaned && slot.state != Slot::flying) continue;
            slot.state = slot.state == Slot::orphaned ? Slot::free : Slot::waiting;
            slot.since = now_ns();
        }
    }

    static constexpr int kReaped = 64;

    Worker &worker_;
    ReaderThreads &readers_;
    const UsrbioConfig *config_ = nullptr;
    ChannelHolder holder_;
    Slots slots_;
    Window window_;
    std::unique_ptr<Work> current_;  // being cut
    std::optional<RunCutter> cutter_;
    std::vector<Segment> cut_segments_;
    bool full_ = false;      // nothing can be begun now
    bool prepared_ = false;  // IOs that were not submitted
    bool closing_ = false;
    int64_t give_up_at_ = 0;
};

}  // namespace

void read_by_usrbio(Worker &worker) {
    RingReader reader(worker);
    while (reader.step()) continue;
}

}  // namespace el
