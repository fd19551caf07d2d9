#include "readers/io.h"

#include <algorithm>
#include <errno.h>
#include <sys/uio.h>

#include "core/transfer.h"

namespace el {

bool may_pass(int error) {
    switch (error) {
        case EINTR:
        case EAGAIN:
        case EIO:
        case ESTALE:
        case ETIMEDOUT:
        case EREMOTEIO:
            return true;
        default:
            return false;
    }
}

namespace {

// Shows waiters which system call this worker is in, for as long as it makes no progress.
class Watched {
  public:
    Watched(Worker &worker, uint32_t file, uint32_t extent, uint64_t offset) : worker_(worker) {
        worker_.io_file.store(file, std::memory_order_relaxed);
        worker_.io_extent.store(extent, std::memory_order_relaxed);
        progress(offset, now_ns());
    }
    ~Watched() { worker_.io_since.store(0, std::memory_order_release); }
    void progress(uint64_t offset, int64_t now) {
        since_ = now;
        worker_.io_offset.store(offset, std::memory_order_relaxed);
        worker_.io_since.store(now, std::memory_order_release);
    }
    int64_t since() const { return since_; }

  private:
    Worker &worker_;
    int64_t since_ = 0;
};

Outcome give_up(Reader reader, Position position, uint32_t kind, int error, uint32_t tries) {
    Lock lock(reader.transfer.readers.mutex);
    fail(reader.transfer, el_failure_info{kind, error, position.file, position.extent, position.offset, tries, 0});
    return Outcome::stopped;
}

// Pause before another try; ends early when the transfer is stopped.
void pause(Reader reader, uint32_t tries) {
    ReaderThreads &readers = reader.transfer.readers;
    const uint64_t doubled = uint64_t{readers.config.retry_base_ms} << std::min(tries - 1, 20u);
    const int64_t begin = now_ns();
    const int64_t end = begin + static_cast<int64_t>(std::min<uint64_t>(doubled, readers.config.retry_cap_ms)) * kMillisecond;
    Lock lock(readers.mutex);
    while (!reader.transfer.stop.load(std::memory_order_relaxed) && now_ns() < end) readers.stopped.wait_until(lock, end);
    reader.worker.counters.backoff_ns.add(static_cast<uint64_t>(now_ns() - begin));
}

// After a failed try: done when another one is due.
Outcome before_retry(Reader reader, Position position, int error, uint32_t tries, const Watched &watched) {
    const el_config &config = reader.transfer.readers.config;
    if (!may_pass(error)) return give_up(reader, position, EL_FAIL_IO, error, tries);
    if (tries >= config.max_tries) return give_up(reader, position, EL_FAIL_IO, error, tries);
    if (config.deadline_ms != 0 && now_ns() - watched.since() > config.deadline_ms * kMillisecond) {
        return give_up(reader, position, EL_FAIL_DEADLINE, error, tries);
    }
    reader.worker.counters.retries.add(1);
    {
        Lock lock(reader.transfer.readers.mutex);
        note_retry(reader.transfer, position, error);
    }
    // An interrupted call is not a sign of trouble; waiting would only lose time.
    if (error != EINTR || tries > 1) pause(reader, tries);
    return Outcome::done;
}

void advance(Request &request, uint64_t bytes) {
    while (bytes > 0) {
        iovec &front = *request.vectors;
        const uint64_t part = std::min<uint64_t>(bytes, front.iov_len);
        front.iov_base = static_cast<char *>(front.iov_base) + part;
        front.iov_len -= part;
        bytes -= part;
        if (front.iov_len > 0) return;
        request.vectors++;
        request.n_vectors--;
    }
}

ssize_t read_once(const Transfer &transfer, const Request &request) {
    const File &file = transfer.files[request.file];
    const int fd = request.direct ? file.direct_fd : file.fd;
    return preadv(fd, request.vectors, static_cast<int>(request.n_vectors), static_cast<off_t>(request.offset));
}

}  // namespace

Outcome read_all(Reader reader, Request request) {
    Counters &counters = reader.worker.counters;
    Watched watched(reader.worker, request.file, request.extent, request.offset);
    const uint64_t end = request.offset + request.needed;
    int64_t begin = watched.since();
    for (uint32_t tries = 0; request.offset < end;) {
        if (reader.transfer.stop.load(std::memory_order_relaxed)) return Outcome::stopped;
        const ssize_t n = read_once(reader.transfer, request);
        const int error = errno;
        const int64_t now = now_ns();
        reader.transfer.files[request.file].count(now - begin, n > 0 ? static_cast<uint64_t>(n) : 0);
        counters.read_ns.add(static_cast<uint64_t>(now - begin));
        counters.reads.add(1);
        begin = now;
        const Position position{request.file, request.extent, request.offset};
        if (n == 0) return give_up(reader, position, EL_FAIL_EOF, 0, tries + 1);
        if (n < 0) {
            if (error == EINVAL && request.direct) return Outcome::refused;
            if (before_retry(reader, position, error, ++tries, watched) != Outcome::done) return Outcome::stopped;
            begin = now_ns();
            continue;
        }
        uint64_t got = static_cast<uint64_t>(n);
        if (request.offset + got < end) {
            counters.short_reads.add(1);
            got -= got % request.granule;
            // Less than a sector: only a buffered read can go on from here.
            if (got == 0) return Outcome::refused;
            advance(request, got);
        }
        request.offset += got;
        tries = 0;
        watched.progress(request.offset, now);
    }
    return Outcome::done;
}

}  // namespace el
