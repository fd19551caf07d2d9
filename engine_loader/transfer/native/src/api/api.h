// Between the C interface's handles and what they stand for.
#pragma once

#include "core/state.h"

namespace el {

inline ReaderThreads *unwrap(el_readers *readers) { return reinterpret_cast<ReaderThreads *>(readers); }
inline Transfer *unwrap(el_transfer *transfer) { return reinterpret_cast<Transfer *>(transfer); }
inline el_readers *handle(ReaderThreads *readers) { return reinterpret_cast<el_readers *>(readers); }
inline el_transfer *handle(Transfer *transfer) { return reinterpret_cast<el_transfer *>(transfer); }

// EL_OK, or why the reader threads cannot be used: EL_E_CLOSED (null), EL_E_FORKED.
int usable(const ReaderThreads *readers);

}  // namespace el
