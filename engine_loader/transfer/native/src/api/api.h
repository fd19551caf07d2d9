// Between the C interface's handles and what they stand for.
#pragma once

#include "core/state.h"

namespace el {

inline Engine *unwrap(el_engine *engine) { return reinterpret_cast<Engine *>(engine); }
inline Transfer *unwrap(el_transfer *transfer) { return reinterpret_cast<Transfer *>(transfer); }
inline el_engine *handle(Engine *engine) { return reinterpret_cast<el_engine *>(engine); }
inline el_transfer *handle(Transfer *transfer) { return reinterpret_cast<el_transfer *>(transfer); }

// EL_OK, or why the engine cannot be used: EL_E_CLOSED (null), EL_E_FORKED.
int usable(const Engine *engine);

}  // namespace el
