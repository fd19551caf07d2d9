#include "usrbio/usrbio_channel.h"

#include <algorithm>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <map>
#include <mutex>
#include <sys/statvfs.h>
#include <unistd.h>

#include "memory/memory.h"

namespace el {
namespace {

constexpr int kIoDepth = -1;  // every IO completes by itself, rather than with the slowest of a batch

template <typename T>
bool find(void *library, const char *name, T &function) {
    function = reinterpret_cast<T>(dlsym(library, name));
    return function != nullptr;
}

const Hf3fs *open_library(const char *path) {
    // RTLD_GLOBAL: an extension that needs the library by its name is then satisfied by this copy.
    void *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL | RTLD_NODELETE);
    if (handle == nullptr) return nullptr;
    auto *table = new Hf3fs();
    const bool whole = find(handle, "hf3fs_iovcreate", table->iovcreate) &&
                       find(handle, "hf3fs_iovunlink", table->iovunlink) &&
                       find(handle, "hf3fs_iovdestroy", table->iovdestroy) &&
                       find(handle, "hf3fs_iorcreate4", table->iorcreate4) &&
                       find(handle, "hf3fs_iordestroy", table->iordestroy) &&
                       find(handle, "hf3fs_prep_io", table->prep_io) &&
                       find(handle, "hf3fs_submit_ios", table->submit_ios) &&
                       find(handle, "hf3fs_wait_for_ios", table->wait_for_ios);
    if (whole) return table;
    delete table;
    return nullptr;
}

bool shared_memory_has_room(uint64_t bytes) {
    struct statvfs status;
    if (statvfs("/dev/shm", &status) != 0) return true;  // not there, perhaps; touching the pages shows it
    return uint64_t{status.f_bavail} * status.f_frsize >= bytes;
}

// Pages of a full /dev/shm raise SIGBUS when touched; the kernel's own copy says EFAULT instead.
int touch_by_read(char *memory, uint64_t bytes) {
    const int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    if (zero < 0) return errno;
    int error = 0;
    for (uint64_t done = 0; done < bytes && error == 0;) {
        const ssize_t n = ::read(zero, memory + done, std::min<uint64_t>(bytes - done, 1 << 20));
        if (n <= 0) {
            error = n < 0 ? errno : EFAULT;
        } else {
            done += static_cast<uint64_t>(n);
        }
    }
    ::close(zero);
    return error;
}

int make_present(char *memory, uint64_t bytes) {
    const int error = populate(reinterpret_cast<uint64_t>(memory), bytes);
    return error == EINVAL ? touch_by_read(memory, bytes) : error;  // EINVAL: a kernel before 5.14
}

timespec realtime_in(int64_t ns) {
    timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    const int64_t sum = t.tv_nsec + ns;
    t.tv_sec += static_cast<time_t>(sum / 1000000000);
    t.tv_nsec = static_cast<long>(sum % 1000000000);
    return t;
}

}  // namespace

const Hf3fs *load_hf3fs(const char *path) {
    static std::mutex mutex;
    static auto &loaded = *new std::map<std::string, const Hf3fs *>();  // threads may outlive what ends at exit
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = loaded.find(path);
    if (found != loaded.end()) return found->second;
    const Hf3fs *table = open_library(path);
    if (table != nullptr) loaded.emplace(path, table);
    return table;
}

UsrbioConfig::UsrbioConfig(const el_usrbio_config &config)
    : rings(config.rings == 0 ? 2 : std::min(config.rings, 64u)),
      depth(config.depth == 0 ? 16 : std::min(config.depth, 1024u)),
      deadline_ms(config.deadline_ms == 0 ? 90000 : config.deadline_ms),
      io_bytes(config.io_bytes == 0 ? 4 << 20 : std::min<uint64_t>(std::max<uint64_t>(config.io_bytes, 4096), 256 << 20)),
      library(config.library), mount(config.mount) {}

bool UsrbioConfig::operator==(const UsrbioConfig &other) const {
    return rings == other.rings && depth == other.depth && deadline_ms == other.deadline_ms &&
           io_bytes == other.io_bytes && library == other.library && mount == other.mount;
}

bool Channel::open(const UsrbioConfig &config, UsrbioFailure &failure) {
    close();
    library_ = load_hf3fs(config.library.c_str());
    if (library_ == nullptr) {
        failure = {EL_USRBIO_LIBRARY, ENOENT};
        return false;
    }
    if (!make_buffer(config, failure)) return false;
    // Slots of completed IOs stay taken until they are reaped, hence twice the window.
    const int entries = static_cast<int>(2 * config.depth);
    ior_ = Hf3fsIor{};
    const int result = library_->iorcreate4(&ior_, config.mount.c_str(), entries, true, kIoDepth, 0, -1, 0);
    if (result != 0) {
        failure = {EL_USRBIO_RING, -result};
        close();
        return false;
    }
    ring_made_ = true;
    return true;
}

bool Channel::make_buffer(const UsrbioConfig &config, UsrbioFailure &failure) {
    slot_bytes_ = config.slot_bytes();
    const uint64_t bytes = slot_bytes_ * config.depth;
    bytes_ = bytes;
    if (config.mount.size() >= sizeof iov_.mount_point) {
        failure = {EL_USRBIO_BUFFER, ENAMETOOLONG};
        return false;
    }
    if (!shared_memory_has_room(bytes)) {
        failure = {EL_USRBIO_MEMORY, ENOSPC};
        return false;
    }
    iov_ = Hf3fsIov{};
    const int result = library_->iovcreate(&iov_, config.mount.c_str(), bytes, 0, -1);
    if (result != 0) {
        failure = {EL_USRBIO_BUFFER, -result};
        return false;
    }
    buffer_made_ = true;
    library_->iovunlink(&iov_);  // the daemon has it open; a crash leaves nothing in /dev/shm
    const int error = make_present(reinterpret_cast<char *>(iov_.base), bytes);
    if (error != 0) {
        failure = {EL_USRBIO_MEMORY, error};
        close();
        return false;
    }
    return true;
}

void Channel::pin(const DeviceRuntime &runtime) {
    if (pin_tried_) return;
    pin_tried_ = true;
    if (checked(runtime, runtime.HostRegister(iov_.base, bytes_, kHostPortable)) == 0) pinned_by_ = &runtime;
}

void Channel::close() {
    if (pinned_by_ != nullptr) checked(*pinned_by_, pinned_by_->HostUnregister(iov_.base));
    pinned_by_ = nullptr;
    pin_tried_ = false;
    if (ring_made_) library_->iordestroy(&ior_);
    if (buffer_made_) library_->iovdestroy(&iov_);
    ring_made_ = buffer_made_ = false;
}

int Channel::read(uint32_t slot, int fd, uint64_t offset, uint64_t at, uint64_t bytes) {
    const auto *userdata = reinterpret_cast<const void *>(uintptr_t{slot} + 1);
    const int result = library_->prep_io(&ior_, &iov_, true, memory(slot) + at, fd, offset, bytes, userdata);
    if (result < 0) return -result;
    library_->submit_ios(&ior_);
    return 0;
}

int Channel::reap(Hf3fsCqe *cqes, int capacity, int64_t timeout_ns) {
    const timespec until = realtime_in(timeout_ns);
    const int n = library_->wait_for_ios(&ior_, cqes, capacity, timeout_ns > 0 ? 1 : 0, &until);
    return std::max(n, 0);
}

}  // namespace el
