// Records of what this user's processes have registered with the daemon, so that another start can remove what dead ones
// left: a file for each channel below /dev/shm, locked for as long as its process lives.
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

// Remove the links on this mount that dead processes recorded, and their records; once per process and mount.
void remove_leftovers(const std::string &mount);

}  // namespace el
