// A ring with its buffer: what one thread reads files of one 3FS mount by.
#pragma once

#include <string>

#include "device/device_runtime.h"
#include "usrbio/usrbio.h"
#include "usrbio/usrbio_abi.h"

namespace el {

// One el_usrbio_config, with strings of its own.
struct UsrbioConfig {
    explicit UsrbioConfig(const el_usrbio_config &config);
    bool operator==(const UsrbioConfig &other) const;

    // Rows stay whole, so a run may reach a quarter beyond its cell (planner.cpp).
    uint64_t slot_bytes() const { return (io_bytes + io_bytes / 4 + 4095) / 4096 * 4096; }

    uint32_t rings, depth, deadline_ms;
    uint64_t io_bytes;
    std::string library, mount;
};

struct UsrbioFailure {
    uint32_t step;  // EL_USRBIO_...
    int error;
};

class Channel {
  public:
    Channel() = default;
    ~Channel() { close(); }
    Channel(const Channel &) = delete;
    Channel &operator=(const Channel &) = delete;

    // Make buffer and ring; all pages of the buffer are present afterwards. False with `failure` set.
    bool open(const UsrbioConfig &config, UsrbioFailure &failure);
    bool is_open() const { return ring_made_; }
    // Lock the buffer's pages for copies to devices, best effort: from others they are slower.
    void pin(const DeviceRuntime &runtime);
    // A read that the daemon still carries out lands in shared memory that nobody uses any more.
    void close();

    char *memory(uint32_t slot) const { return reinterpret_cast<char *>(iov_.base) + slot * slot_bytes_; }
    // 0, or an errno: EAGAIN when the ring is full.
    int read(uint32_t slot, int fd, uint64_t offset, uint64_t at, uint64_t bytes);
    // Fill `cqes` with up to `capacity` completions; waits for the first one, up to `timeout_ns`. The slot is userdata.
    int reap(Hf3fsCqe *cqes, int capacity, int64_t timeout_ns);

  private:
    bool make_buffer(const UsrbioConfig &config, UsrbioFailure &failure);

    const Hf3fs *library_ = nullptr;
    Hf3fsIov iov_{};
    Hf3fsIor ior_{};
    uint64_t slot_bytes_ = 0;
    uint64_t bytes_ = 0;
    const DeviceRuntime *pinned_by_ = nullptr;
    bool pin_tried_ = false;
    bool buffer_made_ = false;
    bool ring_made_ = false;
};

}  // namespace el
