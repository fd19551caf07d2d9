// Records of what this user's processes have registered with the daemon, so that another start can remove what dead ones
// left: a file for each channel in /dev/shm, which lists its links and is locked for as long as its process lives. It is the
// ledger of sources/threefs/links.py, whose remove_dead() cleans up.
#pragma once

#include <stdint.h>
#include <string>

namespace el {

// The hexadecimal digits of an id, as they stand in the names of links, but for the dashes there.
std::string id_text(const uint8_t id[16]);

// Remove the links below `<mount>/3fs-virt/iovs` that have this id. It calls into the mount, so it may hang.
void remove_links(const std::string &mount, const std::string &id);

class Record {
  public:
    Record() = default;
    ~Record() { remove(); }
    Record(const Record &) = delete;
    Record &operator=(const Record &) = delete;

    // Best effort: without a record, only the daemon cleans up after a crash.
    void write(const std::string &mount, const std::string &buffer_id, const std::string &ring_id);
    void remove();

  private:
    int fd_ = -1;
    std::string path_;
};

}  // namespace el
