// Exercises the native engine under the sanitizers: random plans against plain reads, with faults, cancels, closes in
// mid-flight and several threads that submit. The engine is compiled with its preadv replaced by faulty_preadv.
//
// driver FOLDER ROUNDS SEED: exits with 0 when everything was right.
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "engine.h"

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

// A plan over the files with the memory it fills, and what that must hold afterwards.
struct Plan {
    std::vector<el_file> files;
    std::vector<el_extent> extents;
    std::vector<char> memory, expected;
};

void add_extent(Plan &plan, const std::vector<TestFile> &files, Random &random, std::vector<uint64_t> &places) {
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
    places.push_back(plan.memory.size() + below(random, 100));
    plan.memory.resize(places.back() + e.dst_stride * e.rows, 'x');
    plan.extents.push_back(e);
}

Plan make_plan(const std::vector<TestFile> &files, Random &random) {
    Plan plan;
    for (const TestFile &file : files) {
        const bool direct = file.direct_fd >= 0;
        const auto mode = static_cast<uint32_t>(direct ? below(random, 3) : 0);
        plan.files.push_back(el_file{file.fd, file.direct_fd, file.content.size(), mode, static_cast<uint32_t>(below(random, 2))});
    }
    std::vector<uint64_t> places;
    const uint64_t n = 1 + below(random, 60);
    for (uint64_t i = 0; i < n; i++) add_extent(plan, files, random, places);
    plan.expected = plan.memory;
    for (uint64_t i = 0; i < n; i++) {
        el_extent &e = plan.extents[i];
        e.address = reinterpret_cast<uint64_t>(plan.memory.data() + places[i]);
        for (uint64_t row = 0; row < e.rows; row++) {
            const char *from = files[e.file].content.data() + e.offset + row * e.src_stride;
            std::memcpy(plan.expected.data() + places[i] + row * e.dst_stride, from, e.row_bytes);
        }
    }
    return plan;
}

el_config random_config(Random &random) {
    el_config config{};
    config.struct_bytes = sizeof config;
    config.flags = EL_HUGE_PAGES;
    config.threads = static_cast<uint32_t>(1 + below(random, 3));
    config.wide_threads = static_cast<uint32_t>(1 + below(random, 5));
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

el_transfer *submit(el_engine *engine, const Plan &plan, Random &random) {
    el_transfer *transfer = nullptr;
    const auto flags = static_cast<uint32_t>(below(random, 2) * EL_ORDERED);
    const int result = el_submit(engine, plan.files.data(), static_cast<uint32_t>(plan.files.size()), plan.extents.data(),
                                 plan.extents.size(), flags, &transfer);
    CHECK(result == EL_OK || result == EL_E_CLOSED);
    return transfer;
}

// Extents that are complete must hold their bytes even while others are being read.
void check_completed(el_transfer *transfer, const Plan &plan) {
    std::vector<uint32_t> done(plan.extents.size());
    const uint64_t n = el_completed(transfer, 0, done.data(), done.size());
    for (uint64_t i = 0; i < n; i++) {
        const el_extent &e = plan.extents[done[i]];
        const char *to = reinterpret_cast<const char *>(e.address);
        const char *expected = plan.expected.data() + (to - plan.memory.data());
        for (uint64_t row = 0; row < e.rows; row++) {
            CHECK(std::memcmp(to + row * e.dst_stride, expected + row * e.dst_stride, e.row_bytes) == 0);
        }
    }
}

void wait_and_check(el_transfer *transfer, const Plan &plan, Random &random) {
    const int fd = below(random, 2) == 0 ? el_event_fd(transfer) : -1;
    if (below(random, 2) == 0) el_wait(transfer, static_cast<int64_t>(below(random, plan.extents.size())), 1);
    check_completed(transfer, plan);
    const int result = el_wait(transfer, -1, -1);
    uint64_t events = 0;
    if (fd >= 0) CHECK(read(fd, &events, sizeof events) == sizeof events && events > 0);
    el_failure_info failure{};
    if (result == EL_OK) {
        CHECK(plan.memory == plan.expected);
        CHECK(el_failure(transfer, &failure) == EL_OK);
        return;
    }
    CHECK(result == EL_FAILED && el_failure(transfer, &failure) == EL_FAILED && failure.in_flight == 0);
    const bool injected = failure.error == EIO || failure.error == EINTR;
    CHECK(failure.kind == EL_FAIL_CANCELLED || (failure.kind == EL_FAIL_IO && injected));
    check_completed(transfer, plan);
}

void run_one(el_engine *engine, const std::vector<TestFile> &files, uint64_t seed) {
    Random random(seed);
    const Plan plan = make_plan(files, random);
    el_transfer *transfer = submit(engine, plan, random);
    if (transfer == nullptr) return;
    switch (below(random, 4)) {
        case 0:
            CHECK(el_cancel(transfer, -1) == EL_OK);
            check_completed(transfer, plan);
            break;
        case 1: {
            std::thread canceller([&] { el_cancel(transfer, static_cast<int64_t>(below(random, 3))); });
            el_wait(transfer, -1, 1);
            canceller.join();
            wait_and_check(transfer, plan, random);
            break;
        }
        default:
            wait_and_check(transfer, plan, random);
    }
    el_release(transfer);
}

void populate(el_engine *engine, const std::vector<TestFile> &files) {
    const std::string &content = files.front().content;
    void *mapped = mmap(nullptr, content.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE, files.front().fd, 0);
    CHECK(mapped != MAP_FAILED);
    for (const uint32_t how : {EL_POPULATE_READ, EL_POPULATE_WRITE, EL_MAKE_PRIVATE}) {
        el_transfer *transfer = nullptr;
        CHECK(el_populate(engine, reinterpret_cast<uint64_t>(mapped), content.size(), how, &transfer) == EL_OK);
        CHECK(el_wait(transfer, -1, -1) == EL_OK);
        CHECK(std::memcmp(mapped, content.data(), content.size()) == 0);
        el_release(transfer);
    }
    CHECK(munmap(mapped, content.size()) == 0);
}

// Several threads share an engine; sometimes it is closed under them.
void round(const std::vector<TestFile> &files, Random &random) {
    set_faults(random);
    const el_config config = random_config(random);
    int error = 0;
    el_engine *engine = el_engine_create(&config, &error);
    CHECK(engine != nullptr && error == EL_OK);
    if (below(random, 8) == 0) populate(engine, files);
    std::vector<std::thread> users;
    for (uint64_t i = 1 + below(random, 3); i > 0; i--) {
        users.emplace_back([&files, engine, seed = random()] { run_one(engine, files, seed); });
    }
    if (below(random, 3) == 0) CHECK(el_engine_close(engine, -1) == EL_OK);
    for (std::thread &user : users) user.join();
    el_stats_info stats{};
    CHECK(el_stats(engine, &stats) == EL_OK);
    if (below(random, 2) == 0) CHECK(el_engine_close(engine, -1) == EL_OK);
    el_engine_destroy(engine);
}

void check_null_handles() {
    el_stats_info stats;
    el_failure_info failure;
    el_transfer *transfer = nullptr;
    CHECK(el_engine_close(nullptr, 0) == EL_OK && el_stats(nullptr, &stats) == EL_E_CLOSED);
    CHECK(el_submit(nullptr, nullptr, 0, nullptr, 0, 0, &transfer) == EL_E_CLOSED);
    CHECK(el_populate(nullptr, 0, 0, 0, &transfer) == EL_E_CLOSED && el_wait(nullptr, -1, 0) == EL_E_CLOSED);
    CHECK(el_cancel(nullptr, 0) == EL_E_CLOSED && el_failure(nullptr, &failure) == EL_E_CLOSED);
    CHECK(el_bytes_done(nullptr) == 0 && el_completed(nullptr, 0, nullptr, 0) == 0 && el_event_fd(nullptr) < 0);
    CHECK(el_engine_create(nullptr, nullptr) == nullptr);
    el_release(nullptr);
    el_engine_destroy(nullptr);
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

int main(int argc, char **argv) {
    CHECK(argc == 4);
    const std::string folder = argv[1];
    Random random(std::strtoull(argv[3], nullptr, 10));
    check_null_handles();
    std::vector<TestFile> files;
    for (const uint64_t bytes : {300007u, 4096u, 65537u, 1u}) {
        files.push_back(make_file(folder + "/" + std::to_string(files.size()), bytes, random));
    }
    for (long i = std::strtol(argv[2], nullptr, 10); i > 0; i--) round(files, random);
    for (const TestFile &file : files) {
        close(file.fd);
        if (file.direct_fd >= 0) close(file.direct_fd);
    }
    std::puts("ok");
    return 0;
}
