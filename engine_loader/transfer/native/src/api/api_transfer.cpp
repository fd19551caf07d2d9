// The transfers' part of the C interface: submit, wait, look, cancel, release.
#include <algorithm>
#include <errno.h>
#include <new>
#include <string.h>

#include "api/api.h"
#include "device/device_ring.h"
#include "core/planner.h"
#include "readers/readers.h"
#include "core/transfer.h"
#include "usrbio/usrbio_channel.h"
#include "core/worker.h"

namespace el {
namespace {

// Where el_file.flags have the powers of two of O_DIRECT's alignments; files on 3FS have a number there.
constexpr uint32_t kOffsetBitsAt = 8, kMemoryBitsAt = 13;
// Less than this is not worth the calls.
constexpr uint64_t kHugePagesFrom = 2 << 20;

bool usable_file(ReaderThreads &readers, const el_file &file) {
    Lock lock(readers.mutex);
    return file.mode != EL_USRBIO || (file.flags >> 8) < readers.usrbio.size();
}

void copy_file(ReaderThreads &readers, const el_file &from, File &to) {
    to.fd = from.fd;
    to.direct_fd = from.direct_fd;
    to.size = from.size;
    to.wide = (from.flags & EL_FILE_WIDE) != 0;
    to.remote = (from.flags & EL_FILE_REMOTE) != 0;
    if (from.mode == EL_MEMORY) {
        to.mode = EL_MEMORY;
        to.memory = from.memory;
        return;
    }
    if (from.mode == EL_USRBIO) {
        Lock lock(readers.mutex);
        to.mode = EL_USRBIO;
        to.usrbio = readers.usrbio[from.flags >> 8].get();
        return;
    }
    const uint32_t offset_bits = from.flags >> kOffsetBitsAt & 31, memory_bits = from.flags >> kMemoryBitsAt & 31;
    if (offset_bits != 0) to.limits.offset = 1u << offset_bits;
    if (memory_bits != 0) to.limits.memory = 1u << memory_bits;
    const bool direct = from.direct_fd >= 0 && to.limits.offset <= kLargestSector;
    to.mode = direct ? from.mode : static_cast<uint32_t>(EL_BUFFERED);
}

std::unique_ptr<Transfer> plan(ReaderThreads &readers, const el_file *files, uint32_t n_files, const el_extent *extents,
                               uint64_t n_extents, uint32_t flags) {
    auto transfer = std::make_unique<Transfer>(readers);
    transfer->files = std::make_unique<File[]>(n_files);
    transfer->n_files = n_files;
    for (uint32_t i = 0; i < n_files; i++) copy_file(readers, files[i], transfer->files[i]);
    // Copies take no time, and free what others wait for.
    if ((flags & EL_FIRST) != 0) transfer->urgency = n_files > 0 && files[0].mode == EL_MEMORY ? 2 : 1;
    plan_reads(*transfer, extents, n_extents, flags);
    return transfer;
}

HugePages huge_pages_for(const ReaderThreads &readers, const Transfer &transfer) {
    uint64_t bytes = 0;
    for (const uint64_t remaining : transfer.remaining) bytes += remaining;
    if (bytes < kHugePagesFrom) return HugePages::never;
    if ((readers.config.flags & EL_ALWAYS_HUGE_PAGES) != 0) return HugePages::always;
    return (readers.config.flags & EL_HUGE_PAGES) != 0 ? HugePages::where_quicker : HugePages::never;
}

void open_destinations(const ReaderThreads &readers, Transfer &transfer, const el_extent *extents, uint64_t n_extents) {
    const HugePages use = huge_pages_for(readers, transfer);
    if (use != HugePages::never) transfer.destinations.open(destinations(extents, n_extents), use);
}

int start(ReaderThreads &readers, std::unique_ptr<Transfer> transfer, el_transfer **out) {
    Lock lock(readers.mutex);
    const int error = readers.closing ? 0 : start_workers(readers, *transfer);
    if (readers.closing || error != 0) {
        lock.unlock();  // the transfer's end may free the ReaderThreads
        transfer.reset();
        errno = error;
        return error != 0 ? EL_E_THREAD : EL_E_CLOSED;
    }
    enqueue(*transfer);
    *out = handle(transfer.release());
    return EL_OK;
}

// Who has the destinations: a device, and the stream that used them last; or nobody but the caller.
struct Owner {
    DeviceRing *device = nullptr;
    DeviceStream stream = nullptr;
};

DeviceRing *device_of(ReaderThreads &readers, uint32_t number) {
    Lock lock(readers.mutex);
    return number < readers.devices.size() ? readers.devices[number].get() : nullptr;
}

int submit(ReaderThreads &readers, const el_file *files, uint32_t n_files, const el_extent *extents, uint64_t n_extents,
           uint32_t flags, Owner owner, el_transfer **out) {
    if (out == nullptr || (n_files > 0 && files == nullptr) || (n_extents > 0 && extents == nullptr)) return EL_E_ARGUMENT;
    if (!valid_plan(files, n_files, extents, n_extents)) return EL_E_ARGUMENT;
    for (uint32_t i = 0; i < n_files; i++) {
        if (!usable_file(readers, files[i])) return EL_E_ARGUMENT;
    }
    try {
        auto transfer = plan(readers, files, n_files, extents, n_extents, flags);
        if (owner.device != nullptr) {
            transfer->device = owner.device;
            el_device_failure failure{};
            const bool wants_slots = !transfer->narrow.empty() || !transfer->wide.empty();
            const bool slots = !wants_slots || owner.device->ensure_slots(failure);
            // Without slots and without an error, the threads are being closed: start() says so.
            const int error = slots ? owner.device->follow(owner.stream, *transfer) : failure.error;
            if (error != 0) {
                errno = error;
                return EL_E_DEVICE;
            }
        } else {
            open_destinations(readers, *transfer, extents, n_extents);
        }
        return start(readers, std::move(transfer), out);
    } catch (const std::bad_alloc &) {
        return EL_E_MEMORY;
    }
}

int usable(const Transfer *transfer) { return transfer == nullptr ? EL_E_CLOSED : usable(&transfer->readers); }

// A failed transfer is reported once nothing is written any more; after a deadline nobody can wait for that.
bool failed_for_good(const Transfer &transfer) {
    return transfer.phase == Phase::failed && (transfer.quiet || transfer.failure.kind == EL_FAIL_DEADLINE);
}

int wait_for(Transfer &transfer, int64_t extent, int64_t until, Lock &lock) {
    for (;;) {
        if (is_complete(transfer, extent)) return EL_OK;
        if (failed_for_good(transfer)) return EL_FAILED;
        const int64_t now = now_ns();
        const int64_t overdue = check_deadline(transfer, now);
        if (overdue <= now) return EL_FAILED;
        if (now >= until) return EL_TIMEOUT;
        wait_until(transfer, extent, std::min(until, overdue), lock);
    }
}

}  // namespace
}  // namespace el

using namespace el;

int el_direct_flags(int32_t direct_fd) {
    DirectLimits limits;
    if (!find_direct_limits(direct_fd, limits)) return EL_E_ARGUMENT;
    return __builtin_ctz(limits.offset) << kOffsetBitsAt | __builtin_ctz(limits.memory) << kMemoryBitsAt;
}

int el_submit(el_readers *submitting, const el_file *files, uint32_t n_files, const el_extent *extents,
              uint64_t n_extents, uint32_t flags, el_transfer **out) {
    ReaderThreads *readers = unwrap(submitting);
    const int state = usable(readers);
    return state == EL_OK ? submit(*readers, files, n_files, extents, n_extents, flags, Owner{}, out) : state;
}

int el_submit_to_device(el_readers *submitting, const el_file *files, uint32_t n_files, const el_extent *extents,
                        uint64_t n_extents, uint32_t flags, uint32_t device, uint64_t stream, el_transfer **out) {
    ReaderThreads *readers = unwrap(submitting);
    const int state = usable(readers);
    if (state != EL_OK) return state;
    DeviceRing *ring = device_of(*readers, device);
    if (ring == nullptr) return EL_E_ARGUMENT;
    const Owner owner{ring, reinterpret_cast<DeviceStream>(stream)};
    return submit(*readers, files, n_files, extents, n_extents, flags, owner, out);
}

int el_wait(el_transfer *waiting, int64_t extent, int64_t timeout_ms) {
    Transfer *transfer = unwrap(waiting);
    const int state = usable(transfer);
    if (state != EL_OK) return state;
    if (extent >= 0 && static_cast<uint64_t>(extent) >= transfer->n_extents) return EL_E_ARGUMENT;
    Lock lock(transfer->readers.mutex);
    if (is_complete(*transfer, extent)) return EL_OK;
    const int64_t begin = now_ns();
    const int result = wait_for(*transfer, extent, deadline_in(timeout_ms), lock);
    transfer->readers.wait_ns += static_cast<uint64_t>(now_ns() - begin);
    return result;
}

uint64_t el_bytes_done(el_transfer *asked) {
    Transfer *transfer = unwrap(asked);
    if (usable(transfer) != EL_OK) return 0;
    Lock lock(transfer->readers.mutex);
    return transfer->bytes_done;
}

uint64_t el_completed(el_transfer *asked, uint64_t from, uint32_t *out, uint64_t capacity) {
    Transfer *transfer = unwrap(asked);
    if (usable(transfer) != EL_OK) return 0;
    Lock lock(transfer->readers.mutex);
    const uint64_t n = transfer->completed.size();
    if (out != nullptr && from < n) {
        memcpy(out, transfer->completed.data() + from, std::min(capacity, n - from) * sizeof *out);
    }
    return n;
}

int el_cancel(el_transfer *cancelled, int64_t timeout_ms) {
    Transfer *transfer = unwrap(cancelled);
    const int state = usable(transfer);
    if (state != EL_OK) return state;
    const int64_t until = deadline_in(timeout_ms);
    Lock lock(transfer->readers.mutex);
    cancel(*transfer);
    while (!transfer->quiet) {
        if (now_ns() >= until) return EL_TIMEOUT;
        wait_until(*transfer, -1, until, lock);
    }
    return EL_OK;
}

int el_failure(el_transfer *asked, el_failure_info *out) {
    Transfer *transfer = unwrap(asked);
    const int state = usable(transfer);
    if (state != EL_OK) return state;
    if (out == nullptr) return EL_E_ARGUMENT;
    Lock lock(transfer->readers.mutex);
    *out = transfer->failure;
    out->in_flight = transfer->in_flight;
    return transfer->phase == Phase::failed ? EL_FAILED : EL_OK;
}

int el_retried(el_transfer *asked, el_failure_info *first) {
    Transfer *transfer = unwrap(asked);
    const int state = usable(transfer);
    if (state != EL_OK) return state;
    if (first == nullptr) return EL_E_ARGUMENT;
    Lock lock(transfer->readers.mutex);
    *first = transfer->retried;
    return static_cast<int>(std::min<uint32_t>(transfer->retries, INT32_MAX));
}

int el_file_times(el_transfer *asked, uint64_t *read_ns, uint64_t *bytes, uint32_t capacity) {
    Transfer *transfer = unwrap(asked);
    const int state = usable(transfer);
    if (state != EL_OK) return state;
    if (capacity > 0 && (read_ns == nullptr || bytes == nullptr)) return EL_E_ARGUMENT;
    for (uint32_t i = 0; i < std::min(capacity, transfer->n_files); i++) {
        read_ns[i] = transfer->files[i].read_ns.load(std::memory_order_relaxed);
        bytes[i] = transfer->files[i].read_bytes.load(std::memory_order_relaxed);
    }
    return EL_OK;
}

void el_release(el_transfer *released) {
    Transfer *transfer = unwrap(released);
    if (usable(transfer) != EL_OK) return;
    Lock lock(transfer->readers.mutex);
    cancel(*transfer);
    const bool last = dereference(*transfer);
    lock.unlock();
    if (last) delete transfer;
}
