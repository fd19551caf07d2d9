#include "window/node_window.h"

#include <errno.h>
#include <fcntl.h>
#include <new>
#include <sys/mman.h>
#include <sys/stat.h>

namespace el {
namespace {

constexpr uint64_t kMostSlots = 16384;

uint64_t up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

uint64_t described_bytes(uint32_t slots) { return up(sizeof(WindowHeader) + slots * sizeof(WindowSlot), kWindowAlign); }

void make_robust(pthread_mutex_t &mutex) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
}

void *map(int fd, uint64_t bytes, int protection) {
    void *memory = mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

uint32_t count(uint64_t bits) { return static_cast<uint32_t>(__builtin_popcountll(bits)); }

bool holds_block(SlotState state) { return state == SlotState::reading || state == SlotState::ready; }

}  // namespace

// Holds the window's lock, where it can be had in time: a member may have been stopped while it held it.
class NodeWindow::Hold {
  public:
    explicit Hold(NodeWindow &window) : window_(window) {
        if (window.broken_) return;
        timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        const int64_t ns = until.tv_nsec + window.patience_ns_;
        until.tv_sec += static_cast<time_t>(ns / 1000000000);
        until.tv_nsec = static_cast<long>(ns % 1000000000);
        int error = pthread_mutex_timedlock(&window.header_->mutex, &until);
        // Every step leaves the slots such that the next one can be taken from there.
        if (error == EOWNERDEAD) error = pthread_mutex_consistent(&window.header_->mutex);
        held_ = error == 0;
        window.broken_ = !held_;
    }
    ~Hold() {
        if (held_) pthread_mutex_unlock(&window_.header_->mutex);
    }
    Hold(const Hold &) = delete;
    Hold &operator=(const Hold &) = delete;
    explicit operator bool() const { return held_; }

  private:
    NodeWindow &window_;
    bool held_ = false;
};

int NodeWindow::format(int fd, uint64_t bytes, uint64_t slot_bytes) {
    if (slot_bytes == 0 || slot_bytes % kWindowAlign != 0 || bytes / slot_bytes == 0) return EINVAL;
    const auto slots = static_cast<uint32_t>(bytes / slot_bytes < kMostSlots ? bytes / slot_bytes : kMostSlots);
    const uint64_t described = described_bytes(slots);
    const uint64_t all = described + slots * slot_bytes;
    if (ftruncate(fd, static_cast<off_t>(all)) != 0) return errno;
    // Nobody can take pages away under those who have them mapped.
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) return errno;
    void *memory = map(fd, described, PROT_READ | PROT_WRITE);
    if (memory == nullptr) return errno;
    auto *header = new (memory) WindowHeader{};
    header->bytes = all;
    header->slot_bytes = slot_bytes;
    header->slots_at = described;
    header->slots = slots;
    make_robust(header->mutex);
    for (WindowMember &member : header->members) make_robust(member.alive);
    header->magic = kWindowMagic + sizeof(WindowHeader) + sizeof(WindowSlot);
    munmap(memory, described);
    return 0;
}

int NodeWindow::attach(int fd) {
    const int seals = fcntl(fd, F_GET_SEALS);
    struct stat status;
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || fstat(fd, &status) != 0) return EPROTO;
    const auto bytes = static_cast<uint64_t>(status.st_size);
    if (bytes < sizeof(WindowHeader)) return EPROTO;
    void *first = map(fd, sizeof(WindowHeader), PROT_READ);
    if (first == nullptr) return errno;
    const auto *seen = static_cast<const WindowHeader *>(first);
    const uint32_t slots = seen->slots;
    const uint64_t described = described_bytes(slots);
    const bool fits = seen->magic == kWindowMagic + sizeof(WindowHeader) + sizeof(WindowSlot) && seen->bytes == bytes &&
                      slots > 0 && slots <= kMostSlots && seen->slots_at == described &&
                      seen->slot_bytes == (bytes - described) / slots;
    munmap(first, sizeof(WindowHeader));
    if (!fits) return EPROTO;
    void *memory = map(fd, described, PROT_READ | PROT_WRITE);
    if (memory == nullptr) return errno;
    void *shared = map(fd, bytes, PROT_READ);
    if (shared == nullptr) {
        munmap(memory, described);
        return ENOMEM;
    }
    header_ = static_cast<WindowHeader *>(memory);
    slots_ = reinterpret_cast<WindowSlot *>(header_ + 1);
    shared_ = static_cast<const char *>(shared);
    described_ = described;
    fd_ = fd;
    return 0;
}

NodeWindow::~NodeWindow() {
    if (header_ == nullptr) return;
    const uint64_t bytes = header_->bytes;
    if (!keep_) {
        if (writable_ != nullptr) munmap(writable_, bytes);
        munmap(const_cast<char *>(shared_), bytes);
        munmap(header_, described_);
    }
    close(fd_);
}

int NodeWindow::enter() {
    Hold hold(*this);
    if (!hold) return ETIMEDOUT;
    for (uint32_t i = 0; i < kMembers; i++) {
        WindowMember &member = header_->members[i];
        if (member.number.load() != 0) continue;
        int error = pthread_mutex_trylock(&member.alive);
        if (error == EOWNERDEAD) error = pthread_mutex_consistent(&member.alive);
        if (error != 0) continue;
        member_ = i;
        bury(i);  // what one held that died while it entered or left
        member.wants_room = 0;
        member.delivered.store(0);
        member.heard = now_ns();
        member.interest = declared_;
        member.most.store(0);
        member.number.store(++header_->numbers);
        entered_ = true;
        const uint32_t present = members();
        for (WindowMember &each : header_->members) {
            if (each.number.load() != 0 && each.most.load() < present) each.most.store(present);
        }
        return 0;
    }
    return EUSERS;
}

void NodeWindow::leave() {
    if (!entered_) return;
    entered_ = false;
    WindowMember &member = header_->members[member_];
    {
        Hold hold(*this);
        if (hold) forget_member(member_);
    }
    // Without the lock the others find out by this one, as if the process had died.
    pthread_mutex_unlock(&member.alive);
}

WindowSlot *NodeWindow::find(const BlockKey &key) {
    for (uint32_t i = 0; i < header_->slots; i++) {
        if (holds_block(slots_[i].state.load()) && slots_[i].key == key) return &slots_[i];
    }
    return nullptr;
}

// The first free slot, so that no more memory is touched than is needed; else, of those that nobody here wants any more,
// the one that has been ready for longest.
WindowSlot *NodeWindow::room(bool &behind) {
    WindowSlot *oldest = nullptr;
    uint64_t active = 0;
    for (uint32_t i = 0; i < header_->slots; i++) {
        WindowSlot &slot = slots_[i];
        const SlotState state = slot.state.load();
        if (state == SlotState::free) return &slot;
        if (state != SlotState::ready || slot.pinned != 0) continue;
        if (oldest != nullptr && slot.finished >= oldest->finished) continue;
        if (active == 0) active = active_members() | bit();
        const uint64_t wanted = wanted_by(slot, active);
        // What it waits for already it will have had soon, whatever comes of this block.
        behind |= (wanted & ~slot.waiting & bit()) != 0;
        if (wanted == 0) oldest = &slot;
    }
    if (oldest != nullptr) {
        header_->evicted++;
        clear(*oldest);
    }
    return oldest;
}

void NodeWindow::clear(WindowSlot &slot) {
    slot.state.store(SlotState::free);
    ring_all(slot.waiting);
    slot.waiting = 0;
}

void NodeWindow::ring_all(uint64_t members) {
    for (uint32_t i = 0; i < kMembers; i++) {
        if ((members & ~bit()) >> i & 1) ring(header_->members[i].bell);
    }
}

void NodeWindow::ring_for_room() {
    for (uint32_t i = 0; i < kMembers; i++) {
        if (header_->members[i].wants_room != 0 && i != member_) ring(header_->members[i].bell);
    }
}

Got NodeWindow::want(const BlockKey &key, uint32_t expected, bool again, Claim &claim) {
    Hold hold(*this);
    if (!hold) return Got::broken;
    WindowMember &member = header_->members[member_];
    member.heard = now_ns();
    if (!again) member.interest.come_to(key);
    if (WindowSlot *found = find(key)) {
        member.interest.go_on_after(key);
        claim = Claim{static_cast<uint32_t>(found - slots_), found->claim.load()};
        if (found->state.load() == SlotState::ready) {
            found->pinned |= bit();
            found->waiting &= ~bit();
            return Got::ready;
        }
        found->waiting |= bit();
        return Got::busy;
    }
    bool behind = false;
    WindowSlot *slot = room(behind);
    const bool waits = slot == nullptr && !behind && may_get_room();
    if (!waits) {
        member.interest.go_on_after(key);
    } else if (!again) {
        member.interest.wait_at(key);  // else it makes room, when another has read it, before this one has seen it
    }
    if (slot == nullptr) return waits ? Got::full : Got::behind;
    slot->key = key;
    slot->owner = member_;
    slot->claim.store(++header_->claims);
    slot->had = slot->pinned = slot->waiting = 0;
    slot->expected = expected;
    slot->state.store(SlotState::reading);
    claim = Claim{static_cast<uint32_t>(slot - slots_), slot->claim.load()};
    return Got::mine;
}

Got NodeWindow::look(const Claim &claim) {
    Hold hold(*this);
    if (!hold) return Got::broken;
    WindowSlot &slot = slots_[claim.slot];
    if (slot.claim != claim.number) return Got::full;
    switch (slot.state.load()) {
        case SlotState::reading:
            slot.waiting |= bit();
            return Got::busy;
        case SlotState::ready:
            slot.pinned |= bit();
            slot.waiting &= ~bit();
            return Got::ready;
        default:
            return Got::full;
    }
}

bool NodeWindow::publish(const Claim &claim) {
    Hold hold(*this);
    if (!hold) return false;
    WindowSlot &slot = slots_[claim.slot];
    if (slot.claim != claim.number) return false;
    if (slot.state.load() == SlotState::abandoned) {
        clear(slot);
        ring_for_room();
        return false;
    }
    header_->members[member_].delivered.store(now_ns());
    slot.pinned |= bit();
    slot.finished = ++header_->finishes;
    slot.state.store(SlotState::ready);
    ring_all(slot.waiting);
    return true;
}

void NodeWindow::give_up(const Claim &claim) {
    Hold hold(*this);
    if (!hold || slots_[claim.slot].claim != claim.number) return;
    clear(slots_[claim.slot]);
    ring_for_room();
}

void NodeWindow::take_from(const Claim &claim) {
    Hold hold(*this);
    if (!hold) return;
    WindowSlot &slot = slots_[claim.slot];
    if (slot.claim != claim.number || slot.state.load() != SlotState::reading) return;
    header_->taken_over++;
    slot.state.store(SlotState::abandoned);
    ring_all(slot.waiting);
    slot.waiting = 0;
}

void NodeWindow::done(const Claim &claim) {
    Hold hold(*this);
    if (!hold) return;
    WindowSlot &slot = slots_[claim.slot];
    if (slot.claim != claim.number) return;
    slot.had |= bit();
    slot.pinned &= ~bit();
    release_if_had(slot);
}

void NodeWindow::forget(const Claim &claim) {
    Hold hold(*this);
    if (hold && slots_[claim.slot].claim == claim.number) slots_[claim.slot].waiting &= ~bit();
}

void NodeWindow::release_if_had(WindowSlot &slot) {
    if (slot.pinned != 0 || slot.waiting != 0) return;
    if (count(slot.had) >= slot.expected) clear(slot);
    ring_for_room();
}

// Take back what a member held that is no more.
void NodeWindow::bury(uint32_t member) {
    const uint64_t its = uint64_t{1} << member;
    for (uint32_t i = 0; i < header_->slots; i++) {
        WindowSlot &slot = slots_[i];
        const SlotState state = slot.state.load();
        if (state == SlotState::free || state == SlotState::lost) continue;
        slot.waiting &= ~its;
        slot.pinned &= ~its;
        if (state == SlotState::ready) {
            // Its number may be another rank's soon, which has had nothing yet.
            if ((slot.had & its) != 0 && slot.expected > 0) slot.expected--;
            slot.had &= ~its;
            release_if_had(slot);
            continue;
        }
        if (slot.owner != member) continue;
        header_->taken_over += state == SlotState::reading;
        slot.state.store(SlotState::lost);
        ring_all(slot.waiting);
        slot.waiting = 0;
    }
    header_->members[member].wants_room = 0;
}

// Who waits for room looks again: nothing waits for this member any more.
void NodeWindow::forget_member(uint32_t member) {
    bury(member);
    header_->members[member].number.store(0);
    ring_for_room();
}

uint32_t NodeWindow::sweep() {
    Hold hold(*this);
    if (!hold) return 0;
    header_->members[member_].heard = now_ns();
    uint32_t dead = 0;
    for (uint32_t i = 0; i < kMembers; i++) {
        WindowMember &member = header_->members[i];
        if (i == member_ || member.number.load() == 0) continue;
        int error = pthread_mutex_trylock(&member.alive);
        if (error == EBUSY) continue;
        if (error == EOWNERDEAD) error = pthread_mutex_consistent(&member.alive);
        if (error == 0) pthread_mutex_unlock(&member.alive);
        forget_member(i);
        dead++;
    }
    return dead;
}

void NodeWindow::want_room(bool wanted) {
    Hold hold(*this);
    if (hold) header_->members[member_].wants_room = wanted;
}

char *NodeWindow::for_writing(uint32_t slot) {
    if (writable_ == nullptr) writable_ = static_cast<char *>(map(fd_, header_->bytes, PROT_READ | PROT_WRITE));
    return writable_ == nullptr ? nullptr : writable_ + slots_offset(slot);
}

}  // namespace el
