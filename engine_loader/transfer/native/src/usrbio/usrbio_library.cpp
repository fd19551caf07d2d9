#include "usrbio/usrbio_library.h"

#include <dlfcn.h>
#include <map>
#include <mutex>
#include <string>

namespace el {
namespace {

template <typename T>
bool find(void *library, const char *name, T &function) {
    function = reinterpret_cast<T>(dlsym(library, name));
    return function != nullptr;
}

const Hf3fs *open_library(const char *path) {
    // RTLD_LOCAL: what it was linked with (folly, fmt) stays out of the way of other libraries' own copies.
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == nullptr) return nullptr;
    auto *table = new Hf3fs();
    const bool whole = find(handle, "hf3fs_iovcreate", table->iovcreate) &&
                       find(handle, "hf3fs_iovunlink", table->iovunlink) &&
                       find(handle, "hf3fs_iovdestroy", table->iovdestroy) &&
                       find(handle, "hf3fs_iorcreate4", table->iorcreate4) &&
                       find(handle, "hf3fs_iordestroy", table->iordestroy) &&
                       find(handle, "hf3fs_prep_io", table->prep_io) &&
                       find(handle, "hf3fs_submit_ios", table->submit_ios) &&
                       find(handle, "hf3fs_wait_for_ios", table->wait_for_ios);
    if (whole) return table;
    delete table;
    return nullptr;
}

}  // namespace

const Hf3fs *load_hf3fs(const char *path) {
    static auto &mutex = *new std::mutex();  // threads may outlive what ends at exit
    static auto &loaded = *new std::map<std::string, const Hf3fs *>();
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = loaded.find(path);
    if (found != loaded.end()) return found->second;
    const Hf3fs *table = open_library(path);
    if (table != nullptr) loaded.emplace(path, table);
    return table;
}

}  // namespace el
