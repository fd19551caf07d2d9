// The data of the reader threads: what a transfer, a block and a worker are, and which lock guards what.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <stddef.h>
#include <sys/uio.h>
#include <vector>

#include "device/device_runtime.h"
#include "core/c_interface.h"
#include "memory/fresh_pages.h"
#include "memory/memory.h"
#include "core/stats.h"
#include "threads/bell.h"
#include "threads/pace.h"
#include "threads/sync.h"

namespace el {

struct UsrbioConfig;
class DeviceRing;

// Where in the files something went wrong.
struct Position {
    uint32_t file;
    uint32_t extent;
    uint64_t offset;
};

// A part of an extent that is read as part of one block: whole rows, or a range of bytes of one row.
struct Piece {
    uint64_t offset;
    uint64_t address;
    uint64_t row_bytes;
    uint64_t src_stride;
    uint64_t dst_stride;
    uint32_t rows;
    uint32_t extent;

    uint64_t bytes() const { return uint64_t{rows} * row_bytes; }
};

// What a thread takes at a time: pieces near each other in one file.
struct Block {
    uint64_t offset;  // of the first piece
    uint64_t bytes;   // wanted ones
    uint32_t first_piece;
    uint32_t pieces;
    uint32_t file;
};

// Which alignments a file's O_DIRECT wants.
struct DirectLimits {
    uint32_t offset = 4096;
    uint32_t memory = 4096;
};

struct File {
    int fd = -1;
    int direct_fd = -1;
    uint64_t size = 0;
    uint32_t mode = EL_BUFFERED;
    bool wide = false;
    bool remote = false;
    DirectLimits limits;
    const UsrbioConfig *usrbio = nullptr;
    const char *memory = nullptr;  // EL_MEMORY
    // The file system said EINVAL: to reads straight into destinations, to any direct read.
    std::atomic<bool> straight_refused{false};
    std::atomic<bool> direct_refused{false};
    std::atomic<uint64_t> read_ns{0};  // in its reads, summed over the threads
    std::atomic<uint64_t> read_bytes{0};

    void count(int64_t ns, uint64_t bytes) {
        read_ns.fetch_add(static_cast<uint64_t>(ns), std::memory_order_relaxed);
        read_bytes.fetch_add(bytes, std::memory_order_relaxed);
    }
};

// The largest read of a file, but for rows that stay whole.
inline uint64_t largest_block(const el_config &config, const File &file) {
    return file.mode == EL_BUFFERED || file.mode == EL_MEMORY || file.remote ? config.block_bytes : config.direct_block_bytes;
}

// Blocks in the order in which they are taken. Narrow ones are taken by the first `threads` workers only.
struct Lane {
    std::vector<uint32_t> blocks;
    size_t next = 0;

    bool empty() const { return next == blocks.size(); }
    uint32_t head() const { return blocks[next]; }
};

enum class Phase { active, done, failed };

struct ReaderThreads;

// Somebody who waits for an extent, or (-1) for the end of a transfer; it lies on the stack of the waiting thread. Each is
// woken for what it waits for only: where all cores copy bytes, a thread that wakes up for nothing stops one of them.
struct Waiter {
    int64_t extent;
    Waiter *next = nullptr;
    Condition condition;
};

// One submitted plan. Everything is guarded by the mutex of the ReaderThreads, but for what never changes after submit
// (the first group) and `stop`.
struct Transfer {
    explicit Transfer(ReaderThreads &owner);
    ~Transfer();
    Transfer(const Transfer &) = delete;
    Transfer &operator=(const Transfer &) = delete;

    ReaderThreads &readers;
    std::unique_ptr<File[]> files;
    uint32_t n_files = 0;
    std::vector<Piece> pieces;
    std::vector<Block> blocks;
    uint64_t n_extents = 0;
    DeviceRing *device = nullptr;  // on which the destinations are
    OwnedEvent ready;              // of the destinations' owner; copies come after it

    Destinations destinations;  // in memory of the CPU; its own lock guards it

    std::atomic<bool> stop{false};  // workers look at it between system calls

    Lane narrow, wide, rings;
    std::vector<uint64_t> remaining;   // bytes that each extent waits for
    std::vector<uint32_t> completed;   // extents in order of completion
    uint64_t bytes_done = 0;
    uint32_t in_flight = 0;            // blocks that workers hold
    uint32_t references = 1;           // the caller's handle; the threads', while it is not quiet
    Phase phase = Phase::active;
    bool quiet = false;                // ended, and no worker touches it any more
    el_failure_info failure{};
    uint32_t retries = 0;
    el_failure_info retried{};         // the first of these
    Waiter *waiters = nullptr;
    Bell *bell = nullptr;              // rung when more extents are complete, and at the end
    uint32_t urgency = 0;              // those of more go before others that were submitted earlier
};

constexpr size_t kMaxSegments = 8192;
constexpr size_t kMaxVectors = 1024;  // IOV_MAX of Linux
constexpr size_t kDiscardBytes = 32 << 10;
constexpr size_t kGapVectors = 16;  // so many times kDiscardBytes is the longest gap that is read through

// Where a part of a run goes: `bytes` at `at` bytes from the run's offset to `address`.
struct Segment {
    uint64_t address;
    uint32_t at;
    uint32_t bytes;
};

// One reader thread and its memory. Its transfer is guarded by the mutex of the ReaderThreads; io_* may be looked at by
// anyone, and say which system call it is in (io_since 0: none), so that a waiter can recognise a stuck read.
struct Worker {
    Worker(ReaderThreads &owner, uint32_t number) : readers(owner), index(number) {
        segments.reserve(kMaxSegments);
        vectors.resize(kMaxVectors);
        discard.resize(kDiscardBytes);
    }

    ReaderThreads &readers;
    uint32_t index;
    bool ring = false;  // reads by USRBIO, and nothing else
    pthread_t thread{};
    Transfer *transfer = nullptr;
    std::atomic<int64_t> io_since{0};
    std::atomic<uint64_t> io_offset{0};
    std::atomic<uint32_t> io_file{0};
    std::atomic<uint32_t> io_extent{0};
    std::vector<Segment> segments;
    std::vector<iovec> vectors;
    std::vector<char> discard;  // where the bytes between wanted ones go
    Scratch scratch;
    Counters counters;
};

struct ReaderThreads {
    explicit ReaderThreads(const el_config &settings);
    ~ReaderThreads();

    const el_config config;
    const uint32_t generation;  // of the process; see fork.h
    std::atomic<uint32_t> references{1};  // the handle, every transfer, every running worker

    Mutex mutex;  // guards what follows
    std::vector<uint32_t> cpus;  // that threads are started on; anywhere when empty
    Condition narrow_work, wide_work, ring_work;
    std::vector<std::unique_ptr<const UsrbioConfig>> usrbio;  // only grows, as files point at them
    std::vector<std::unique_ptr<DeviceRing>> devices;         // only grows, as transfers point at them
    Condition stopped;  // a transfer was stopped: end pauses between tries
    Condition ended;    // a worker ended
    std::deque<Transfer *> queue;  // those with blocks that nobody took yet, first come first served
    std::vector<Transfer *> active;  // those that are not quiet
    std::vector<std::unique_ptr<Worker>> workers;
    Pace pace;  // of the plain workers
    uint32_t plain_workers = 0, ring_workers = 0;  // of the workers
    uint32_t running = 0;  // threads, those of devices counted
    uint32_t landing = 0;  // threads of devices
    bool closing = false;
    bool joined = false;
    uint64_t wait_ns = 0;
    uint64_t device_bytes = 0;  // that have landed
};

void unreference(ReaderThreads &readers);

}  // namespace el
