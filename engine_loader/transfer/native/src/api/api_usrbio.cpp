// USRBIO's part of the C interface.
#include "usrbio/usrbio.h"

#include <new>

#include "api/api.h"
#include "usrbio/usrbio_channel.h"

using namespace el;

int el_usrbio_add(el_readers *adding, const el_usrbio_config *config) {
    ReaderThreads *readers = unwrap(adding);
    const int state = usable(readers);
    if (state != EL_OK) return state;
    if (config == nullptr || config->struct_bytes != sizeof(el_usrbio_config)) return EL_E_ARGUMENT;
    if (config->library == nullptr || config->mount == nullptr) return EL_E_ARGUMENT;
    try {
        const UsrbioConfig wanted(*config);
        Lock lock(readers->mutex);
        for (size_t i = 0; i < readers->usrbio.size(); i++) {
            if (*readers->usrbio[i] == wanted) return static_cast<int>(i);
        }
        readers->usrbio.push_back(std::make_unique<const UsrbioConfig>(wanted));
        return static_cast<int>(readers->usrbio.size() - 1);
    } catch (const std::bad_alloc &) {
        return EL_E_MEMORY;
    }
}
