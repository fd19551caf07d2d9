// The devices' part of the C interface, but for the transfers to them.
#include "device/device.h"

#include <new>
#include <stdio.h>

#include "api/api.h"
#include "device/device_ring.h"

namespace el {
namespace {

int find(const Engine &engine, const DeviceConfig &wanted) {
    for (size_t i = 0; i < engine.devices.size(); i++) {
        if (engine.devices[i]->config() == wanted) return static_cast<int>(i);
    }
    return -1;
}

int add(Engine &engine, const DeviceConfig &wanted, el_device_failure &failure) {
    {
        Lock lock(engine.mutex);
        const int there = find(engine, wanted);
        if (there >= 0) return there;
    }
    // Locking memory takes tenths of a second: without the mutex.
    auto ring = std::make_unique<DeviceRing>(engine, wanted);
    if (!ring->open(failure)) return EL_E_DEVICE;
    Lock lock(engine.mutex);
    const int there = find(engine, wanted);  // of another thread, meanwhile
    if (there >= 0 || engine.closing) {
        lock.unlock();
        return there >= 0 ? there : EL_E_CLOSED;
    }
    engine.devices.push_back(std::move(ring));
    const int error = engine.devices.back()->start();
    if (error == 0) return static_cast<int>(engine.devices.size() - 1);
    ring = std::move(engine.devices.back());
    engine.devices.pop_back();
    lock.unlock();
    failure = {EL_DEVICE_THREAD, error, ""};
    return EL_E_DEVICE;
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

int el_device_add(el_engine *adding, const el_device_config *config, el_device_failure *failure) {
    Engine *engine = unwrap(adding);
    const int state = usable(engine);
    if (state != EL_OK) return state;
    if (config == nullptr || config->struct_bytes != sizeof(el_device_config) || failure == nullptr) return EL_E_ARGUMENT;
    *failure = {};
    try {
        return add(*engine, DeviceConfig(*config), *failure);
    } catch (const std::bad_alloc &) {
        return EL_E_MEMORY;
    }
}

void el_device_error_text(el_engine *asked, uint32_t device, int32_t error, char *text, uint64_t capacity) {
    Engine *engine = unwrap(asked);
    if (usable(engine) != EL_OK || text == nullptr || capacity == 0) return;
    Lock lock(engine->mutex);
    const bool known = device < engine->devices.size();
    snprintf(text, capacity, "%s", known ? engine->devices[device]->runtime().GetErrorString(error) : "");
}
