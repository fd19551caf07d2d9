// The window's part of the C interface.
#include "window/window.h"

#include <algorithm>
#include <new>

#include "api/api.h"
#include "threads/fork.h"
#include "window/sharing.h"

using namespace el;

namespace {

struct WindowHandle {
    std::shared_ptr<Sharing> sharing;
};

struct SharedHandle {
    std::shared_ptr<SharedTransfer> transfer;
};

Sharing *usable(const el_window *window) {
    if (window == nullptr) return nullptr;
    Sharing *sharing = reinterpret_cast<const WindowHandle *>(window)->sharing.get();
    return sharing->generation() == process_generation() ? sharing : nullptr;
}

SharedTransfer *usable(const el_shared *shared) {
    if (shared == nullptr) return nullptr;
    SharedTransfer *transfer = reinterpret_cast<const SharedHandle *>(shared)->transfer.get();
    return transfer->sharing->generation() == process_generation() ? transfer : nullptr;
}

}  // namespace

int el_window_join(const el_window_config *config, el_window **out) {
    if (config == nullptr || out == nullptr || config->struct_bytes != sizeof(el_window_config)) return EL_E_ARGUMENT;
    if (config->directory == nullptr || config->copies == nullptr) return EL_E_ARGUMENT;
    try {
        auto handle = std::make_unique<WindowHandle>(WindowHandle{std::make_shared<Sharing>(*config)});
        const int error = handle->sharing->start(*config);
        if (error != 0) return error;
        *out = reinterpret_cast<el_window *>(handle.release());
        return EL_OK;
    } catch (const std::bad_alloc &) {
        return EL_E_MEMORY;
    }
}

void el_window_leave(el_window *window) {
    if (Sharing *sharing = usable(window)) sharing->close();
}

void el_window_free(el_window *window) {
    // In a forked child there are no threads to be ended, and the window is the parent's.
    if (usable(window) != nullptr) delete reinterpret_cast<WindowHandle *>(window);
}

int el_window_look(el_window *window, el_window_stats *out) {
    Sharing *sharing = usable(window);
    if (sharing == nullptr) return EL_E_CLOSED;
    if (out == nullptr) return EL_E_ARGUMENT;
    sharing->look(*out);
    return EL_OK;
}

int el_shared_submit(el_window *window, const el_shared_file *files, uint32_t n_files, const el_shared_region *regions,
                     uint32_t n_regions, const el_extent *extents, const uint32_t *region_of, uint64_t n_extents,
                     int32_t device, uint64_t stream, el_shared **out) {
    Sharing *sharing = usable(window);
    if (sharing == nullptr) return EL_E_CLOSED;
    if (out == nullptr || !valid_regions(files, n_files, regions, n_regions, extents, region_of, n_extents)) {
        return EL_E_ARGUMENT;
    }
    try {
        auto transfer = std::make_shared<SharedTransfer>(sharing->shared_from_this());
        for (uint32_t i = 0; i < n_files; i++) transfer->files.push_back(files[i].file);
        transfer->plan = cut_blocks(files, regions, extents, region_of, n_extents, sharing->slot_bytes());
        transfer->device = device;
        transfer->stream = stream;
        auto handle = std::make_unique<SharedHandle>(SharedHandle{transfer});
        const int result = sharing->submit(std::move(transfer));
        if (result == EL_OK) *out = reinterpret_cast<el_shared *>(handle.release());
        return result;
    } catch (const std::bad_alloc &) {
        return EL_E_MEMORY;
    }
}

int el_shared_wait(el_shared *shared, int64_t timeout_ms) {
    SharedTransfer *transfer = usable(shared);
    return transfer == nullptr ? EL_E_CLOSED : transfer->sharing->wait(*transfer, timeout_ms);
}

uint64_t el_shared_bytes_done(el_shared *shared) {
    SharedTransfer *transfer = usable(shared);
    if (transfer == nullptr) return 0;
    Lock lock(transfer->sharing->mutex);
    return transfer->bytes_done;
}

uint64_t el_shared_left(el_shared *shared, el_extent *out, uint64_t capacity) {
    SharedTransfer *transfer = usable(shared);
    if (transfer == nullptr) return 0;
    Lock lock(transfer->sharing->mutex);
    const uint64_t n = transfer->left.size();
    if (out != nullptr) std::copy_n(transfer->left.begin(), std::min(n, capacity), out);
    return n;
}

int el_shared_failure(el_shared *shared, el_failure_info *out) {
    SharedTransfer *transfer = usable(shared);
    if (transfer == nullptr) return EL_E_CLOSED;
    if (out == nullptr) return EL_E_ARGUMENT;
    Lock lock(transfer->sharing->mutex);
    *out = transfer->failure;
    out->in_flight = static_cast<uint32_t>(transfer->copying);
    return transfer->failure.kind == EL_FAIL_NONE ? EL_OK : EL_FAILED;
}

int el_shared_cancel(el_shared *shared, int64_t timeout_ms) {
    SharedTransfer *transfer = usable(shared);
    return transfer == nullptr ? EL_E_CLOSED : transfer->sharing->cancel(*transfer, timeout_ms);
}

void el_shared_release(el_shared *shared) {
    if (usable(shared) != nullptr) delete reinterpret_cast<SharedHandle *>(shared);
}

int el_window_next_read(el_window *window, int64_t timeout_ms, el_window_read *out) {
    Sharing *sharing = usable(window);
    if (sharing == nullptr) return EL_E_CLOSED;
    return out == nullptr ? static_cast<int>(EL_E_ARGUMENT) : sharing->next_read(timeout_ms, *out);
}

int el_window_answer(el_window *window, uint32_t number, int32_t complete) {
    Sharing *sharing = usable(window);
    return sharing == nullptr ? static_cast<int>(EL_E_CLOSED) : sharing->answer(number, complete != 0);
}
