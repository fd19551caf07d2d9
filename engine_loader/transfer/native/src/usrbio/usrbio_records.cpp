#include "usrbio/usrbio_records.h"

#include <dirent.h>
#include <fcntl.h>
#include <mutex>
#include <set>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

namespace el {
namespace {

constexpr size_t kIdDigits = 32;

// The directory of records, which belongs to this user alone; empty where there is none.
std::string records_directory() {
    const std::string path = "/dev/shm/.engine-loader-3fs-" + std::to_string(geteuid());
    mkdir(path.c_str(), 0700);
    struct stat status;
    if (lstat(path.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) return "";
    return status.st_uid == geteuid() && (status.st_mode & 077) == 0 ? path : "";
}

std::vector<std::string> names_in(const std::string &path) {
    std::vector<std::string> names;
    DIR *directory = opendir(path.c_str());
    if (directory == nullptr) return names;
    while (const dirent *entry = readdir(directory)) {
        if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
    }
    closedir(directory);
    return names;
}

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

struct Recorded {
    std::string mount, buffer_id, ring_id;
};

bool read_record(int fd, Recorded &recorded) {
    char text[1024];
    const ssize_t n = pread(fd, text, sizeof text, 0);
    if (n < static_cast<ssize_t>(2 * kIdDigits)) return false;
    const std::string all(text, static_cast<size_t>(n));
    recorded = {all.substr(2 * kIdDigits), all.substr(0, kIdDigits), all.substr(kIdDigits, kIdDigits)};
    return true;
}

void remove_if_dead(const std::string &path, const std::string &mount) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) return;
    Recorded recorded;
    const bool dead = flock(fd, LOCK_EX | LOCK_NB) == 0;  // the kernel let go of its owner's lock
    if (dead && read_record(fd, recorded) && recorded.mount == mount) {
        remove_links(mount, recorded.ring_id);
        remove_links(mount, recorded.buffer_id);
        unlink(path.c_str());
    }
    close(fd);
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
    const std::string directory = mount + "/3fs-virt/iovs";
    for (const std::string &name : names_in(directory)) {
        if (id_of(name) == id) unlink((directory + "/" + name).c_str());
    }
}

void Record::write(const std::string &mount, const std::string &buffer_id, const std::string &ring_id) {
    const std::string directory = records_directory();
    if (directory.empty()) return;
    // It gets its name when it is whole and locked, so that nobody takes it for that of a dead process.
    fd_ = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd_ < 0) return;
    const std::string text = buffer_id + ring_id + mount;
    const std::string path = directory + "/" + buffer_id, unnamed = "/proc/self/fd/" + std::to_string(fd_);
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

void remove_leftovers(const std::string &mount) {
    static auto &mutex = *new std::mutex();  // threads may outlive what ends at exit
    static auto &seen = *new std::set<std::string>();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!seen.insert(mount).second) return;
    }
    const std::string directory = records_directory();
    if (directory.empty()) return;
    for (const std::string &name : names_in(directory)) remove_if_dead(directory + "/" + name, mount);
}

}  // namespace el
