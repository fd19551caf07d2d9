// From 3FS to a device: the emulator's rings, whose buffers are the slots of copies to the stand-in's memory, with faults
// of both, cancels and closes in mid-flight.
//
// usrbio_driver STANDIN EMULATOR MOUNT FILE ROUNDS SEED. Exits with 0 when everything was right and nothing leaked.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <random>
#include <sys/stat.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "device/device.h"
#include "standin/standin.h"
#include "usrbio/usrbio.h"

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                             \
        }                                                                             \
    } while (0)

// What the library's objects, which are shared with another driver, call instead of preadv.
extern "C" ssize_t faulty_preadv(int fd, const struct iovec *vectors, int n, off_t offset) {
    return preadv(fd, vectors, n, offset);
}

namespace {

using Random = std::mt19937_64;

uint64_t below(Random &random, uint64_t n) { return random() % n; }

constexpr uint64_t kKiB = 1 << 10;
// The first leaves everything as it should be.
const char *const kFaults[] = {
    "reset",
    "reset,jitter_us=300",
    "reset,short_every=2,error_every=3",
    "reset,zero_every=4,full_every=2",
    "reset,late_every=5,late_ms=60",
    "reset,hang_every=9",
    "reset,hole_at=100000,hole_bytes=90000,jitter_us=100",
};

const char *standin_path, *emulator_path, *mount_path;

struct ReaderThreads {
    ReaderThreads() {
        el_config config{};
        config.struct_bytes = sizeof config;
        config.retry_base_ms = 1;
        config.block_bytes = 64 * kKiB;
        config.deadline_ms = 60000;
        int error = 0;
        readers = el_readers_create(&config, &error);
        CHECK(readers != nullptr && error == EL_OK);
        el_device_failure failure{};
        const el_device_config wanted{sizeof wanted, 0, 2, 0, 1, standin_path};
        device = el_device_add(readers, &wanted, &failure);
        CHECK(device >= 0);
        const el_usrbio_config rings{sizeof rings, 2, 4, 3000, 32 * kKiB, emulator_path, mount_path, 0, 1, 0};
        usrbio = el_usrbio_add(readers, &rings);
        CHECK(usrbio >= 0);
    }
    ~ReaderThreads() {
        CHECK(el_readers_close(readers, -1) == EL_OK);
        el_readers_destroy(readers);
    }

    el_readers *readers = nullptr;
    int device = -1, usrbio = -1;
};

// Device memory, which its owner's stream is still writing to.
struct Destination {
    explicit Destination(uint64_t bytes) : memory(static_cast<char *>(standin_malloc(bytes))) {
        standin_fill(nullptr, memory, 'x', bytes);
    }
    ~Destination() { standin_free(memory); }
    char *memory;
};

// Whether all arrived.
bool read_once(const ReaderThreads &on, int fd, const std::vector<char> &content, Random &random) {
    const uint64_t begin = below(random, content.size()), bytes = content.size() - begin;
    Destination destination(bytes);
    const el_file file{fd, -1, content.size(), EL_USRBIO, EL_FILE_USRBIO(on.usrbio), nullptr};
    const auto address = reinterpret_cast<uint64_t>(destination.memory);
    const uint64_t half = bytes / 2;
    const el_extent extents[] = {{0, 1, begin, half, 0, address, 0}, {0, 1, begin + half, bytes - half, 0, address + half, 0}};
    el_transfer *transfer = nullptr;
    const int submitted = el_submit_to_device(on.readers, &file, 1, extents, 2, EL_ORDERED, static_cast<uint32_t>(on.device),
                                              0, &transfer);
    if (submitted != EL_OK) {  // closed meanwhile, or the stream was refused
        while (standin_idle(nullptr) == 0) usleep(100);
        return false;
    }
    const bool cancelled = below(random, 5) == 0;
    if (cancelled) {
        usleep(static_cast<useconds_t>(below(random, 2000)));
        CHECK(el_cancel(transfer, -1) == EL_OK);
    }
    int result;
    while ((result = el_wait(transfer, -1, 50)) == EL_TIMEOUT) continue;
    if (result == EL_OK) CHECK(std::memcmp(destination.memory, content.data() + begin, bytes) == 0);
    CHECK(el_cancel(transfer, -1) == EL_OK);
    el_release(transfer);
    while (standin_idle(nullptr) == 0) usleep(100);  // the owner's own work, which is not ours to wait for
    return result == EL_OK || cancelled;
}

void round(int fd, const std::vector<char> &content, bool faulty, Random &random) {
    standin_reset(random());
    standin_delay(static_cast<uint32_t>(1 + below(random, 2000)));
    {
        ReaderThreads on;
        if (faulty) standin_faults(static_cast<uint32_t>(below(random, 60)), static_cast<uint32_t>(below(random, 60)));
        const bool closes = below(random, 3) == 0;
        const auto use = [&](uint64_t seed) {
            Random own(seed);
            for (int i = 0; i < 5; i++) CHECK(read_once(on, fd, content, own) || faulty || closes);
        };
        const uint64_t seeds[] = {random(), random()};
        std::thread one([&] { use(seeds[0]); }), other([&] { use(seeds[1]); });
        if (closes) {
            usleep(static_cast<useconds_t>(below(random, 5000)));
            CHECK(el_readers_close(on.readers, -1) == EL_OK);
        }
        one.join();
        other.join();
        standin_faults(0, 0);
    }
    char text[200];
    const uint64_t broken = standin_violations(text, sizeof text);
    if (broken != 0) std::fprintf(stderr, "not so: %s\n", text);
    CHECK(broken == 0 && standin_in_flight() == 0);
    standin_live_info live{};
    standin_live(&live);
    CHECK(live.pinned == 0 && live.streams == 0 && live.events == 0 && live.allocations == 0);
}

}  // namespace

int main(int argc, char **argv) {
    CHECK(argc == 7);
    standin_path = argv[1];
    emulator_path = argv[2];
    mount_path = argv[3];
    void *handle = dlopen(emulator_path, RTLD_NOW | RTLD_GLOBAL);
    CHECK(handle != nullptr);
    const auto configure = reinterpret_cast<int (*)(const char *)>(dlsym(handle, "hf3fs_emulator_configure"));
    const auto reg_fd = reinterpret_cast<int (*)(int, uint64_t)>(dlsym(handle, "hf3fs_reg_fd"));
    const auto dereg_fd = reinterpret_cast<void (*)(int)>(dlsym(handle, "hf3fs_dereg_fd"));
    const int fd = open(argv[4], O_RDONLY);
    struct stat status;
    CHECK(fstat(fd, &status) == 0 && reg_fd(fd, 0) <= 0);
    std::vector<char> content(static_cast<size_t>(status.st_size));
    CHECK(pread(fd, content.data(), content.size(), 0) == status.st_size);
    Random random(std::strtoull(argv[6], nullptr, 10));
    for (long i = 0; i < std::strtol(argv[5], nullptr, 10); i++) {
        const size_t chosen = static_cast<size_t>(i) % (sizeof kFaults / sizeof *kFaults);
        configure(kFaults[chosen]);
        round(fd, content, chosen != 0, random);
    }
    configure("reset");
    dereg_fd(fd);
    close(fd);
    std::puts("ok");
    return 0;
}
