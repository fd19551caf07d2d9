#include "window/joining.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "threads/sync.h"
#include "threads/threads.h"

namespace el {
namespace {

constexpr char kLock[] = "lock";
constexpr int64_t kAnswerNs = 300 * kMillisecond;  // a member that was stopped answers never
constexpr int64_t kPauseNs = 2 * kMillisecond;

// Names of sockets of this layout; windows of other layouts are other windows.
std::string prefix() {
    char text[40];
    snprintf(text, sizeof text, "window-%zx-", static_cast<size_t>(kWindowMagic + sizeof(WindowHeader) + sizeof(WindowSlot)));
    return text;
}

class Descriptor {
  public:
    explicit Descriptor(int fd = -1) : fd_(fd) {}
    ~Descriptor() {
        if (fd_ >= 0) close(fd_);
    }
    Descriptor(const Descriptor &) = delete;
    Descriptor &operator=(const Descriptor &) = delete;
    int get() const { return fd_; }
    int release() {
        const int fd = fd_;
        fd_ = -1;
        return fd;
    }

  private:
    int fd_;
};

// A path by the directory's descriptor: that of a socket has room for 107 characters.
sockaddr_un address_of(int directory, const std::string &name) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%s", directory, name.c_str());
    return address;
}

bool is_of_this_user(int socket) {
    ucred other{};
    socklen_t length = sizeof other;
    return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &other, &length) == 0 && other.uid == geteuid();
}

void limit(int socket, int64_t ns) {
    timeval time{};
    time.tv_sec = static_cast<time_t>(ns / 1000000000);
    time.tv_usec = static_cast<suseconds_t>(ns % 1000000000 / 1000);
    setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
    setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
}

// A message of one byte with room for a descriptor beside it.
class DescriptorMessage {
  public:
    DescriptorMessage() {
        message.msg_iov = &vector_;
        message.msg_iovlen = 1;
        message.msg_control = control_.bytes;
        message.msg_controllen = sizeof control_.bytes;
    }
    DescriptorMessage(const DescriptorMessage &) = delete;
    DescriptorMessage &operator=(const DescriptorMessage &) = delete;

    msghdr message{};

  private:
    union Control {
        cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    };

    char byte_ = 'w';
    iovec vector_{&byte_, 1};
    Control control_{};
};

void send_descriptor(int socket, int fd) {
    DescriptorMessage sent;
    cmsghdr *header = CMSG_FIRSTHDR(&sent.message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    if (sendmsg(socket, &sent.message, MSG_NOSIGNAL) < 0) return;  // the other one will ask somebody else
}

int receive_descriptor(int socket) {
    DescriptorMessage received;
    if (recvmsg(socket, &received.message, MSG_CMSG_CLOEXEC) <= 0) return -1;
    const cmsghdr *header = CMSG_FIRSTHDR(&received.message);
    if (header == nullptr || header->cmsg_type != SCM_RIGHTS) return -1;
    int fd = -1;
    memcpy(&fd, CMSG_DATA(header), sizeof fd);
    return fd;
}

// The window of the member that answers at a socket; -1 where it has ended (`gone`) or does not answer.
int ask(int directory, const std::string &name, int64_t ns, bool &gone) {
    Descriptor asking(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (asking.get() < 0) return -1;
    limit(asking.get(), ns);
    const sockaddr_un address = address_of(directory, name);
    if (connect(asking.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) != 0) {
        gone = errno == ECONNREFUSED;
        return -1;
    }
    return is_of_this_user(asking.get()) ? receive_descriptor(asking.get()) : -1;
}

// One at a time looks for a window or makes one. The lock goes with the descriptor, however its process ends.
int lock_directory(int directory, int64_t until) {
    Descriptor lock(openat(directory, kLock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (lock.get() < 0) return -errno;
    while (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK && errno != EINTR) return -errno;
        if (now_ns() >= until) return -ETIMEDOUT;
        const timespec pause{0, kPauseNs};
        nanosleep(&pause, nullptr);
    }
    return lock.release();
}

}  // namespace

int Membership::join(const WindowPlace &place) {
    const int64_t until = now_ns() + place.patience_ns;
    window_.patience(place.patience_ns);
    directory_ = open(place.directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (directory_ < 0) return errno;
    const int lock = lock_directory(directory_, until);
    if (lock < 0) return -lock;
    const Descriptor held(lock);
    const int error = find_or_make(directory_, place, until);
    return error != 0 ? error : start();
}

int Membership::find_or_make(int directory, const WindowPlace &place, int64_t until) {
    const int found = ask_others(directory, until);
    if (found >= 0) {
        const int error = window_.attach(found);
        if (error == 0) return 0;
        close(found);
    }
    return make(place);
}

int Membership::ask_others(int directory, int64_t until) {
    const int copy = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (copy < 0) return -1;
    DIR *entries = fdopendir(copy);
    if (entries == nullptr) {
        close(copy);
        return -1;
    }
    const std::string ours = prefix();
    int found = -1;
    while (const dirent *entry = found < 0 ? readdir(entries) : nullptr) {
        const std::string name = entry->d_name;
        if (name.compare(0, 7, "window-") != 0) continue;
        bool gone = false;
        const int64_t left = until - now_ns();
        if (left <= 0) break;
        const int fd = ask(directory, name, left < kAnswerNs ? left : kAnswerNs, gone);
        if (gone) unlinkat(directory, name.c_str(), 0);
        if (name.compare(0, ours.size(), ours) == 0) {
            found = fd;
        } else if (fd >= 0) {
            close(fd);
        }
    }
    closedir(entries);
    return found;
}

int Membership::make(const WindowPlace &place) {
    const int fd = memfd_create("engine-loader-window", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return errno;
    int error = NodeWindow::format(fd, place.bytes, place.slot_bytes);
    if (error == 0) error = window_.attach(fd);
    if (error != 0) close(fd);
    made_ = error == 0;
    return error;
}

int Membership::listen_in(int directory) {
    Descriptor listening(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    uint64_t number = 0;
    if (listening.get() < 0 || getrandom(&number, sizeof number, 0) != sizeof number) return errno;
    char text[24];
    snprintf(text, sizeof text, "%016lx", static_cast<unsigned long>(number));
    name_ = prefix() + text;
    const sockaddr_un address = address_of(directory, name_);
    if (bind(listening.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) != 0) {
        name_.clear();
        return errno;
    }
    if (listen(listening.get(), 64) != 0) return errno;
    listening_ = listening.release();
    return 0;
}

int Membership::start() {
    const int error = listen_in(directory_);
    if (error != 0) return error;
    ending_ = eventfd(0, EFD_CLOEXEC);
    if (ending_ < 0) return errno;
    const int failed = start_thread(thread_, {}, "el-window", serve, this);
    if (failed != 0) return failed;
    started_ = true;
    int entered;
    while ((entered = entered_.load(std::memory_order_acquire)) < 0) {
        const timespec pause{0, kPauseNs / 20};
        nanosleep(&pause, nullptr);
    }
    return entered;
}

void *Membership::serve(void *self) {
    auto *member = static_cast<Membership *>(self);
    const int error = member->window_.enter();
    member->entered_.store(error, std::memory_order_release);
    if (error == 0) {
        member->answer_until_asked_to_end();
        member->window_.leave();
    }
    return nullptr;
}

void Membership::answer_until_asked_to_end() {
    for (;;) {
        pollfd events[2] = {{listening_, POLLIN, 0}, {ending_, POLLIN, 0}};
        if (poll(events, 2, -1) < 0) continue;
        if (events[1].revents != 0) return;
        if (events[0].revents != 0) answer_one();
    }
}

void Membership::answer_one() {
    const Descriptor asking(accept4(listening_, nullptr, nullptr, SOCK_CLOEXEC));
    if (asking.get() < 0 || !is_of_this_user(asking.get())) return;
    limit(asking.get(), kAnswerNs);
    send_descriptor(asking.get(), window_.fd());
}

Membership::~Membership() {
    if (started_) {
        const uint64_t one = 1;
        while (write(ending_, &one, sizeof one) < 0 && errno == EINTR) continue;
        pthread_join(thread_, nullptr);
    }
    if (!name_.empty()) unlinkat(directory_, name_.c_str(), 0);
    for (const int fd : {listening_, ending_, directory_}) {
        if (fd >= 0) close(fd);
    }
}

}  // namespace el
