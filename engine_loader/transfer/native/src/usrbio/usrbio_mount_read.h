// Reads through the mount where USRBIO gave no byte, each on a thread of its own: a daemon that hangs keeps that thread, and
// nobody else.
#pragma once

#include <atomic>
#include <memory>
#include <stdint.h>
#include <vector>

namespace el {

struct MountRead {
    std::vector<char> bytes;
    uint64_t offset = 0;  // in the file
    int fd = -1;          // a duplicate
    // What came of it, once `done`.
    std::atomic<bool> done{false};
    int error = 0;     // errno
    uint64_t got = 0;  // bytes; fewer than asked: the file ends there
    uint64_t hole = 0; // bytes before what looks like a hole; `got` where nothing does

    bool has_hole() const { return hole < got; }
};

// Begin to read `bytes` bytes.
std::shared_ptr<MountRead> read_by_mount(int fd, uint64_t offset, uint64_t bytes, const std::vector<uint32_t> &cpus);

}  // namespace el
