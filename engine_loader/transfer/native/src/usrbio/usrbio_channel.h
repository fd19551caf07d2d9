// A ring with its buffer: what one thread reads files of one 3FS mount by.
#pragma once

#include <string>

#include "device/device_runtime.h"
#include "usrbio/usrbio.h"
#include "usrbio/usrbio_library.h"
#include "usrbio/usrbio_records.h"

namespace el {

// One el_usrbio_config, with strings of its own.
struct UsrbioConfig {
    explicit UsrbioConfig(const el_usrbio_config &config);
    bool operator==(const UsrbioConfig &other) const;
    // Whether a ring for the one serves the other.
    bool same_ring(const UsrbioConfig &other) const;

    // Rows stay whole, so a run may reach a quarter beyond its cell (planner.cpp).
    uint64_t slot_bytes() const { return (slot_io_bytes + slot_io_bytes / 4 + 4095) / 4096 * 4096; }

    uint32_t rings, depth, deadline_ms, batch;
    uint64_t io_bytes, slot_io_bytes;
    std::string library, mount;
};

struct UsrbioFailure {
    uint32_t step;  // EL_USRBIO_...
    int error;
};

// Made, opened and closed by one thread (usrbio_keeper.h), since the daemon knows by it what belongs together; read by
// another one in between.
class Channel {
  public:
    Channel() = default;
    Channel(const Channel &) = delete;
    Channel &operator=(const Channel &) = delete;

    // Make buffer and ring; all pages of the buffer are present afterwards. `node`: of memory for the buffer; -1: that of
    // this thread. False with `failure` set, and nothing kept. Calls into the mount: hangs where its daemon does.
    bool open(const UsrbioConfig &config, int node, UsrbioFailure &failure);
    // A read that the daemon still carries out lands in shared memory that nobody uses any more. Calls into the mount.
    void close();

    // Lock the buffer's pages for copies to a device, best effort: from others they are slower.
    void pin(const DeviceRuntime &runtime, int device);

    char *memory(uint32_t slot) const { return reinterpret_cast<char *>(iov_.base) + slot * slot_bytes_; }
    // 0, or an errno: EAGAIN when the ring is full. The daemon may begin at once, and surely does after submit().
    int prepare(uint32_t slot, int fd, uint64_t offset, uint64_t at, uint64_t bytes);
    void submit() { library_->submit_ios(&ior_); }
    // Fill `cqes` with up to `capacity` completions; waits for the first one, up to `timeout_ns`. The slot is userdata.
    int reap(Hf3fsCqe *cqes, int capacity, int64_t timeout_ns);

  private:
    bool make_buffer(const UsrbioConfig &config, int node, UsrbioFailure &failure);
    bool make_ring(const UsrbioConfig &config, int node, UsrbioFailure &failure);
    void unpin();

    const Hf3fs *library_ = nullptr;
    std::string mount_;
    Hf3fsIov iov_{};
    Hf3fsIor ior_{};
    Record record_;
    uint64_t slot_bytes_ = 0;
    uint64_t bytes_ = 0;
    int directory_ = -1;
    const DeviceRuntime *pinned_by_ = nullptr;
    int pinned_for_ = 0;
    bool pin_tried_ = false;
    bool buffer_made_ = false;
    bool ring_made_ = false;
};

}  // namespace el
