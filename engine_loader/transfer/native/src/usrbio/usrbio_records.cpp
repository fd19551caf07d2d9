#include "usrbio/usrbio_records.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <unistd.h>
#include <vector>

namespace el {
namespace {

constexpr size_t kIdDigits = 32;

// The id that the name of a link begins with.
std::string id_of(const std::string &name) {
    std::string digits;
    for (const char c : name) {
        if (c == '-') continue;
        if (digits.size() == kIdDigits) break;
        digits += c;
    }
    return digits;
}

std::vector<std::string> links_of(const std::string &mount, const std::string &id) {
    const std::string path = mount + "/3fs-virt/iovs";
    std::vector<std::string> links;
    DIR *directory = opendir(path.c_str());
    if (directory == nullptr) return links;
    while (const dirent *entry = readdir(directory)) {
        if (id_of(entry->d_name) == id) links.push_back(path + "/" + entry->d_name);
    }
    closedir(directory);
    return links;
}

}  // namespace

std::string id_text(const uint8_t id[16]) {
    std::string text;
    char digits[3];
    for (int i = 0; i < 16; i++) {
        snprintf(digits, sizeof digits, "%02x", id[i]);
        text += digits;
    }
    return text;
}

void remove_links(const std::string &mount, const std::string &id) {
    for (const std::string &link : links_of(mount, id)) unlink(link.c_str());
}

void Record::write(const std::string &mount, const std::string &buffer_id, const std::string &ring_id) {
    // It gets its name when it is whole and locked, so that nobody takes it for that of a dead process.
    fd_ = open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd_ < 0) return;
    std::string text;
    for (const std::string &id : {ring_id, buffer_id}) {
        for (const std::string &link : links_of(mount, id)) text += link + "\n";
    }
    const std::string path = "/dev/shm/engine-loader-" + buffer_id + ".links", unnamed = "/proc/self/fd/" + std::to_string(fd_);
    const bool whole = flock(fd_, LOCK_EX | LOCK_NB) == 0 &&
                       ::write(fd_, text.data(), text.size()) == static_cast<ssize_t>(text.size());
    if (whole && linkat(AT_FDCWD, unnamed.c_str(), AT_FDCWD, path.c_str(), AT_SYMLINK_FOLLOW) == 0) path_ = path;
}

void Record::remove() {
    if (!path_.empty()) unlink(path_.c_str());
    if (fd_ >= 0) close(fd_);
    path_.clear();
    fd_ = -1;
}

}  // namespace el
