// The window: memory that the ranks of a node share, in which each block of a file that several of them want is read by
// one. This is what lies in it, and the steps of a block's life. Nothing here waits for another rank but for the lock,
// and that with a limit.
#pragma once

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "threads/bell.h"
#include "threads/sync.h"

namespace el {

constexpr uint32_t kMembers = 64;
constexpr uint64_t kWindowMagic = 0x32776f646e69776cULL;  // changes with the layout: others make a window of their own
constexpr uint64_t kWindowAlign = 4096;                   // O_DIRECT wants it

// Which bytes a block has: a file as it is now (its device, number, size and time, hashed), and where in it.
struct BlockKey {
    uint64_t file[2];
    uint64_t offset;
    uint64_t bytes;

    bool operator==(const BlockKey &other) const {
        return file[0] == other.file[0] && file[1] == other.file[1] && offset == other.offset && bytes == other.bytes;
    }
};

enum class SlotState : uint32_t {
    free = 0,
    reading,    // its owner reads the block into it
    ready,      // all bytes are there
    abandoned,  // others no longer wait for its owner, who may still write to it and gives it back then
    lost,       // its owner died while reading: a read in the kernel may still write to it, so it is never used again
};

struct WindowSlot {
    std::atomic<SlotState> state;  // set last, so that a death between two steps leaves the slot as it was
    uint32_t owner;                // number of the member that reads it
    BlockKey key;
    std::atomic<uint64_t> claim;  // which claim of the slot this is; never the same twice
    uint64_t finished;  // when it became ready, in the order of all
    uint64_t had;       // bits of the members that have copied what they want of it
    uint64_t pinned;    // of those that copy from it now
    uint64_t waiting;   // of those that want to hear when it changes, or have not taken it since it became ready
    uint32_t expected;  // so many members will want it
    uint32_t unused;
};

// Which files a member reads, and how far it is. Files share bits, seldom.
struct Interest {
    static constexpr uint64_t kBits = 8192;

    uint64_t declared[kBits / 64];
    uint64_t passed[kBits / 64];
    uint64_t file[2];  // that it reads now
    uint64_t from;     // what begins there or later in that file it has still to come to

    static bool has(const uint64_t *bits, const uint64_t *file) { return bits[file[0] % kBits / 64] >> file[0] % 64 & 1; }
    static void set(uint64_t *bits, const uint64_t *file, bool value) {
        uint64_t &word = bits[file[0] % kBits / 64];
        const uint64_t bit = uint64_t{1} << file[0] % 64;
        word = value ? word | bit : word & ~bit;
    }
    void declare(const uint64_t (*files)[2], uint32_t n) {
        for (uint32_t i = 0; i < n; i++) set(declared, files[i], true);
    }
    bool is_at(const BlockKey &key) const { return file[0] == key.file[0] && file[1] == key.file[1]; }
    void come_to(const BlockKey &key) {
        if (!is_at(key)) {
            set(passed, file, true);
            set(passed, key.file, false);
            memcpy(file, key.file, sizeof file);
        }
        from = key.offset + 1;
    }
    // There was no room for a block that it came to.
    void wait_at(const BlockKey &key) { from = key.offset; }
    void go_on_after(const BlockKey &key) {
        if (is_at(key) && from == key.offset) from++;
    }
    // Ranks go through the files in the order of their plans.
    bool has_to_come_to(const BlockKey &key) const {
        if (is_at(key)) return key.offset >= from;
        return has(declared, key.file) && !has(passed, key.file);
    }
};

// A rank. `alive` is locked by a thread of its process as long as that lives.
struct WindowMember {
    pthread_mutex_t alive;
    std::atomic<uint64_t> number;  // 0: nobody
    std::atomic<int64_t> delivered;  // when it last read a block for all; CLOCK_MONOTONIC, ns
    int64_t heard;  // when it last asked for anything
    Interest interest;
    Bell bell;
    uint32_t wants_room;  // wants to hear when a slot becomes free
    std::atomic<uint32_t> most;  // members that were there at once, since this one came
};

struct WindowHeader {
    uint64_t magic;
    uint64_t bytes;  // of all
    uint64_t slot_bytes;
    uint64_t slots_at;  // where the slots' memory begins
    uint32_t slots;
    uint32_t unused;
    pthread_mutex_t mutex;  // guards all that follows; robust
    uint64_t claims, finishes, numbers;
    uint64_t taken_over, evicted;  // counts, for the account
    WindowMember members[kMembers];
};

struct Claim {
    uint32_t slot = 0;
    uint64_t number = 0;
};

enum class Got {
    mine,    // to be read by the caller now
    busy,    // another member reads it
    ready,   // there, and pinned
    full,    // all slots hold what others still want
    behind,  // the same, and this member is one of them, or nobody is left who could make room: it is not to wait
    broken,  // the lock cannot be had in time
};

// A member's view of the window. The memory is a memfd that nobody can resize. For several threads, one at a time.
class NodeWindow {
  public:
    // Both keep the descriptor only when they succeed (0); else an errno, EPROTO for a window of another layout.
    static int format(int fd, uint64_t bytes, uint64_t slot_bytes);
    int attach(int fd);
    ~NodeWindow();
    NodeWindow() = default;
    NodeWindow(const NodeWindow &) = delete;
    NodeWindow &operator=(const NodeWindow &) = delete;

    // By the thread that will call leave(), and lives till then; an errno.
    int enter();
    void leave();
    // A read may still write to a slot: the memory stays mapped for as long as the process lives.
    void keep_mapped() { keep_ = true; }

    void patience(int64_t ns) { patience_ns_ = ns; }
    // Before enter(): the files that this member will read. Blocks of others do not wait for it.
    void declare(const uint64_t (*files)[2], uint32_t n) { declared_.declare(files, n); }
    // `again`: it was wanted before, and what comes after it, too.
    Got want(const BlockKey &key, uint32_t expected, bool again, Claim &claim);
    // Whether another member still reads what it claimed, without the lock.
    bool still_busy(const Claim &claim) const {
        const WindowSlot &slot = slots_[claim.slot];
        return slot.state.load(std::memory_order_acquire) == SlotState::reading && slot.claim.load() == claim.number;
    }
    // What has become of a claim of another member that was busy; `full` where the block has to be wanted again.
    Got look(const Claim &claim);
    // The caller has read it: it is pinned for the caller. False where others gave it up meanwhile, or the lock is lost.
    bool publish(const Claim &claim);
    void give_up(const Claim &claim);  // the caller could not read it
    void take_from(const Claim &claim);  // another member does not deliver: whoever wants the block may claim it
    void done(const Claim &claim);     // the caller has copied what it wants
    void forget(const Claim &claim);   // it does not wait for it any more
    // Take back what dead members hold; returns how many were found dead.
    uint32_t sweep();
    void want_room(bool wanted);

    uint64_t slot_bytes() const { return header_->slot_bytes; }
    uint32_t slots() const { return header_->slots; }
    uint64_t bytes() const { return header_->bytes; }
    uint64_t slots_offset(uint32_t slot) const { return header_->slots_at + slot * header_->slot_bytes; }
    const char *for_reading() const { return shared_; }
    // The memory of a slot that was claimed; null where it cannot be mapped. Who never claims has none that it can write to.
    char *for_writing(uint32_t slot);
    Bell &bell() { return header_->members[member_].bell; }
    uint32_t owner_of(const Claim &claim) const { return slots_[claim.slot].owner; }
    int64_t delivered(uint32_t member) const { return header_->members[member % kMembers].delivered.load(); }
    bool is_ours(const Claim &claim) const { return owner_of(claim) == member_; }
    uint32_t members() const {
        uint32_t n = 0;
        for (const WindowMember &member : header_->members) n += member.number.load() != 0;
        return n;
    }
    uint32_t most_members() const { return header_->members[member_].most.load(); }
    uint64_t taken_over() const { return header_->taken_over; }
    uint64_t evicted() const { return header_->evicted; }
    int fd() const { return fd_; }
    bool broken() const { return broken_.load(); }

  private:
    class Hold;
    WindowSlot *find(const BlockKey &key);
    WindowSlot *room(bool &behind);
    // Whether a slot may yet become free. What a member holds is taken back when it leaves or is found dead, but for what
    // a read may still be written to.
    bool may_get_room() const {
        uint32_t lost = 0;
        for (uint32_t i = 0; i < header_->slots; i++) lost += slots_[i].state.load() == SlotState::lost;
        return lost < header_->slots;
    }
    // Which of these members have not had a block that they may want.
    uint64_t wanted_by(const WindowSlot &slot, uint64_t members) const {
        uint64_t wanted = slot.waiting & members;
        for (uint64_t left = members & ~(slot.had | wanted); left != 0; left &= left - 1) {
            const auto member = static_cast<uint32_t>(__builtin_ctzll(left));
            if (header_->members[member].interest.has_to_come_to(slot.key)) wanted |= uint64_t{1} << member;
        }
        return wanted;
    }
    // Bits of the members that are there. Who has asked for nothing for long keeps no memory from others.
    uint64_t active_members() const {
        const int64_t since = now_ns() - patience_ns_;
        uint64_t active = 0;
        for (uint32_t i = 0; i < kMembers; i++) {
            const WindowMember &member = header_->members[i];
            if (member.number.load() != 0 && member.heard >= since) active |= uint64_t{1} << i;
        }
        return active;
    }
    void clear(WindowSlot &slot);
    void release_if_had(WindowSlot &slot);
    void ring_all(uint64_t members);
    void ring_for_room();
    void bury(uint32_t member);
    void forget_member(uint32_t member);
    uint64_t bit() const { return uint64_t{1} << member_; }

    int fd_ = -1;
    WindowHeader *header_ = nullptr;  // and what describes the slots; writable
    WindowSlot *slots_ = nullptr;
    const char *shared_ = nullptr;  // all of the window, read-only
    char *writable_ = nullptr;      // all of it, once something was claimed
    uint64_t described_ = 0;        // bytes of the header and the slots' descriptions
    Interest declared_{};
    uint32_t member_ = 0;
    bool entered_ = false;
    bool keep_ = false;
    std::atomic<bool> broken_{false};
    int64_t patience_ns_ = 2000000000;
};

}  // namespace el
