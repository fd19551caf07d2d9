// Random plans over files, and reads that fail: what the drivers of the native library share.
//
// The library is compiled with its preadv replaced by faulty_preadv.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <random>
#include <string>
#include <sys/uio.h>
#include <unistd.h>
#include <vector>

#include "core/c_interface.h"

namespace {

std::atomic<unsigned> calls{0}, error_every{0}, short_every{0}, pause_every{0};

#define CHECK(condition)                                                                                  \
    do {                                                                                                  \
        if (!(condition)) {                                                                               \
            std::fprintf(stderr, "%s:%d: not so: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
            std::abort();                                                                                 \
        }                                                                                                 \
    } while (0)

using Random = std::mt19937_64;

uint64_t below(Random &random, uint64_t n) { return n == 0 ? 0 : random() % n; }

struct TestFile {
    std::string content;
    int fd = -1;
    int direct_fd = -1;
};

TestFile make_file(const std::string &path, uint64_t bytes, Random &random) {
    TestFile file;
    file.content.resize(bytes);
    for (char &c : file.content) c = static_cast<char>(random());
    const int out = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
    CHECK(out >= 0 && write(out, file.content.data(), bytes) == static_cast<ssize_t>(bytes));
    CHECK(fsync(out) == 0 && close(out) == 0);
    file.fd = open(path.c_str(), O_RDONLY);
    file.direct_fd = open(path.c_str(), O_RDONLY | O_DIRECT);
    CHECK(file.fd >= 0);
    return file;
}

// A plan over the files, and what its memory, full of x before, must hold afterwards.
struct Plan {
    std::vector<el_file> files;
    std::vector<el_extent> extents;  // their addresses count from 0 until place_at
    std::vector<char> expected;

    void place_at(const void *memory) {
        for (el_extent &e : extents) e.address += reinterpret_cast<uint64_t>(memory);
    }
};

void add_extent(Plan &plan, const std::vector<TestFile> &files, Random &random) {
    el_extent e{};
    e.file = static_cast<uint32_t>(below(random, files.size()));
    const uint64_t size = files[e.file].content.size();
    e.offset = below(random, size);
    const uint64_t room = size - e.offset;
    e.rows = below(random, 3) == 0 ? static_cast<uint32_t>(1 + below(random, 40)) : 1;
    e.row_bytes = below(random, room / e.rows + 1);
    const uint64_t spare = e.rows > 1 ? (room - e.row_bytes) / (e.rows - 1) : 0;
    e.src_stride = below(random, spare + 1);
    e.dst_stride = e.row_bytes + below(random, 3) * below(random, 200);
    e.address = plan.expected.size() + below(random, 100);
    plan.expected.resize(e.address + e.dst_stride * e.rows + 1, 'x');
    for (uint64_t row = 0; row < e.rows; row++) {
        const char *from = files[e.file].content.data() + e.offset + row * e.src_stride;
        std::memcpy(plan.expected.data() + e.address + row * e.dst_stride, from, e.row_bytes);
    }
    plan.extents.push_back(e);
}

[[maybe_unused]] Plan make_plan(const std::vector<TestFile> &files, Random &random) {
    Plan plan;
    for (const TestFile &file : files) {
        const bool direct = file.direct_fd >= 0;
        const auto mode = static_cast<uint32_t>(direct ? below(random, 3) : 0);
        plan.files.push_back(el_file{file.fd, file.direct_fd, file.content.size(), mode, static_cast<uint32_t>(below(random, 2)), nullptr});
        if (direct) plan.files.back().flags |= static_cast<uint32_t>(el_direct_flags(file.direct_fd));
    }
    for (uint64_t n = 1 + below(random, 60); n > 0; n--) add_extent(plan, files, random);
    return plan;
}

// Every row of the extent is what it must be.
void check_extent(const Plan &plan, const el_extent &e, const char *memory) {
    const char *to = reinterpret_cast<const char *>(e.address);
    const char *expected = plan.expected.data() + (to - memory);
    for (uint64_t row = 0; row < e.rows; row++) {
        CHECK(std::memcmp(to + row * e.dst_stride, expected + row * e.dst_stride, e.row_bytes) == 0);
    }
}

// Extents that are complete must hold their bytes even while others are being read.
[[maybe_unused]] void check_completed(el_transfer *transfer, const Plan &plan, const char *memory) {
    std::vector<uint32_t> done(plan.extents.size());
    const uint64_t n = el_completed(transfer, 0, done.data(), done.size());
    for (uint64_t i = 0; i < n; i++) check_extent(plan, plan.extents[done[i]], memory);
}

el_config random_config(Random &random) {
    el_config config{};
    config.struct_bytes = sizeof config;
    config.flags = below(random, 4) == 0 ? EL_ALWAYS_HUGE_PAGES : EL_HUGE_PAGES;
    config.threads = static_cast<uint32_t>(1 + below(random, 3));
    config.wide_threads = static_cast<uint32_t>(1 + below(random, 5));
    config.most_wide_threads = config.wide_threads + static_cast<uint32_t>(below(random, 12));
    config.max_tries = 4;
    config.retry_base_ms = 1;
    config.deadline_ms = 60000;
    config.block_bytes = uint64_t{4096} << below(random, 9);
    config.direct_block_bytes = uint64_t{4096} << below(random, 9);
    config.gap_bytes = 1 + below(random, 5000);
    config.wide_gap_bytes = 1 + below(random, 100000);
    return config;
}

void set_faults(Random &random) {
    error_every = below(random, 3) == 0 ? static_cast<unsigned>(1 + below(random, 10)) : 0;
    short_every = below(random, 3) == 0 ? static_cast<unsigned>(1 + below(random, 5)) : 0;
    pause_every = below(random, 4) == 0 ? static_cast<unsigned>(1 + below(random, 5)) : 0;
}

}  // namespace

extern "C" ssize_t faulty_preadv(int fd, const struct iovec *vectors, int n, off_t offset);

ssize_t faulty_preadv(int fd, const struct iovec *vectors, int n, off_t offset) {
    const unsigned call = ++calls;
    const auto due = [call](unsigned every) { return every != 0 && call % every == 0; };
    if (due(pause_every)) usleep(500);
    if (due(error_every)) {
        errno = call % 2 == 0 ? EIO : EINTR;
        return -1;
    }
    const bool direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
    if (!due(short_every)) return preadv(fd, vectors, n, offset);
    if (!direct && n > 1) return preadv(fd, vectors, 1 + static_cast<int>(call % static_cast<unsigned>(n)), offset);
    const ssize_t got = preadv(fd, vectors, n, offset);
    return got > 1 ? 1 + static_cast<ssize_t>(call) % got : got;
}
