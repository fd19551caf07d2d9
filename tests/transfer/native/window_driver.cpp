// Exercises the window under the sanitizers: threads as ranks, each a member with reader threads of its own, that want parts
// of the same regions of files, with reads that fail, cancels, members that leave early, and a window too small for all.
//
// window_driver FOLDER ROUNDS SEED: exits with 0 when everything was right.
#include <string>
#include <sys/stat.h>
#include <thread>
#include <vector>

#include "random_plans.h"
#include "window/window.h"

namespace {

constexpr uint64_t kSlotBytes = 32 << 10;

struct Regions {
    std::vector<el_shared_file> files;
    std::vector<el_shared_region> regions;
};

// The same for all ranks: tensors, one behind the other in each file.
Regions make_regions(const std::vector<TestFile> &files, uint32_t ranks, Random &random) {
    Regions made;
    for (uint32_t i = 0; i < files.size(); i++) {
        const uint64_t size = files[i].content.size();
        el_shared_file file{};
        file.file = el_file{files[i].fd, files[i].direct_fd, size, files[i].direct_fd < 0 ? EL_BUFFERED : EL_DIRECT, EL_FILE_WIDE, nullptr};
        file.key[0] = i + 1;
        made.files.push_back(file);
        for (uint64_t at = below(random, 100); at < size;) {
            const uint64_t bytes = std::min(size - at, 1 + below(random, 150000));
            made.regions.push_back(el_shared_region{i, 1 + static_cast<uint32_t>(below(random, ranks)), at, bytes, ranks, 0});
            at += bytes + below(random, 50);
        }
    }
    return made;
}

// What one rank wants of a region: all, some rows with gaps, or a part.
el_extent part_of(const el_shared_region &region, Random &random) {
    el_extent e{};
    e.file = region.file;
    e.offset = region.offset + below(random, region.bytes);
    const uint64_t room = region.offset + region.bytes - e.offset;
    e.rows = below(random, 2) == 0 ? static_cast<uint32_t>(1 + below(random, 60)) : 1;
    e.row_bytes = below(random, room / e.rows + 1);
    e.src_stride = e.rows > 1 ? below(random, (room - e.row_bytes) / (e.rows - 1) + 1) : 0;
    e.dst_stride = e.row_bytes + below(random, 2) * 7;
    return e;
}

void answer_reads(el_window *window, const std::vector<TestFile> &files) {
    el_window_read read{};
    int result;
    while ((result = el_window_next_read(window, 50, &read)) == EL_OK || result == EL_TIMEOUT) {
        if (result != EL_OK) continue;
        iovec vector{reinterpret_cast<void *>(read.address), read.bytes};
        const auto got = faulty_preadv(files[static_cast<size_t>(read.file)].fd, &vector, 1, static_cast<off_t>(read.offset));
        el_window_answer(window, read.number, got == static_cast<ssize_t>(read.bytes));
    }
}

void rank(const std::vector<TestFile> &files, const Regions &regions, const std::string &folder, uint64_t seed) {
    Random random(seed);
    el_config config = random_config(random);
    config.max_tries = 3;
    int error = 0;
    el_readers *readers = el_readers_create(&config, &error);
    CHECK(readers != nullptr);
    const bool pulled = below(random, 3) == 0;
    std::vector<uint64_t> keys;
    for (const el_shared_file &file : regions.files) keys.insert(keys.end(), file.key, file.key + 2);
    const auto declared = static_cast<uint32_t>(below(random, regions.files.size() + 1));
    const el_window_config window_config{sizeof(el_window_config), 1 + static_cast<uint32_t>(below(random, 6)), 400, 0, 8 * kSlotBytes,
                                         kSlotBytes, folder.c_str(), pulled ? nullptr : readers, readers,
                                         reinterpret_cast<const uint64_t(*)[2]>(keys.data()), declared, 0};
    el_window *window = nullptr;
    CHECK(el_window_join(&window_config, &window) == EL_OK);
    Regions ours = regions;
    for (uint32_t i = 0; pulled && i < ours.files.size(); i++) ours.files[i].file.fd = static_cast<int>(i);
    std::vector<std::thread> answering;
    for (int i = 0; pulled && i < 2; i++) answering.emplace_back([&] { answer_reads(window, files); });
    std::vector<el_extent> extents;
    std::vector<uint32_t> region_of;
    std::vector<char> expected;
    for (uint32_t i = 0; i < regions.regions.size(); i++) {
        for (uint64_t n = below(random, 3); n > 0; n--) {
            el_extent e = part_of(regions.regions[i], random);
            e.address = expected.size();
            expected.resize(expected.size() + e.dst_stride * e.rows, 'x');
            for (uint64_t row = 0; row < e.rows; row++) {
                std::memcpy(expected.data() + e.address + row * e.dst_stride,
                            files[e.file].content.data() + e.offset + row * e.src_stride, e.row_bytes);
            }
            extents.push_back(e);
            region_of.push_back(i);
        }
    }
    std::vector<char> memory(expected.size() + 1, 'x');
    for (el_extent &e : extents) e.address += reinterpret_cast<uint64_t>(memory.data());
    el_shared *shared = nullptr;
    CHECK(el_shared_submit(window, ours.files.data(), static_cast<uint32_t>(ours.files.size()), ours.regions.data(),
                           static_cast<uint32_t>(ours.regions.size()), extents.data(), region_of.data(), extents.size(), -1, 0,
                           &shared) == EL_OK);
    const uint64_t what = below(random, 6);
    if (what == 0) {
        CHECK(el_shared_cancel(shared, -1) == EL_OK);
    } else if (what == 1) {
        el_shared_wait(shared, static_cast<int64_t>(below(random, 5)));
        el_window_leave(window);
        CHECK(el_shared_wait(shared, -1) != EL_TIMEOUT);
    } else {
        CHECK(el_shared_wait(shared, 60000) == EL_OK);
        std::vector<el_extent> left(el_shared_left(shared, nullptr, 0));
        el_shared_left(shared, left.data(), left.size());
        for (const el_extent &e : left) {
            for (uint64_t row = 0; row < e.rows; row++) {
                std::memcpy(reinterpret_cast<char *>(e.address) + row * e.dst_stride,
                            files[e.file].content.data() + e.offset + row * e.src_stride, e.row_bytes);
            }
        }
        CHECK(std::memcmp(memory.data(), expected.data(), expected.size()) == 0);
    }
    el_window_stats stats{};
    el_window_look(window, &stats);
    el_window_leave(window);
    for (std::thread &thread : answering) thread.join();
    el_shared_release(shared);
    el_window_free(window);
    el_readers_destroy(readers);
}

void round(const std::vector<TestFile> &files, const std::string &folder, Random &random) {
    set_faults(random);
    const auto ranks = static_cast<uint32_t>(1 + below(random, 4));
    const Regions regions = make_regions(files, ranks, random);
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < ranks; i++) {
        threads.emplace_back([&, seed = random()] { rank(files, regions, folder, seed); });
    }
    for (std::thread &thread : threads) thread.join();
}

}  // namespace

int main(int argc, char **argv) {
    CHECK(argc == 4);
    const std::string folder = argv[1];
    Random random(std::strtoull(argv[3], nullptr, 10));
    std::vector<TestFile> files;
    for (const uint64_t bytes : {700007u, 4096u, 265537u}) {
        files.push_back(make_file(folder + "/" + std::to_string(files.size()), bytes, random));
    }
    const std::string place = folder + "/place";
    CHECK(mkdir(place.c_str(), 0700) == 0);
    for (long i = std::strtol(argv[2], nullptr, 10); i > 0; i--) round(files, place, random);
    std::puts("ok");
    return 0;
}
