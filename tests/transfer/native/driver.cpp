// Exercises the native reader threads under the sanitizers: random plans against plain reads, with faults, cancels, closes in
// mid-flight and several threads that submit. The library is compiled with its preadv replaced by faulty_preadv.
//
// driver FOLDER ROUNDS SEED: exits with 0 when everything was right.
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "random_plans.h"

namespace {

el_transfer *submit(el_readers *readers, const Plan &plan, Random &random) {
    el_transfer *transfer = nullptr;
    const auto flags = static_cast<uint32_t>(below(random, 2) * EL_ORDERED);
    const int result = el_submit(readers, plan.files.data(), static_cast<uint32_t>(plan.files.size()), plan.extents.data(),
                                 plan.extents.size(), flags, &transfer);
    CHECK(result == EL_OK || result == EL_E_CLOSED);
    return transfer;
}

void wait_and_check(el_transfer *transfer, const Plan &plan, const std::vector<char> &memory, Random &random) {
    if (below(random, 2) == 0) el_wait(transfer, static_cast<int64_t>(below(random, plan.extents.size())), 1);
    check_completed(transfer, plan, memory.data());
    const int result = el_wait(transfer, -1, -1);
    el_failure_info failure{};
    if (result == EL_OK) {
        CHECK(std::memcmp(memory.data(), plan.expected.data(), memory.size()) == 0);
        CHECK(el_failure(transfer, &failure) == EL_OK);
        return;
    }
    CHECK(result == EL_FAILED && el_failure(transfer, &failure) == EL_FAILED && failure.in_flight == 0);
    const bool injected = failure.error == EIO || failure.error == EINTR;
    CHECK(failure.kind == EL_FAIL_CANCELLED || (failure.kind == EL_FAIL_IO && injected));
    check_completed(transfer, plan, memory.data());
}

void run_one(el_readers *readers, const std::vector<TestFile> &files, uint64_t seed) {
    Random random(seed);
    Plan plan = make_plan(files, random);
    std::vector<char> memory(plan.expected.size(), 'x');
    plan.place_at(memory.data());
    el_transfer *transfer = submit(readers, plan, random);
    if (transfer == nullptr) return;
    switch (below(random, 4)) {
        case 0:
            CHECK(el_cancel(transfer, -1) == EL_OK);
            check_completed(transfer, plan, memory.data());
            break;
        case 1: {
            std::thread canceller([&] { el_cancel(transfer, static_cast<int64_t>(below(random, 3))); });
            el_wait(transfer, -1, 1);
            canceller.join();
            wait_and_check(transfer, plan, memory, random);
            break;
        }
        default:
            wait_and_check(transfer, plan, memory, random);
    }
    el_release(transfer);
}

// Several threads share reader threads; sometimes they are closed meanwhile.
void round(const std::vector<TestFile> &files, Random &random) {
    set_faults(random);
    const el_config config = random_config(random);
    int error = 0;
    el_readers *readers = el_readers_create(&config, &error);
    CHECK(readers != nullptr && error == EL_OK);
    std::vector<std::thread> users;
    for (uint64_t i = 1 + below(random, 3); i > 0; i--) {
        users.emplace_back([&files, readers, seed = random()] { run_one(readers, files, seed); });
    }
    if (below(random, 3) == 0) CHECK(el_readers_close(readers, -1) == EL_OK);
    for (std::thread &user : users) user.join();
    el_stats_info stats{};
    CHECK(el_stats(readers, &stats) == EL_OK);
    if (below(random, 2) == 0) CHECK(el_readers_close(readers, -1) == EL_OK);
    el_readers_destroy(readers);
}

void check_null_handles() {
    el_stats_info stats;
    el_failure_info failure;
    el_transfer *transfer = nullptr;
    CHECK(el_readers_close(nullptr, 0) == EL_OK && el_stats(nullptr, &stats) == EL_E_CLOSED);
    CHECK(el_submit(nullptr, nullptr, 0, nullptr, 0, 0, &transfer) == EL_E_CLOSED);
    CHECK(el_wait(nullptr, -1, 0) == EL_E_CLOSED);
    CHECK(el_cancel(nullptr, 0) == EL_E_CLOSED && el_failure(nullptr, &failure) == EL_E_CLOSED);
    CHECK(el_bytes_done(nullptr) == 0 && el_completed(nullptr, 0, nullptr, 0) == 0);
    CHECK(el_readers_create(nullptr, nullptr) == nullptr);
    el_release(nullptr);
    el_readers_destroy(nullptr);
}

}  // namespace

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
