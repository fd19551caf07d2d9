#include "usrbio/usrbio_mount_read.h"

#include <algorithm>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "threads/threads.h"

namespace el {
namespace {

constexpr uint64_t kZeros = 4096;

void read_whole(MountRead &job) {
    while (job.got < job.bytes.size()) {
        const iovec rest{job.bytes.data() + job.got, job.bytes.size() - job.got};
        const ssize_t n = preadv(job.fd, &rest, 1, static_cast<off_t>(job.offset + job.got));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            job.error = n < 0 ? errno : 0;
            return;
        }
        job.got += static_cast<uint64_t>(n);
    }
}

// The mount fills what chunks lack with zeros, without a word: a part of a chunk that ends in zeros may be such a fill.
uint64_t find_hole(const MountRead &job, uint64_t chunk) {
    for (uint64_t begin = 0; begin < job.got;) {
        const uint64_t end = std::min(job.got, begin + chunk - (job.offset + begin) % chunk);
        uint64_t zeros = end;
        while (zeros > begin && job.bytes[zeros - 1] == 0) zeros--;
        if (end - zeros >= std::min(kZeros, end - begin)) return zeros;
        begin = end;
    }
    return job.got;
}

void *thread_main(void *argument) {
    const std::unique_ptr<std::shared_ptr<MountRead>> owned(static_cast<std::shared_ptr<MountRead> *>(argument));
    MountRead &job = **owned;
    struct stat status;
    const bool known = fstat(job.fd, &status) == 0 && status.st_blksize > 0;
    read_whole(job);
    job.hole = find_hole(job, known ? static_cast<uint64_t>(status.st_blksize) : kZeros);
    close(job.fd);
    job.done.store(true, std::memory_order_release);
    return nullptr;
}

}  // namespace

std::shared_ptr<MountRead> read_by_mount(int fd, uint64_t offset, uint64_t bytes, const std::vector<uint32_t> &cpus) {
    auto job = std::make_shared<MountRead>();
    job->bytes.resize(bytes);
    job->offset = offset;
    job->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);  // the owner may close its own while a read hangs
    auto own = std::make_unique<std::shared_ptr<MountRead>>(job);
    pthread_t thread;
    job->error = job->fd < 0 ? errno : start_thread(thread, cpus, "el-mount", thread_main, own.get());
    if (job->error == 0) {
        own.release();  // the thread's
        pthread_detach(thread);
        return job;
    }
    if (job->fd >= 0) close(job->fd);
    job->done.store(true, std::memory_order_release);
    return job;
}

}  // namespace el
