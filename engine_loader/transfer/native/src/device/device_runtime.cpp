#include "device/device_runtime.h"

#include <dlfcn.h>
#include <link.h>
#include <map>
#include <memory>
#include <string.h>
#include <utility>

#include "threads/sync.h"

namespace el {
namespace {

// Where torch was linked with the runtime, none of its own is loaded; another copy shares the device's context with it.
constexpr const char *kLoadable[] = {"libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libamdhip64.so.7",
                                     "libamdhip64.so.6", "libamdhip64.so.5"};

int take_runtime(dl_phdr_info *info, size_t, void *found) {
    const char *slash = strrchr(info->dlpi_name, '/');
    const char *name = slash == nullptr ? info->dlpi_name : slash + 1;
    // Wheels may have a hash in the name: libcudart-d0da41ae.so.11.0
    if (strncmp(name, "libcudart", 9) != 0 && strncmp(name, "libamdhip64", 11) != 0) return 0;
    *static_cast<std::string *>(found) = info->dlpi_name;
    return 1;
}

void *open_any(std::string &problem) {
    std::string loaded;
    dl_iterate_phdr(take_runtime, &loaded);
    if (!loaded.empty()) return dlopen(loaded.c_str(), RTLD_NOW | RTLD_NODELETE);
    for (const char *name : kLoadable) {
        void *library = dlopen(name, RTLD_NOW | RTLD_NODELETE);
        if (library != nullptr) return library;
    }
    problem = "no runtime of CUDA or HIP is loaded in this process";
    return nullptr;
}

class Finder {
  public:
    Finder(void *library, std::string &problem)
        : library_(library), problem_(problem), prefix_(dlsym(library, "hipSetDevice") != nullptr ? "hip" : "cuda") {}

    template <typename T>
    bool find(const char *name, T &function) {
        function = reinterpret_cast<T>(dlsym(library_, (prefix_ + name).c_str()));
        if (function == nullptr) problem_ = "it has no " + prefix_ + name;
        return function != nullptr;
    }

  private:
    void *library_;
    std::string &problem_;
    const std::string prefix_;
};

bool fill(DeviceRuntime &table, Finder finder) {
#define FIND(name) finder.find(#name, table.name)
    return FIND(SetDevice) && FIND(GetDevice) && FIND(HostAlloc) && FIND(FreeHost) && FIND(HostRegister) &&
           FIND(HostUnregister) && FIND(MemcpyAsync) && FIND(Memcpy2DAsync) && FIND(StreamCreateWithFlags) &&
           FIND(StreamWaitEvent) && FIND(StreamSynchronize) && FIND(StreamDestroy) && FIND(EventCreateWithFlags) &&
           FIND(EventRecord) && FIND(EventQuery) && FIND(EventDestroy) && FIND(GetLastError) && FIND(GetErrorString) &&
           FIND(DeviceGetPCIBusId);
#undef FIND
}

}  // namespace

const DeviceRuntime *find_device_runtime(const std::string &library, std::string &problem) {
    // Never taken down: threads may use them to the end.
    static auto *const mutex = new Mutex();
    static auto *const known = new std::map<void *, std::unique_ptr<const DeviceRuntime>>();
    Lock lock(*mutex);
    void *handle = library.empty() ? open_any(problem) : dlopen(library.c_str(), RTLD_NOW | RTLD_NODELETE);
    if (handle == nullptr) {
        if (problem.empty()) problem = dlerror();
        return nullptr;
    }
    const auto found = known->find(handle);
    if (found != known->end()) return found->second.get();
    auto table = std::make_unique<DeviceRuntime>();
    if (!fill(*table, Finder(handle, problem))) return nullptr;
    return known->emplace(handle, std::move(table)).first->second.get();
}

CurrentDevice::CurrentDevice(const DeviceRuntime &runtime, int device) : runtime_(runtime), device_(device) {
    if (runtime_.GetDevice(&before_) != 0) before_ = -1;
    error_ = before_ == device_ ? 0 : checked(runtime_, runtime_.SetDevice(device_));
}

CurrentDevice::~CurrentDevice() {
    if (before_ >= 0 && before_ != device_) checked(runtime_, runtime_.SetDevice(before_));
}

int OwnedEvent::create(const DeviceRuntime &runtime) {
    runtime_ = &runtime;
    return checked(runtime, runtime.EventCreateWithFlags(&event_, kEventDisableTiming));
}

void OwnedEvent::reset() {
    if (event_ != nullptr) checked(*runtime_, runtime_->EventDestroy(event_));
    event_ = nullptr;
}

int checked(const DeviceRuntime &runtime, int error) {
    if (error != 0) runtime.GetLastError();
    return error;
}

}  // namespace el
