// A member's work: a thread that claims the blocks of its plans, has them read or waits for whoever reads them, and has
// what each plan wants copied.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "threads/sync.h"
#include "window/joining.h"
#include "window/shared_blocks.h"

namespace el {

class Sharing;

// Give a transfer back, cancelled if need be; false where something may still be written for it at `until`.
bool drop_transfer(el_transfer *transfer, int64_t until);

// A plan under way. Guarded by the mutex of its Sharing, but for what only the member's thread touches (the blocks).
struct SharedTransfer {
    SharedTransfer(std::shared_ptr<Sharing> owner) : sharing(std::move(owner)) {}

    const std::shared_ptr<Sharing> sharing;
    std::vector<el_file> files;
    BlockPlan plan;
    int32_t device = -1;
    uint64_t stream = 0;

    uint64_t next = 0;     // the first block that is pending
    uint64_t active = 0;   // blocks that are neither pending nor over
    uint64_t copying = 0;  // of these, those whose copies may write to destinations
    uint64_t asked = 0;    // of these, those that the caller was asked to read
    bool stop = false;     // cancelled, or failed
    bool over = false;     // nothing will be written any more
    uint64_t bytes_done = 0;
    std::vector<el_extent> left;
    el_failure_info failure{};
};

class Sharing : public std::enable_shared_from_this<Sharing> {
  public:
    explicit Sharing(const el_window_config &config);
    ~Sharing();
    Sharing(const Sharing &) = delete;
    Sharing &operator=(const Sharing &) = delete;

    int start(const el_window_config &config);
    void close();
    int submit(std::shared_ptr<SharedTransfer> transfer);
    int wait(SharedTransfer &transfer, int64_t timeout_ms);
    int cancel(SharedTransfer &transfer, int64_t timeout_ms);
    int next_read(int64_t timeout_ms, el_window_read &out);
    int answer(uint32_t number, bool complete);
    void look(el_window_stats &out);

    Mutex mutex;
    uint64_t slot_bytes() const { return slot_bytes_; }
    uint32_t generation() const { return generation_; }

  private:
    using State = SharedBlock::State;
    struct Active {
        std::shared_ptr<SharedTransfer> transfer;
        SharedBlock *block;
    };
    struct Pulled {
        el_window_read read;
        bool taken = false;
        bool answered = false;
        bool complete = false;
    };

    static void *run(void *self);
    void work();
    bool step();
    bool take_new();
    bool go_on(Active &active);
    bool go_on_reading(Active &active);
    bool go_on_copying(Active &active);
    bool go_on_waiting(Active &active);
    bool claim_more();
    bool begin(const std::shared_ptr<SharedTransfer> &transfer, SharedBlock &block);
    bool begin_reading(SharedTransfer &transfer, SharedBlock &block);
    bool begin_copying(SharedTransfer &transfer, SharedBlock &block);
    void leave_over(SharedTransfer &transfer, SharedBlock &block);
    void unpin(const Claim &claim);
    void fail(SharedTransfer &transfer, const el_failure_info &failure);
    void end_if_over(SharedTransfer &transfer);
    void ring_own_bell();
    void has_room();
    void note_wait(int64_t ns);
    void note_reading(const SharedBlock &block, bool begun);
    bool is_busy() const;
    bool read_is_over(SharedBlock &block, bool &complete, el_failure_info &failure);
    void drop_reading(SharedBlock &block, int64_t until);
    bool drop_all();

    NodeWindow &window() { return member_->window(); }

    std::unique_ptr<Membership> member_;  // null once it has been left; the mutex guards that
    const uint32_t generation_;
    el_readers *const reads_;
    el_readers *const copies_;
    const uint32_t ahead_;
    const int64_t timeout_ns_;
    uint64_t slot_bytes_ = 0;
    pthread_t thread_{};
    bool running_ = false;

    // Guarded by the mutex.
    Condition ended_, requested_;
    std::deque<std::shared_ptr<SharedTransfer>> submitted_;
    std::map<uint32_t, Pulled> pulled_;
    uint32_t next_pulled_ = 1;
    bool closing_ = false;
    el_window_stats stats_{};

    // Of the member's thread.
    std::deque<std::shared_ptr<SharedTransfer>> pending_;
    std::vector<Active> active_;
    uint32_t reading_ = 0, copying_ = 0;
    uint64_t reading_bytes_ = 0;
    std::vector<uint32_t> pins_;  // by slot: copies of this member under way
    uint64_t late_ = 0;  // bits of members that did not deliver in time
    int64_t full_since_ = 0, swept_ = 0;
    bool went_on_ = false;  // past a window that was full for too long
};

}  // namespace el
