// A stand-in for cuFile, and for what fastsafetensors wants of the CUDA runtime beside it, over the memory of standin.cpp.
//
// Reads are not ordered with any stream. Memory must be the device's, and not freed; what is registered must be read to by
// its own base, in whole pages.
#include "cufile.h"
#include "standin.h"

#include <atomic>
#include <cstdlib>
#include <fcntl.h>
#include <map>
#include <mutex>
#include <set>
#include <sys/types.h>
#include <unistd.h>

namespace {

constexpr size_t kPage = 4096;
constexpr int kInternalError = 5030;

struct Error {
    int error, cuda_error;
};

struct Descriptor {
    int type;
    union {
        int fd;
        void *handle;
    } file;
    const void *operations;
};

struct File {
    int fd;
};

std::mutex mutex;
std::set<File *> files;
std::map<const char *, size_t> registered;
std::atomic<uint64_t> drivers{0}, bytes_read{0};
std::atomic<uint32_t> fail_in{0}, delay_us{0};
std::atomic<bool> files_refused{false}, driver_refused{false}, spoiled{false}, supported{true};

void check(const char *base, size_t offset, size_t bytes) {
    if (!standin_is_live(base + offset, bytes)) standin_violate("a file was read to memory that is not the device's");
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = registered.find(base);
    if (found == registered.end()) return;
    if (offset + bytes > found->second) standin_violate("a read went beyond the memory that was registered");
    if (offset % kPage != 0 || bytes % kPage != 0) standin_violate("a read to registered memory was not of whole pages");
}

}  // namespace

extern "C" {

int cudaGetDeviceCount(int *count) {
    *count = 2;
    return 0;
}

// Not used: fastsafetensors looks for them before it believes in a runtime.
int cudaMemcpy(void *, const void *, size_t, int) {
    return 1;
}

int cudaMalloc(void **, size_t) {
    return 2;
}

int cudaFree(void *) {
    return 1;
}

// Does not wait: fastsafetensors calls it in some versions only, so whoever owns the memory has to wait himself.
int cudaDeviceSynchronize(void) {
    return 0;
}

int cudaDriverGetVersion(int *version) {
    *version = 12040;
    return 0;
}

int cudaDeviceGetAttribute(int *value, int, int) {
    *value = supported;
    return 0;
}

Error cuFileGetVersion(int *version) {
    *version = 1090;
    return {};
}

Error cuFileDriverOpen(void) {
    if (driver_refused) return {kInternalError, 0};
    drivers++;
    return {};
}

Error cuFileDriverClose(void) {
    drivers--;
    return {};
}

Error cuFileDriverSetMaxDirectIOSize(size_t) {
    return {};
}

Error cuFileDriverSetMaxPinnedMemSize(size_t) {
    return {};
}

Error cuFileHandleRegister(void **handle, Descriptor *descriptor) {
    if (files_refused) return {kInternalError, 0};
    auto *file = new File{descriptor->file.fd};
    std::lock_guard<std::mutex> lock(mutex);
    files.insert(file);
    *handle = file;
    return {};
}

void cuFileHandleDeregister(void *handle) {
    std::lock_guard<std::mutex> lock(mutex);
    auto *file = static_cast<File *>(handle);
    if (files.erase(file) == 0) return standin_violate("a file was given back that was not registered");
    delete file;
}

Error cuFileBufRegister(const void *memory, size_t bytes, int) {
    if (!standin_is_live(memory, bytes)) standin_violate("memory was registered that is not the device's");
    std::lock_guard<std::mutex> lock(mutex);
    registered[static_cast<const char *>(memory)] = bytes;
    return {};
}

Error cuFileBufDeregister(const void *memory) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = registered.find(static_cast<const char *>(memory));
    if (found == registered.end()) return {kInternalError, 0};
    if (!standin_is_live(found->first, found->second)) standin_violate("memory was freed while it was registered");
    registered.erase(found);
    return {};
}

ssize_t cuFileRead(void *handle, void *memory, size_t bytes, off_t offset, off_t memory_offset) {
    auto *base = static_cast<char *>(memory);
    check(base, static_cast<size_t>(memory_offset), bytes);
    if (fail_in != 0 && --fail_in == 0) return -5;
    if (delay_us != 0) usleep(static_cast<useconds_t>(std::rand()) % delay_us);
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (files.count(static_cast<File *>(handle)) == 0) {
            standin_violate("a file was read that is not registered");
            return -1;
        }
    }
    const ssize_t got = pread(static_cast<File *>(handle)->fd, base + memory_offset, bytes, offset);
    for (ssize_t i = 0; spoiled && i < got; i += 1000) base[memory_offset + i] ^= 1;
    check(base, static_cast<size_t>(memory_offset), bytes);
    if (got > 0) bytes_read += static_cast<uint64_t>(got);
    return got;
}

// --- for the tests ---------------------------------------------------------------------------------------------------

void cufile_fail_read(uint32_t nth) {
    fail_in = nth;
}

void cufile_refuse_files(int refused) {
    files_refused = refused != 0;
}

void cufile_refuse_driver(int refused) {
    driver_refused = refused != 0;
}

void cufile_spoil(int spoil) {
    spoiled = spoil != 0;
}

void cufile_delay(uint32_t most_us) {
    delay_us = most_us;
}

void cufile_supported(int support) {
    supported = support != 0;
}

void cufile_live(cufile_live_info *info) {
    std::lock_guard<std::mutex> lock(mutex);
    *info = {drivers, files.size(), registered.size()};
}

uint64_t cufile_bytes(void) {
    return bytes_read;
}

}  // extern "C"
