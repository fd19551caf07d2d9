// Reads by USRBIO with faults, cancellations and closings, for the sanitizers: driver LIBRARY MOUNT FILE.
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "usrbio/usrbio.h"

// The library's objects are those of the other drivers, which replace its preadv.
extern "C" ssize_t faulty_preadv(int fd, const struct iovec *vectors, int n, off_t offset) {
    return preadv(fd, vectors, n, offset);
}

namespace {

int (*configure)(const char *);
int (*reg_fd)(int, uint64_t);
void (*dereg_fd)(int);

const char *const kFaults[] = {
    "reset", "reset,jitter_us=300", "reset,short_every=2,error_every=3", "reset,zero_every=4,full_every=2",
    "reset,hang_every=9", "reset,hole_at=100000,hole_bytes=90000", "reset,mount_hang=1", "reset,limits=1,latency_us=500", "reset,late_every=5,late_ms=60", "reset,error_every=1,error=1", "reset,buffer_every=2",
};

void check(bool condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "failed: %s\n", what);
    abort();
}

// One set of reader threads, used by two threads: each submits, waits or cancels.
void read_often(el_readers *readers, const el_file &file, const std::vector<char> &content, unsigned seed) {
    for (unsigned round = 0; round < 40; round++) {
        std::vector<char> to(content.size());
        el_extent extent{0, 1, 0, content.size(), 0, reinterpret_cast<uint64_t>(to.data()), 0};
        el_transfer *transfer = nullptr;
        if (el_submit(readers, &file, 1, &extent, 1, EL_ORDERED, &transfer) != EL_OK) return;  // closed meanwhile
        if ((round + seed) % 5 == 0) check(el_cancel(transfer, 5000) == EL_OK, "cancel");
        int result;
        while ((result = el_wait(transfer, -1, 50)) == EL_TIMEOUT) continue;
        if (result == EL_OK) check(memcmp(to.data(), content.data(), content.size()) == 0, "bytes");
        // After a deadline another thread may still copy; it has to stop before the destination goes.
        check(el_cancel(transfer, 5000) == EL_OK, "quiet");
        el_release(transfer);
    }
}

}  // namespace

int main(int, char **arguments) {
    const char *library = arguments[1], *mount = arguments[2];
    void *handle = dlopen(library, RTLD_NOW | RTLD_GLOBAL);
    check(handle != nullptr, "dlopen");
    configure = reinterpret_cast<int (*)(const char *)>(dlsym(handle, "hf3fs_emulator_configure"));
    reg_fd = reinterpret_cast<int (*)(int, uint64_t)>(dlsym(handle, "hf3fs_reg_fd"));
    dereg_fd = reinterpret_cast<void (*)(int)>(dlsym(handle, "hf3fs_dereg_fd"));
    const int fd = open(arguments[3], O_RDONLY);
    struct stat status;
    check(fstat(fd, &status) == 0 && reg_fd(fd, 0) <= 0, "file");
    std::vector<char> content(static_cast<size_t>(status.st_size));
    check(pread(fd, content.data(), content.size(), 0) == status.st_size, "pread");
    uint32_t batch = 0;
    for (const char *faults : kFaults) {
        configure(faults);
        batch = batch % 4 + 1;
        el_config config{};
        config.struct_bytes = sizeof config;
        config.retry_base_ms = 1;
        el_readers *readers = el_readers_create(&config, nullptr);
        const el_usrbio_config usrbio{sizeof usrbio, 2, 4, 100, 64 << 10, library, mount, 0, batch, 0};
        const int number = el_usrbio_add(readers, &usrbio);
        check(number >= 0, "add");
        const el_file file{fd, -1, content.size(), EL_USRBIO, EL_FILE_USRBIO(number), nullptr};
        std::thread other([&] { read_often(readers, file, content, 1); });
        read_often(readers, file, content, 3);
        other.join();
        check(el_readers_close(readers, 5000) == EL_OK, "close");
        el_readers_destroy(readers);
    }
    configure("reset");
    dereg_fd(fd);
    close(fd);
    puts("done");
    return 0;
}
