// A block on its way to a device: runs are read into slots one behind the other, and copied from there while the next
// one is read.
#include "readers/reader_device.h"

#include "device/device_ring.h"
#include "readers/readers.h"
#include "core/transfer.h"

namespace el {
namespace {

constexpr uint64_t kSlotAlign = 4096;  // of the runs within a slot: direct reads want it

// A block whose copies have not all landed. It ends itself.
class Landing final : public Lander {
  public:
    Landing(DeviceRing &ring, Transfer &transfer, const Block &block) : ring_(ring), transfer_(transfer), block_(block) {}

    // Both before a launch; without the mutex, for nothing can have landed yet that would look at them.
    void launched() { flights_.fetch_add(1, std::memory_order_relaxed); }

    void landed(PinnedSlot &slot, bool complete, Lock &lock) override {
        ring_.give(slot);
        end_part(complete, lock);
    }

    // All that could be read is on its way.
    void read(bool complete, Lock &lock) { end_part(complete, lock); }

  private:
    void end_part(bool complete, Lock &lock) {
        failed_ |= !complete;
        if (flights_.fetch_sub(1, std::memory_order_relaxed) > 1) return;
        const bool copied = transfer_.files[block_.file].mode == EL_MEMORY;  // and read by somebody
        if (!failed_ && !copied) transfer_.readers.device_bytes += block_.bytes;
        const bool last = finish_block(transfer_, block_, !failed_);
        if (last) {
            lock.unlock();
            delete &transfer_;
            lock.lock();
        }
        delete this;
    }

    DeviceRing &ring_;
    Transfer &transfer_;
    const Block block_;
    std::atomic<uint32_t> flights_{1};  // and one for the reading
    bool failed_ = false;
};

class Stager {
  public:
    Stager(Reader reader, Landing &landing)
        : reader_(reader), ring_(*reader.transfer.device), landing_(landing),
          stream_(reader.worker.index % ring_.streams()) {}
    ~Stager() { launch(); }

    // Read a run and begin its copies.
    Outcome bring(const Run &run) {
        const uint64_t room = span_room(reader_, run);
        if (slot_ != nullptr && used_ + room > ring_.slot_bytes()) launch();
        if (slot_ == nullptr && !take(run)) return Outcome::stopped;
        char *span = slot_->memory + used_;
        const Outcome outcome = read_span(reader_, run, span);
        if (outcome != Outcome::done) return outcome;
        used_ += (room + kSlotAlign - 1) / kSlotAlign * kSlotAlign;
        const int error = ring_.copy(stream_, run, span);
        if (error != 0) return refused(run, error);
        return Outcome::done;
    }

  private:
    bool take(const Run &run) {
        slot_ = ring_.take(reader_, run);
        if (slot_ == nullptr) return false;
        used_ = 0;
        position_ = Position{run.file, run.extent, run.offset};
        const int error = ring_.begin(stream_, reader_.transfer);
        return error == 0 || refused(run, error) == Outcome::done;
    }

    Outcome refused(const Run &run, int error) {
        ring_.fail_copy(reader_.transfer, Position{run.file, run.extent, run.offset}, error);
        return Outcome::stopped;
    }

    // Also where a copy was refused: those before it are under way.
    void launch() {
        if (slot_ == nullptr) return;
        landing_.launched();
        ring_.launch(Flight{&reader_.transfer, &landing_, slot_, position_, stream_, 0});
        slot_ = nullptr;
    }

    const Reader reader_;
    DeviceRing &ring_;
    Landing &landing_;
    const uint32_t stream_;
    PinnedSlot *slot_ = nullptr;
    Position position_{};
    uint64_t used_ = 0;
};

Outcome bring_all(Reader reader, const Block &block, Landing &landing) {
    const int error = reader.transfer.device->enter();
    if (error != 0) {
        const Piece &first = reader.transfer.pieces[block.first_piece];
        reader.transfer.device->fail_copy(reader.transfer, Position{block.file, first.extent, first.offset}, error);
        return Outcome::stopped;
    }
    Stager stager(reader, landing);
    RunCutter cutter(reader.transfer, block, run_limits(reader, block), reader.worker.segments);
    Run run;
    while (cutter.next(run)) {
        const Outcome outcome = stager.bring(run);
        if (outcome != Outcome::done) return outcome;
    }
    return Outcome::done;
}

}  // namespace

void read_block_to_device(Reader reader, const Block &block) {
    auto *landing = new Landing(*reader.transfer.device, reader.transfer, block);
    const bool complete = bring_all(reader, block, *landing) == Outcome::done;
    Lock lock(reader.transfer.readers.mutex);
    reader.worker.transfer = nullptr;
    landing->read(complete, lock);
}

}  // namespace el
