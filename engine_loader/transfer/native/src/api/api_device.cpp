// The devices' part of the C interface, but for the transfers to them.
#include "device/device.h"

#include <new>
#include <stdio.h>

#include "api/api.h"
#include "device/device_ring.h"

namespace el {
namespace {

int find(const ReaderThreads &readers, const DeviceConfig &wanted) {
    for (size_t i = 0; i < readers.devices.size(); i++) {
        if (readers.devices[i]->config() == wanted) return static_cast<int>(i);
    }
    return -1;
}

int add(ReaderThreads &readers, const DeviceConfig &wanted, bool slots, el_device_failure &failure) {
    {
        Lock lock(readers.mutex);
        const int there = find(readers, wanted);
        if (there >= 0) return there;
    }
    auto ring = std::make_unique<DeviceRing>(readers, wanted);
    // Locking memory takes tenths of a second: without the mutex.
    if (!ring->open(failure) || (slots && !ring->ensure_slots(failure))) return EL_E_DEVICE;
    Lock lock(readers.mutex);
    const int there = find(readers, wanted);  // of another thread, meanwhile
    if (there >= 0 || readers.closing) {
        lock.unlock();
        return there >= 0 ? there : EL_E_CLOSED;
    }
    readers.devices.push_back(std::move(ring));
    const int error = readers.devices.back()->start();
    if (error == 0) return static_cast<int>(readers.devices.size() - 1);
    ring = std::move(readers.devices.back());
    readers.devices.pop_back();
    lock.unlock();
    failure = {EL_DEVICE_THREAD, error, ""};
    return EL_E_DEVICE;
}

// The device may have been there without slots.
int add_with_slots(ReaderThreads &readers, const DeviceConfig &wanted, el_device_failure &failure) {
    const int number = add(readers, wanted, true, failure);
    if (number < 0) return number;
    DeviceRing *ring;
    {
        Lock lock(readers.mutex);
        ring = readers.devices[static_cast<size_t>(number)].get();
    }
    if (ring->ensure_slots(failure)) return number;
    Lock lock(readers.mutex);
    return readers.closing ? EL_E_CLOSED : EL_E_DEVICE;
}

}  // namespace
}  // namespace el

using namespace el;

int el_device_runtime(const char *library, el_device_failure *failure) {
    if (failure == nullptr) return EL_E_ARGUMENT;
    *failure = {};
    std::string problem;
    if (find_device_runtime(library == nullptr ? "" : library, problem) != nullptr) return EL_OK;
    failure->step = EL_DEVICE_LIBRARY;
    snprintf(failure->text, sizeof failure->text, "%s", problem.c_str());
    return EL_E_DEVICE;
}

int el_device_add(el_readers *adding, const el_device_config *config, el_device_failure *failure) {
    ReaderThreads *readers = unwrap(adding);
    const int state = usable(readers);
    if (state != EL_OK) return state;
    if (config == nullptr || config->struct_bytes != sizeof(el_device_config) || failure == nullptr) return EL_E_ARGUMENT;
    *failure = {};
    try {
        const bool slots = (config->flags & EL_DEVICE_NO_SLOTS) == 0;
        const DeviceConfig wanted(*config);
        return slots ? add_with_slots(*readers, wanted, *failure) : add(*readers, wanted, false, *failure);
    } catch (const std::bad_alloc &) {
        return EL_E_MEMORY;
    }
}

void el_device_error_text(el_readers *asked, uint32_t device, int32_t error, char *text, uint64_t capacity) {
    ReaderThreads *readers = unwrap(asked);
    if (usable(readers) != EL_OK || text == nullptr || capacity == 0) return;
    Lock lock(readers->mutex);
    const bool known = device < readers->devices.size();
    snprintf(text, capacity, "%s", known ? readers->devices[device]->runtime().GetErrorString(error) : "");
}
