// Exercises the way of native reader threads to a device over the stand-in runtime.
//
// driver LIBRARY FOLDER random ROUNDS SEED: random plans with faults, cancels and closes in mid-flight; or
// driver LIBRARY FOLDER SCENARIO: one of those below. Exits with 0 when everything was right and nothing leaked.
#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <thread>

#include "../transfer/native/random_plans.h"
#include "device/device.h"
#include "standin/standin.h"

namespace {

constexpr uint64_t kKiB = 1 << 10;
constexpr int kIllegalAddress = 700, kBusy = 46;

std::string library;

// Reader threads with one device, whose slots are few: they are used over and over.
struct Fixture {
    explicit Fixture(const el_config &config, uint64_t pinned_bytes = 1, int device = 0) {
        int error = 0;
        readers = el_readers_create(&config, &error);
        CHECK(readers != nullptr && error == EL_OK);
        el_device_failure failure{};
        const el_device_config wanted{sizeof wanted, device, 2, 0, pinned_bytes, library.c_str()};
        number = el_device_add(readers, &wanted, &failure);
        if (number < 0) std::fprintf(stderr, "step %u: %s\n", failure.step, failure.text);
    }
    ~Fixture() {
        if (waits) CHECK(el_readers_close(readers, -1) == EL_OK);
        el_readers_destroy(readers);
    }

    int submit(const Plan &plan, el_transfer **transfer, void *stream = nullptr, uint32_t flags = EL_ORDERED) {
        return el_submit_to_device(readers, plan.files.data(), static_cast<uint32_t>(plan.files.size()),
                                   plan.extents.data(), plan.extents.size(), flags, static_cast<uint32_t>(number),
                                   reinterpret_cast<uint64_t>(stream), transfer);
    }

    el_readers *readers = nullptr;
    int number = -1;
    bool waits = true;  // for its threads, when it goes
};

el_config small_blocks(uint32_t deadline_ms = 60000) {
    el_config config{};
    config.struct_bytes = sizeof config;
    config.threads = config.wide_threads = 3;
    config.block_bytes = config.direct_block_bytes = 16 * kKiB;
    config.retry_base_ms = 1;
    config.deadline_ms = deadline_ms;
    return config;
}

// Device memory, full of x.
struct Destination {
    explicit Destination(uint64_t bytes) : memory(static_cast<char *>(standin_malloc(bytes))) { std::memset(memory, 'x', bytes); }
    ~Destination() { standin_free(memory); }
    char *memory;
};

// All of a file, in `parts` extents.
Plan whole_file(const TestFile &file, uint64_t parts, const Destination &destination) {
    Plan plan;
    plan.files.push_back(el_file{file.fd, -1, file.content.size(), EL_BUFFERED, 0, nullptr});
    const uint64_t bytes = file.content.size() / parts;
    for (uint64_t i = 0; i < parts; i++) plan.extents.push_back(el_extent{0, 1, i * bytes, bytes, 0, i * bytes, 0});
    plan.expected.assign(file.content.begin(), file.content.begin() + static_cast<std::ptrdiff_t>(parts * bytes));
    plan.place_at(destination.memory);
    return plan;
}

void check_all(const Plan &plan, const Destination &destination) {
    const auto wrong = std::mismatch(plan.expected.begin(), plan.expected.end(), destination.memory);
    if (wrong.first == plan.expected.end()) return;
    std::fprintf(stderr, "byte %td of %zu, of %zu extents, is %d instead of %d\n", wrong.first - plan.expected.begin(),
                 plan.expected.size(), plan.extents.size(), *wrong.second, *wrong.first);
    CHECK(false);
}

el_failure_info failure_of(el_transfer *transfer) {
    el_failure_info failure{};
    CHECK(el_failure(transfer, &failure) == EL_FAILED);
    return failure;
}

// Long enough for a machine that others keep busy; only what hangs takes it.
constexpr std::chrono::seconds kGuard(120);

void until(const std::function<bool()> &condition) {
    const auto end = std::chrono::steady_clock::now() + kGuard;
    while (!condition()) {
        CHECK(std::chrono::steady_clock::now() < end);
        usleep(500);
    }
}

void until_idle() {
    until([] { return standin_idle(nullptr) != 0; });
}

using Files = std::vector<TestFile>;

// --- scenarios -------------------------------------------------------------------------------------------------------

void slots_are_used_again_when_their_copies_have_landed(const Files &files) {
    standin_delay(300);
    for (int i = 0; i < 5; i++) {
        Fixture fixture(small_blocks());
        Destination destination(files[0].content.size());
        const Plan plan = whole_file(files[0], 7, destination);
        el_transfer *transfer = nullptr;
        CHECK(fixture.submit(plan, &transfer) == EL_OK);
        while (el_wait(transfer, -1, 1) == EL_TIMEOUT) check_completed(transfer, plan, destination.memory);
        CHECK(el_wait(transfer, -1, -1) == EL_OK);
        check_all(plan, destination);
        el_release(transfer);
    }
}

void copies_come_after_the_owners_work(const Files &files) {
    Fixture fixture(small_blocks(), 64 << 20);
    Destination destination(files[0].content.size());
    const Plan plan = whole_file(files[0], 3, destination);
    standin_hold(nullptr, 1);
    standin_fill(nullptr, destination.memory, 0, plan.expected.size());
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK);
    CHECK(el_wait(transfer, -1, 50) == EL_TIMEOUT && el_bytes_done(transfer) == 0);
    standin_hold(nullptr, 0);
    CHECK(el_wait(transfer, -1, -1) == EL_OK);
    check_all(plan, destination);
    el_release(transfer);
}

void an_extent_is_complete_when_its_copies_have_landed(const Files &files) {
    Fixture fixture(small_blocks(), 64 << 20);
    Destination destination(files[0].content.size());
    const Plan plan = whole_file(files[0], 5, destination);
    standin_hold_copies(1);
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK);
    until([] { return standin_in_flight() >= 10; });
    CHECK(el_wait(transfer, 0, 50) == EL_TIMEOUT && el_bytes_done(transfer) == 0);
    CHECK(el_completed(transfer, 0, nullptr, 0) == 0);
    standin_delay(2000);
    standin_hold_copies(0);
    for (int64_t extent = 0; extent < 5; extent++) {
        CHECK(el_wait(transfer, extent, -1) == EL_OK);
        check_extent(plan, plan.extents[static_cast<size_t>(extent)], destination.memory);
    }
    el_release(transfer);
}

void check_late_failure(const TestFile &file, uint64_t parts, uint32_t nth) {
    Fixture fixture(small_blocks());
    Destination destination(file.content.size());
    const Plan plan = whole_file(file, parts, destination);
    standin_fail_copy(nth, kIllegalAddress);
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK);
    CHECK(el_wait(transfer, -1, -1) == EL_FAILED);
    const el_failure_info failure = failure_of(transfer);
    CHECK(failure.kind == EL_FAIL_DEVICE && failure.error == kIllegalAddress && failure.in_flight == 0);
    const el_extent &e = plan.extents[failure.extent];
    CHECK(failure.offset >= e.offset && failure.offset < e.offset + e.row_bytes);
    char text[100] = "";
    el_device_error_text(fixture.readers, 0, failure.error, text, sizeof text);
    CHECK(std::string(text) == "an illegal memory access was encountered");
    check_completed(transfer, plan, destination.memory);
    el_release(transfer);
}

void a_copy_that_fails_late_is_reported(const Files &files) {
    check_late_failure(files[0], 4, 9);
    check_late_failure(files[1], 1, 1);  // no later call reports it
}

void submit_and_wait(Fixture &fixture, const TestFile &file, int expected) {
    Destination destination(file.content.size());
    const Plan plan = whole_file(file, 4, destination);
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK && el_wait(transfer, -1, -1) == expected);
    if (expected == EL_OK) {
        check_all(plan, destination);
    } else {
        const el_failure_info failure = failure_of(transfer);
        CHECK(failure.kind == EL_FAIL_DEVICE && failure.error == kBusy && failure.in_flight == 0);
    }
    el_release(transfer);
}

void a_copy_that_cannot_begin_is_reported(const Files &files) {
    for (const char *call : {"MemcpyAsync", "EventRecord", "StreamWaitEvent", "SetDevice"}) {
        Fixture fixture(small_blocks(), 1, 1);
        submit_and_wait(fixture, files[0], EL_OK);
        // The first record, and the first two changes of device, are those of the submit.
        standin_fail_call(call, std::string(call) == "SetDevice" ? 3 : 2, kBusy);
        standin_delay(3000);
        submit_and_wait(fixture, files[0], EL_FAILED);
        standin_delay(0);
        submit_and_wait(fixture, files[0], EL_OK);
    }
}

void an_owner_whose_stream_is_refused_is_reported(const Files &files) {
    Fixture fixture(small_blocks());
    Destination destination(files[0].content.size());
    const Plan plan = whole_file(files[0], 1, destination);
    el_transfer *transfer = nullptr;
    standin_fail_call("EventRecord", 1, kBusy);
    CHECK(fixture.submit(plan, &transfer) == EL_E_DEVICE && errno == kBusy && transfer == nullptr);
    CHECK(el_submit_to_device(fixture.readers, plan.files.data(), 1, plan.extents.data(), 1, 0, 7, 0, &transfer) == EL_E_ARGUMENT);
}

void a_cancel_waits_for_copies(const Files &files) {
    Fixture fixture(small_blocks());
    el_transfer *transfer = nullptr;
    {
        Destination destination(files[0].content.size());
        const Plan plan = whole_file(files[0], 2, destination);
        standin_hold_copies(1);
        CHECK(fixture.submit(plan, &transfer) == EL_OK);
        until([] { return standin_in_flight() >= 2; });
        CHECK(el_cancel(transfer, 20) == EL_TIMEOUT);
        CHECK(el_wait(transfer, -1, 20) == EL_TIMEOUT && failure_of(transfer).in_flight > 0);
        standin_hold_copies(0);
        CHECK(el_cancel(transfer, -1) == EL_OK && failure_of(transfer).kind == EL_FAIL_CANCELLED);
    }
    el_release(transfer);
}

void a_release_waits_for_copies_behind_the_back(const Files &files) {
    Destination destination(files[0].content.size());
    Fixture fixture(small_blocks());
    const Plan plan = whole_file(files[0], 2, destination);
    standin_hold_copies(1);
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK);
    until([] { return standin_in_flight() >= 2; });
    el_release(transfer);
    standin_hold_copies(0);
    CHECK(el_readers_close(fixture.readers, -1) == EL_OK);
}

void a_close_waits_for_copies(const Files &files) {
    Destination destination(files[0].content.size());
    Fixture fixture(small_blocks());
    const Plan plan = whole_file(files[0], 2, destination);
    standin_hold_copies(1);
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK);
    until([] { return standin_in_flight() >= 2; });
    CHECK(el_readers_close(fixture.readers, 50) == EL_TIMEOUT);
    standin_hold_copies(0);
    CHECK(el_readers_close(fixture.readers, -1) == EL_OK);
    CHECK(el_wait(transfer, -1, 0) == EL_FAILED && failure_of(transfer).kind == EL_FAIL_CANCELLED);
    el_release(transfer);
}

// el_readers_destroy while the device hangs; the device's thread frees everything when that is over.
void a_destroyed_engine_waits_for_copies_behind_the_back(const Files &files) {
    Destination destination(files[0].content.size());
    {
        Fixture fixture(small_blocks());
        fixture.waits = false;
        const Plan plan = whole_file(files[0], 2, destination);
        standin_hold_copies(1);
        el_transfer *transfer = nullptr;
        CHECK(fixture.submit(plan, &transfer) == EL_OK);
        until([] { return standin_in_flight() >= 2; });
        el_release(transfer);
    }
    CHECK(standin_in_flight() >= 2);
    standin_hold_copies(0);
    until([] {
        standin_live_info live{};
        standin_live(&live);
        return live.pinned == 0 && live.streams == 0 && live.events == 0;
    });
}

// Whether there are slots for all that is read, or readers wait for them.
void check_hanging(const Files &files, uint64_t pinned_bytes) {
    Fixture fixture(small_blocks(400), pinned_bytes);
    Destination destination(files[0].content.size());
    const Plan plan = whole_file(files[0], 2, destination);
    standin_hold_copies(1);
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK);
    CHECK(el_wait(transfer, -1, 6000) == EL_FAILED);
    const el_failure_info failure = failure_of(transfer);
    CHECK(failure.kind == EL_FAIL_DEADLINE && failure.tries == 0 && failure.in_flight > 0);
    standin_hold_copies(0);
    CHECK(el_cancel(transfer, -1) == EL_OK);
    el_release(transfer);
}

void a_device_that_hangs_is_reported(const Files &files) {
    check_hanging(files, 64 << 20);
    check_hanging(files, 1);
}

void strided_destinations_are_filled_by_copies_in_two_dimensions(const Files &files) {
    Fixture fixture(small_blocks());
    constexpr uint32_t rows = 400;
    constexpr uint64_t width = 300, pitch = 512, from_pitch = 700;
    Destination destination(rows * pitch);
    Plan plan;
    plan.files.push_back(el_file{files[0].fd, -1, files[0].content.size(), EL_BUFFERED, 0, nullptr});
    plan.extents.push_back(el_extent{0, rows, 11, width, from_pitch, 3, pitch});
    plan.expected.assign(rows * pitch, 'x');
    for (uint64_t row = 0; row < rows; row++) {
        std::memcpy(plan.expected.data() + 3 + row * pitch, files[0].content.data() + 11 + row * from_pitch, width);
    }
    plan.place_at(destination.memory);
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK && el_wait(transfer, -1, -1) == EL_OK);
    check_all(plan, destination);
    standin_done_info done{};
    standin_done(&done);
    CHECK(done.copies_2d > 0 && done.copies < rows / 8);
    el_release(transfer);
}

// Pieces far apart are read one by one into one slot.
void runs_share_a_slot(const Files &files) {
    el_config config = small_blocks();
    config.block_bytes = config.direct_block_bytes = 256 * kKiB;
    Fixture fixture(config);
    Destination destination(30 * kKiB);
    Plan plan;
    plan.files.push_back(el_file{files[0].fd, -1, files[0].content.size(), EL_BUFFERED, 0, nullptr});
    for (uint64_t i = 0; i < 30; i++) {
        plan.extents.push_back(el_extent{0, 1, i * 20 * kKiB, kKiB, 0, i * kKiB, 0});
        plan.expected.insert(plan.expected.end(), files[0].content.data() + i * 20 * kKiB,
                             files[0].content.data() + i * 20 * kKiB + kKiB);
    }
    plan.place_at(destination.memory);
    standin_delay(1000);
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK && el_wait(transfer, -1, -1) == EL_OK);
    check_all(plan, destination);
    el_release(transfer);
}

void several_copies_are_in_flight(const Files &files) {
    Fixture fixture(small_blocks(), 64 << 20);
    Destination destination(files[0].content.size());
    const Plan plan = whole_file(files[0], 1, destination);
    standin_hold_copies(1);
    el_transfer *transfer = nullptr;
    CHECK(fixture.submit(plan, &transfer) == EL_OK);
    until([] { return standin_in_flight() >= 4; });
    standin_hold_copies(0);
    CHECK(el_wait(transfer, -1, -1) == EL_OK);
    check_all(plan, destination);
    standin_done_info done{};
    standin_done(&done);
    CHECK(done.bytes == plan.expected.size());
    el_stats_info stats{};
    CHECK(el_stats(fixture.readers, &stats) == EL_OK);
    CHECK(stats.bytes == done.bytes && stats.device_bytes == done.bytes && stats.buffered_bytes == done.bytes);
    el_release(transfer);
}

void what_cannot_be_made_is_reported(const Files &) {
    const std::map<std::string, uint32_t> steps = {{"SetDevice", EL_DEVICE_SELECT},
                                                   {"StreamCreateWithFlags", EL_DEVICE_STREAM},
                                                   {"EventCreateWithFlags", EL_DEVICE_STREAM}};
    const el_config config = small_blocks();
    int error = 0;
    el_readers *readers = el_readers_create(&config, &error);
    el_device_config wanted{sizeof wanted, 1, 2, 0, 1, library.c_str()};
    el_device_failure failure{};
    for (const auto &[call, step] : steps) {
        standin_fail_call(call.c_str(), 1, kBusy);
        CHECK(el_device_add(readers, &wanted, &failure) == EL_E_DEVICE);
        CHECK(failure.step == step && failure.error == kBusy && std::strstr(failure.text, "busy") != nullptr);
    }
    standin_fail_call("HostRegister", 1, kBusy);
    standin_fail_call("HostAlloc", 1, 2);
    CHECK(el_device_add(readers, &wanted, &failure) == EL_E_DEVICE);
    CHECK(failure.step == EL_DEVICE_MEMORY && std::strcmp(failure.text, "out of memory") == 0);
    // Memory of our own that cannot be locked: the runtime's.
    standin_fail_call("HostRegister", 1, kBusy);
    CHECK(el_device_add(readers, &wanted, &failure) == 0 && el_device_add(readers, &wanted, &failure) == 0);
    wanted.device = 9;
    CHECK(el_device_add(readers, &wanted, &failure) == EL_E_DEVICE && failure.step == EL_DEVICE_SELECT);
    wanted.library = "/nowhere/libcudart.so";
    CHECK(el_device_add(readers, &wanted, &failure) == EL_E_DEVICE && failure.step == EL_DEVICE_LIBRARY);
    CHECK(std::strstr(failure.text, "/nowhere/libcudart.so") != nullptr);
    CHECK(el_device_runtime("libc.so.6", &failure) == EL_E_DEVICE && std::strstr(failure.text, "SetDevice") != nullptr);
    CHECK(el_device_runtime(library.c_str(), &failure) == EL_OK);
    CHECK(el_readers_close(readers, -1) == EL_OK);
    el_readers_destroy(readers);
}

// --- random ----------------------------------------------------------------------------------------------------------

void run_one(Fixture &fixture, const Files &files, uint64_t seed, bool faulty) {
    Random random(seed);
    Plan plan = make_plan(files, random);
    Destination destination(plan.expected.size());
    plan.place_at(destination.memory);
    if (below(random, 2) == 0) {  // what the owner does before, late
        standin_fill(nullptr, destination.memory, 'y', plan.expected.size());
        standin_fill(nullptr, destination.memory, 'x', plan.expected.size());
    }
    el_transfer *transfer = nullptr;
    const int submitted = fixture.submit(plan, &transfer, nullptr, static_cast<uint32_t>(below(random, 2)));
    if (submitted != EL_OK) {
        CHECK(submitted == EL_E_CLOSED || (submitted == EL_E_DEVICE && faulty));
        until_idle();  // the owner's own work
        return;
    }
    if (below(random, 3) == 0) el_wait(transfer, -1, static_cast<int64_t>(below(random, 3)));
    check_completed(transfer, plan, destination.memory);
    if (below(random, 4) == 0) CHECK(el_cancel(transfer, -1) == EL_OK);
    if (el_wait(transfer, -1, -1) == EL_OK) {
        // Copies wait for the owner's work. Where nothing had to be copied, nothing has waited.
        if (el_bytes_done(transfer) == 0) until_idle();
        check_all(plan, destination);
    } else {
        const el_failure_info failure = failure_of(transfer);
        CHECK(failure.in_flight == 0);
        const bool injected = failure.error == EIO || failure.error == EINTR;
        CHECK(failure.kind == EL_FAIL_CANCELLED || (failure.kind == EL_FAIL_IO && injected) ||
              (failure.kind == EL_FAIL_DEVICE && faulty));
        check_completed(transfer, plan, destination.memory);
    }
    until_idle();
    el_release(transfer);
}

void check_nothing_is_left() {
    standin_live_info live{};
    standin_live(&live);
    char text[200] = "";
    const uint64_t violations = standin_violations(text, sizeof text);
    if (violations > 0) std::fprintf(stderr, "%llu rules broken: %s\n", static_cast<unsigned long long>(violations), text);
    CHECK(violations == 0);
    CHECK(live.pinned == 0 && live.streams == 0 && live.events == 0 && live.allocations == 0);
    CHECK(standin_in_flight() == 0);
}

void round(const Files &files, Random &random) {
    standin_reset(random());
    standin_delay(static_cast<uint32_t>(below(random, 2) * below(random, 80)));
    set_faults(random);
    el_config config = random_config(random);
    config.block_bytes = std::max(config.block_bytes, 16 * kKiB);
    Fixture fixture(config, 1 + below(random, 4 << 20), static_cast<int>(below(random, 2)));
    CHECK(fixture.number == 0);
    const bool faulty = below(random, 3) == 0;
    if (faulty) standin_faults(static_cast<uint32_t>(below(random, 60)), static_cast<uint32_t>(below(random, 60)));
    std::vector<std::thread> users;
    for (uint64_t i = 1 + below(random, 3); i > 0; i--) {
        users.emplace_back([&files, &fixture, faulty, seed = random()] { run_one(fixture, files, seed, faulty); });
    }
    if (below(random, 3) == 0) CHECK(el_readers_close(fixture.readers, -1) == EL_OK);
    for (std::thread &user : users) user.join();
    standin_faults(0, 0);
    CHECK(el_readers_close(fixture.readers, -1) == EL_OK);
    check_nothing_is_left();
}

const std::map<std::string, void (*)(const Files &)> scenarios = {
#define SCENARIO(name) {#name, name}
    SCENARIO(slots_are_used_again_when_their_copies_have_landed),
    SCENARIO(copies_come_after_the_owners_work),
    SCENARIO(an_extent_is_complete_when_its_copies_have_landed),
    SCENARIO(a_copy_that_fails_late_is_reported),
    SCENARIO(a_copy_that_cannot_begin_is_reported),
    SCENARIO(an_owner_whose_stream_is_refused_is_reported),
    SCENARIO(a_cancel_waits_for_copies),
    SCENARIO(a_release_waits_for_copies_behind_the_back),
    SCENARIO(a_close_waits_for_copies),
    SCENARIO(a_destroyed_engine_waits_for_copies_behind_the_back),
    SCENARIO(a_device_that_hangs_is_reported),
    SCENARIO(strided_destinations_are_filled_by_copies_in_two_dimensions),
    SCENARIO(runs_share_a_slot),
    SCENARIO(several_copies_are_in_flight),
    SCENARIO(what_cannot_be_made_is_reported),
#undef SCENARIO
};

}  // namespace

int main(int argc, char **argv) {
    CHECK(argc == 4 || argc == 6);
    library = argv[1];
    const std::string folder = argv[2], what = argv[3];
    Random random(argc == 6 ? std::strtoull(argv[5], nullptr, 10) : 1);
    Files files;
    for (const uint64_t bytes : {700007u, 4096u, 65537u, 1u}) {
        files.push_back(make_file(folder + "/" + std::to_string(files.size()), bytes, random));
    }
    if (what == "random") {
        for (long i = std::strtol(argv[4], nullptr, 10); i > 0; i--) round(files, random);
    } else {
        standin_reset(1);
        scenarios.at(what)(files);
        check_nothing_is_left();
    }
    for (const TestFile &file : files) {
        close(file.fd);
        if (file.direct_fd >= 0) close(file.direct_fd);
    }
    std::puts("ok");
    return 0;
}
