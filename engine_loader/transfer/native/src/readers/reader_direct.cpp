// O_DIRECT reads: whole sectors, into aligned memory. Destinations rarely are aligned as the file is, so most bytes
// come through scratch memory; a copy from there is cheap beside a disk or a network.
#include "readers/readers.h"

#include <algorithm>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#ifndef STATX_DIOALIGN  // Linux 6.1
#define STATX_DIOALIGN 0x2000U
#endif

namespace el {
namespace {

// Where the destination is aligned as the file is, at least this much is worth a read straight into it.
constexpr uint64_t kStraightBytes = 64 << 10;

// The head of `struct statx` up to what we need, for headers older than the kernel.
struct StatxDirect {
    uint32_t mask;
    char unused[148];
    uint32_t memory_align;
    uint32_t offset_align;
    char rest[96];
};
static_assert(sizeof(StatxDirect) == 256, "the kernel's struct statx");

uint64_t down(uint64_t value, uint64_t unit) { return value - value % unit; }
uint64_t up(uint64_t value, uint64_t unit) { return down(value + unit - 1, unit); }

bool is_power_of_two(uint32_t value) { return value != 0 && (value & (value - 1)) == 0; }

// The sectors that hold a run.
struct Window {
    Window(const Run &run, uint32_t sector) : begin(down(run.offset, sector)), end(up(run.offset + run.span, sector)) {}
    uint64_t bytes() const { return end - begin; }
    uint64_t needed(const Run &run) const { return run.offset + run.span - begin; }
    uint64_t begin, end;
};

bool goes_straight(const File &file, const Run &run) {
    if (run.segments->size() != 1 || run.span < kStraightBytes) return false;
    if (file.straight_refused.load(std::memory_order_relaxed)) return false;
    return (run.segments->front().address - run.offset) % file.limits.memory == 0;
}

// The first and the last sector go to scratch memory where they are not wanted whole; all between goes straight.
Outcome read_straight(Reader reader, const Run &run, const Window &window, char *scratch) {
    const uint32_t sector = reader.transfer.files[run.file].limits.offset;
    const uint64_t head = window.begin < run.offset ? sector : 0;
    const uint64_t tail = window.end > run.offset + run.span ? sector : 0;
    char *destination = reinterpret_cast<char *>(run.segments->front().address);
    char *middle = destination + (window.begin + head - run.offset);
    const uint64_t middle_bytes = window.bytes() - head - tail;
    iovec vectors[3];
    size_t n = 0;
    if (head != 0) vectors[n++] = iovec{scratch, head};
    vectors[n++] = iovec{middle, middle_bytes};
    if (tail != 0) vectors[n++] = iovec{scratch + sector, tail};
    const Request request{run.file, run.extent, window.begin, vectors, n, window.needed(run), sector, true};
    const Outcome outcome = read_all(reader, request);
    if (outcome != Outcome::done) return outcome;
    if (head != 0) memcpy(destination, scratch + (run.offset - window.begin), head - (run.offset - window.begin));
    if (tail != 0) memcpy(middle + middle_bytes, scratch + sector, run.offset + run.span - (window.end - tail));
    reader.worker.counters.direct_straight_bytes.add(run.span);
    return Outcome::done;
}

Outcome read_window(Reader reader, const Run &run, const Window &window, char *memory) {
    const uint32_t sector = reader.transfer.files[run.file].limits.offset;
    iovec vector{memory, window.bytes()};
    const Request request{run.file, run.extent, window.begin, &vector, 1, window.needed(run), sector, true};
    return read_all(reader, request);
}

Outcome read_scratch(Reader reader, const Run &run, const Window &window, char *scratch) {
    const Outcome outcome = read_window(reader, run, window, scratch);
    if (outcome == Outcome::done) scatter(reader, run, scratch + (run.offset - window.begin));
    return outcome;
}

void count(Reader reader, const Run &run, const Window &window) {
    reader.worker.counters.direct_bytes.add(run.wanted);
    reader.worker.counters.overread_bytes.add(window.bytes() - run.wanted);
}

}  // namespace

bool find_direct_limits(int direct_fd, DirectLimits &limits) {
    StatxDirect info{};
    if (statx(direct_fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, reinterpret_cast<struct statx *>(&info)) != 0) return true;
    if ((info.mask & STATX_DIOALIGN) == 0) return true;  // unknown: the cautious default
    if (!is_power_of_two(info.offset_align) || !is_power_of_two(info.memory_align)) return false;
    if (info.offset_align > kLargestSector) return false;
    limits.offset = info.offset_align;
    limits.memory = info.memory_align;
    return true;
}

Outcome read_direct(Reader reader, const Run &run) {
    File &file = reader.transfer.files[run.file];
    const Window window(run, file.limits.offset);
    char *scratch = reader.worker.scratch.get(std::max<uint64_t>(window.bytes(), 2 * kLargestSector));
    if (scratch == nullptr) return Outcome::refused;  // memory is short: a buffered read needs none
    Outcome outcome = Outcome::refused;
    if (goes_straight(file, run)) {
        outcome = read_straight(reader, run, window, scratch);
        if (outcome == Outcome::refused) file.straight_refused.store(true, std::memory_order_relaxed);
    }
    if (outcome == Outcome::refused) outcome = read_scratch(reader, run, window, scratch);
    if (outcome == Outcome::done) count(reader, run, window);
    return outcome;
}

Outcome read_span_direct(Reader reader, const Run &run, char *&memory) {
    const File &file = reader.transfer.files[run.file];
    if (reinterpret_cast<uint64_t>(memory) % file.limits.memory != 0) return Outcome::refused;
    const Window window(run, file.limits.offset);
    const Outcome outcome = read_window(reader, run, window, memory);
    if (outcome != Outcome::done) return outcome;
    count(reader, run, window);
    memory += run.offset - window.begin;
    return Outcome::done;
}

}  // namespace el
