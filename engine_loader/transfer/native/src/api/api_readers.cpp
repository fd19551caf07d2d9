// The part of the C interface for the threads themselves: create, close, destroy, statistics.
#include "core/c_interface.h"

#include <algorithm>
#include <new>

#include "api/api.h"
#include "device/device_ring.h"
#include "threads/fork.h"
#include "core/transfer.h"
#include "usrbio/usrbio_channel.h"

namespace el {
namespace {

constexpr uint64_t kSmallestBlock = 4 << 10;
constexpr uint64_t kLargestBlock = 256 << 20;
constexpr uint64_t kLongestGap = kGapVectors * kDiscardBytes;
constexpr uint32_t kMostThreads = 1024;

template <typename T>
T or_default(T value, T tuned) {
    return value == 0 ? tuned : value;
}

// Blocks are multiples of 4 KiB, so that cuts fall between sectors.
uint64_t block_size(uint64_t asked, uint64_t tuned) {
    const uint64_t bytes = or_default(asked, tuned) / kSmallestBlock * kSmallestBlock;
    return std::min(std::max(bytes, kSmallestBlock), kLargestBlock);
}

// Tuned on 2 cores, ext4 on virtio and tmpfs; see docs/performance.md.
el_config with_defaults(el_config config) {
    config.cpus = nullptr;  // the caller's; copied apart
    config.threads = std::min(or_default(config.threads, 2u), kMostThreads);
    config.wide_threads = std::min(std::max(or_default(config.wide_threads, 8u), config.threads), kMostThreads);
    config.most_wide_threads = std::min(std::max(config.most_wide_threads, config.wide_threads), kMostThreads);
    config.max_tries = or_default(config.max_tries, 5u);
    config.retry_base_ms = or_default(config.retry_base_ms, 20u);
    config.retry_cap_ms = or_default(config.retry_cap_ms, 2000u);
    config.block_bytes = block_size(config.block_bytes, 4 << 20);
    config.direct_block_bytes = block_size(config.direct_block_bytes, 1536 << 10);
    // A call costs what reading 4 KiB does; an IO of its own what reading 128 KiB does.
    config.gap_bytes = std::min(or_default<uint64_t>(config.gap_bytes, 4 << 10), kLongestGap);
    config.wide_gap_bytes = std::min(or_default<uint64_t>(config.wide_gap_bytes, 128 << 10), kLongestGap);
    return config;
}

void stop_all(ReaderThreads &readers) {
    readers.closing = true;
    const std::vector<Transfer *> active = readers.active;  // cancel() removes from it
    for (Transfer *transfer : active) cancel(*transfer);
    readers.narrow_work.notify_all();
    readers.wide_work.notify_all();
    readers.ring_work.notify_all();
    for (const auto &device : readers.devices) device->wake();
}

void join_workers(ReaderThreads &readers, Lock &lock) {
    if (readers.joined) return;
    readers.joined = true;
    lock.unlock();
    for (const auto &worker : readers.workers) pthread_join(worker->thread, nullptr);
    for (const auto &device : readers.devices) device->join();
    for (const auto &device : readers.devices) device->close();
}

// Leave threads that are stuck to themselves; the last one frees the ReaderThreads.
void abandon_workers(ReaderThreads &readers) {
    Lock lock(readers.mutex);
    if (readers.joined) return;
    readers.joined = true;
    for (const auto &worker : readers.workers) pthread_detach(worker->thread);
    for (const auto &device : readers.devices) device->detach();
}

}  // namespace

ReaderThreads::ReaderThreads(const el_config &settings)
    : config(with_defaults(settings)), generation(process_generation()),
      cpus(settings.cpus, settings.cpus + (settings.cpus == nullptr ? 0 : settings.n_cpus)), pace(config.wide_threads, config.most_wide_threads) {
    workers.reserve(config.most_wide_threads);
}

ReaderThreads::~ReaderThreads() = default;

void unreference(ReaderThreads &readers) {
    if (readers.references.fetch_sub(1) == 1) delete &readers;
}

int usable(const ReaderThreads *readers) {
    if (readers == nullptr) return EL_E_CLOSED;
    return readers->generation == process_generation() ? EL_OK : EL_E_FORKED;
}

}  // namespace el

using namespace el;

uint32_t el_abi_version(void) { return EL_ABI_VERSION; }

el_readers *el_readers_create(const el_config *config, int *error) {
    int unused;
    int &result = error == nullptr ? unused : *error;
    result = EL_E_ARGUMENT;
    if (config == nullptr || config->struct_bytes != sizeof(el_config)) return nullptr;
    try {
        auto *readers = new ReaderThreads(*config);
        result = EL_OK;
        return handle(readers);
    } catch (const std::bad_alloc &) {
        result = EL_E_MEMORY;
        return nullptr;
    }
}

int el_readers_place(el_readers *placed, const uint32_t *cpus, uint32_t n_cpus) {
    ReaderThreads *readers = unwrap(placed);
    const int state = usable(readers);
    if (state != EL_OK) return state;
    if (cpus == nullptr && n_cpus > 0) return EL_E_ARGUMENT;
    try {
        std::vector<uint32_t> chosen(cpus, cpus + n_cpus);
        Lock lock(readers->mutex);
        readers->cpus.swap(chosen);
        return EL_OK;
    } catch (const std::bad_alloc &) {
        return EL_E_MEMORY;
    }
}

int el_readers_close(el_readers *closing, int64_t timeout_ms) {
    ReaderThreads *readers = unwrap(closing);
    const int state = usable(readers);
    if (state != EL_OK) return readers == nullptr ? EL_OK : state;
    const int64_t until = deadline_in(timeout_ms);
    Lock lock(readers->mutex);
    stop_all(*readers);
    while (readers->running > 0) {
        if (now_ns() >= until) return EL_TIMEOUT;
        readers->ended.wait_until(lock, until);
    }
    join_workers(*readers, lock);
    return EL_OK;
}

void el_readers_destroy(el_readers *dead) {
    ReaderThreads *readers = unwrap(dead);
    // A child keeps its copy of the memory: locks in it may be held by threads that it does not have.
    if (usable(readers) != EL_OK) return;
    if (el_readers_close(dead, 0) != EL_OK) abandon_workers(*readers);
    unreference(*readers);
}

int el_stats(el_readers *asked, el_stats_info *out) {
    ReaderThreads *readers = unwrap(asked);
    const int state = usable(readers);
    if (state != EL_OK) return state;
    if (out == nullptr) return EL_E_ARGUMENT;
    *out = el_stats_info{};
    Lock lock(readers->mutex);
    for (const auto &worker : readers->workers) worker->counters.add_to(*out);
    out->threads = readers->plain_workers;
    out->wait_ns = readers->wait_ns;
    out->bytes += readers->device_bytes;
    out->device_bytes = readers->device_bytes;
    return EL_OK;
}
