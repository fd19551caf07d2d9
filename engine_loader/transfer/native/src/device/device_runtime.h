// The runtime of CUDA or HIP, found in the process. No header of theirs is needed: the functions used here have had the
// same interface in every version, and the same in both.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string>
#include <utility>

namespace el {

using DeviceStream = void *;
using DeviceEvent = void *;

constexpr int kDeviceNotReady = 600;        // cudaErrorNotReady
constexpr int kHostToDevice = 1;            // cudaMemcpyHostToDevice
constexpr unsigned kStreamNonBlocking = 1;  // cudaStreamNonBlocking: no waiting for the default stream
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kHostPortable = 1;       // cudaHostRegisterPortable, cudaHostAllocPortable

struct DeviceRuntime {
    int (*SetDevice)(int device);
    int (*GetDevice)(int *device);
    int (*HostAlloc)(void **memory, size_t bytes, unsigned flags);
    int (*FreeHost)(void *memory);
    int (*HostRegister)(void *memory, size_t bytes, unsigned flags);
    int (*HostUnregister)(void *memory);
    int (*MemcpyAsync)(void *to, const void *from, size_t bytes, int kind, DeviceStream stream);
    int (*Memcpy2DAsync)(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                         int kind, DeviceStream stream);
    int (*StreamCreateWithFlags)(DeviceStream *stream, unsigned flags);
    int (*StreamWaitEvent)(DeviceStream stream, DeviceEvent event, unsigned flags);
    int (*StreamSynchronize)(DeviceStream stream);
    int (*StreamDestroy)(DeviceStream stream);
    int (*EventCreateWithFlags)(DeviceEvent *event, unsigned flags);
    int (*EventRecord)(DeviceEvent event, DeviceStream stream);
    int (*EventQuery)(DeviceEvent event);
    int (*EventDestroy)(DeviceEvent event);
    int (*GetLastError)();
    const char *(*GetErrorString)(int error);
    int (*DeviceGetPCIBusId)(char *id, int capacity, int device);
};

// The runtime at `library`, or with an empty name the one that the process has loaded, else one that it can load; nullptr
// where there is none, with the reason in `problem`. It stays loaded.
const DeviceRuntime *find_device_runtime(const std::string &library, std::string &problem);

// Makes a device current for a thread of the caller's, and gives back the one before.
class CurrentDevice {
  public:
    CurrentDevice(const DeviceRuntime &runtime, int device);
    ~CurrentDevice();
    CurrentDevice(const CurrentDevice &) = delete;
    CurrentDevice &operator=(const CurrentDevice &) = delete;
    int error() const { return error_; }

  private:
    const DeviceRuntime &runtime_;
    const int device_;
    int before_ = -1;
    int error_;
};

// An event that goes with its owner.
class OwnedEvent {
  public:
    OwnedEvent() = default;
    ~OwnedEvent() { reset(); }
    OwnedEvent(const OwnedEvent &) = delete;
    OwnedEvent &operator=(const OwnedEvent &) = delete;

    // 0, or the runtime's error.
    int create(const DeviceRuntime &runtime);
    void reset();
    // Whose it is from now on: the caller's.
    DeviceEvent release() { return std::exchange(event_, nullptr); }
    DeviceEvent get() const { return event_; }

  private:
    const DeviceRuntime *runtime_ = nullptr;
    DeviceEvent event_ = nullptr;
};

// A thread's last error is what its other users of the runtime (torch) look at: errors that were seen to are taken back.
int checked(const DeviceRuntime &runtime, int error);

}  // namespace el
