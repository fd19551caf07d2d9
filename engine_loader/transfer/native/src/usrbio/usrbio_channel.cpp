#include "usrbio/usrbio_channel.h"

#include <algorithm>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "memory/memory.h"

namespace el {
namespace {

// Places of the ring are freed in order. While one IO takes a minute (3FS tries a broken target again for so long), this
// many less one can come and go behind it; a place takes 96 bytes.
constexpr uint32_t kFewestEntries = 1024;

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

// The memory node of this thread; -1 where there is only one.
int own_node() {
    unsigned cpu = 0, node = 0;
    if (access("/sys/devices/system/node/node1", F_OK) != 0 || getcpu(&cpu, &node) != 0) return -1;
    return static_cast<int>(node);
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

UsrbioConfig::UsrbioConfig(const el_usrbio_config &config)
    : rings(config.rings == 0 ? 2 : std::min(config.rings, 64u)),
      depth(config.depth == 0 ? 16 : std::min(config.depth, 1024u)),
      deadline_ms(config.deadline_ms == 0 ? 90000 : config.deadline_ms),
      batch(config.batch == 0 ? 1 : std::min(config.batch, 1024u)),
      io_bytes(config.io_bytes == 0 ? 4 << 20 : std::min<uint64_t>(std::max<uint64_t>(config.io_bytes, 4096), 256 << 20)),
      slot_io_bytes(std::min<uint64_t>(std::max(config.slot_io_bytes, io_bytes), 256 << 20)), library(config.library),
      mount(config.mount) {}

bool UsrbioConfig::operator==(const UsrbioConfig &other) const { return same_ring(other) && io_bytes == other.io_bytes; }

bool UsrbioConfig::same_ring(const UsrbioConfig &other) const {
    return rings == other.rings && depth == other.depth && deadline_ms == other.deadline_ms && batch == other.batch &&
           slot_io_bytes == other.slot_io_bytes && library == other.library && mount == other.mount;
}

bool Channel::open(const UsrbioConfig &config, int node, UsrbioFailure &failure) {
    library_ = load_hf3fs(config.library.c_str());
    if (library_ == nullptr) {
        failure = {EL_USRBIO_LIBRARY, ENOENT};
        return false;
    }
    mount_ = config.mount;
    // The daemon removes the rings and buffers of a thread when the kernel closes this for it: after a crash, too.
    directory_ = ::open((mount_ + "/3fs-virt/iovs").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory_ < 0) {
        failure = {EL_USRBIO_BUFFER, errno};
        return false;
    }
    const int place = node >= 0 ? node : own_node();
    if (!make_buffer(config, place, failure) || !make_ring(config, place, failure)) {
        close();
        return false;
    }
    record_.write(mount_, id_text(iov_.id), id_text(ior_.iov.id));
    return true;
}

bool Channel::make_buffer(const UsrbioConfig &config, int node, UsrbioFailure &failure) {
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
    const int result = library_->iovcreate(&iov_, config.mount.c_str(), bytes, 0, node);
    if (result != 0) {
        failure = {EL_USRBIO_BUFFER, -result};
        return false;
    }
    buffer_made_ = true;
    library_->iovunlink(&iov_);  // the daemon has it open; a crash leaves nothing in /dev/shm
    const int error = make_present(reinterpret_cast<char *>(iov_.base), bytes);
    if (error == 0) return true;
    failure = {EL_USRBIO_MEMORY, error};
    return false;
}

bool Channel::make_ring(const UsrbioConfig &config, int node, UsrbioFailure &failure) {
    const int entries = static_cast<int>(std::max(kFewestEntries, 4 * config.depth));
    // Negative: batches of at most so many. Daemons that know no negative depth take batches of exactly one.
    int result = -EINVAL;
    for (const int io_depth : {-static_cast<int>(config.batch), 1}) {
        if (result != -EINVAL) break;
        ior_ = Hf3fsIor{};
        result = library_->iorcreate4(&ior_, config.mount.c_str(), entries, true, io_depth, 0, node, kForbidReadHoles);
    }
    ring_made_ = result == 0;
    if (ring_made_) return true;
    failure = {EL_USRBIO_RING, -result};
    const std::string id = id_text(ior_.iov.id);
    if (id.find_first_not_of('0') != std::string::npos) remove_links(mount_, id);  // it failed after it made the link
    return false;
}

void Channel::pin(const DeviceRuntime &runtime, int device) {
    if (pin_tried_) return;
    pin_tried_ = true;
    pinned_for_ = device;
    if (checked(runtime, runtime.HostRegister(iov_.base, bytes_, kHostPortable)) == 0) pinned_by_ = &runtime;
}

void Channel::unpin() {
    if (pinned_by_ == nullptr) return;
    // Else the runtime would make a context of its own on the first device.
    checked(*pinned_by_, pinned_by_->SetDevice(pinned_for_));
    checked(*pinned_by_, pinned_by_->HostUnregister(iov_.base));
    pinned_by_ = nullptr;
}

void Channel::close() {
    unpin();
    if (ring_made_) {
        // The library removes a link of another name than it made (its flags in base 10, not 2).
        remove_links(mount_, id_text(ior_.iov.id));
        library_->iordestroy(&ior_);
    }
    if (buffer_made_) library_->iovdestroy(&iov_);
    ring_made_ = buffer_made_ = false;
    record_.remove();
    if (directory_ >= 0) ::close(directory_);  // last: the daemon removes what is left of this thread
    directory_ = -1;
}

int Channel::prepare(uint32_t slot, int fd, uint64_t offset, uint64_t at, uint64_t bytes) {
    const auto *userdata = reinterpret_cast<const void *>(uintptr_t{slot} + 1);
    return std::max(0, -library_->prep_io(&ior_, &iov_, true, memory(slot) + at, fd, offset, bytes, userdata));
}

// The library knows no other clock than CLOCK_REALTIME for this. Slices are 100 ms at most, and a completion ends the wait
// whatever the clock says; a clock that is set back within a slice delays no byte, only the next look at deadlines and
// cancellation where nothing completes, by as much as it was set back.
int Channel::reap(Hf3fsCqe *cqes, int capacity, int64_t timeout_ns) {
    const timespec until = realtime_in(timeout_ns);
    const int n = library_->wait_for_ios(&ior_, cqes, capacity, timeout_ns > 0 ? 1 : 0, &until);
    return std::max(n, 0);
}

}  // namespace el
