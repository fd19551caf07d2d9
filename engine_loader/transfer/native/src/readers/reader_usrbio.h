// The threads that read by USRBIO: each keeps a window of IOs in flight on a ring of its own.
#pragma once

#include "core/state.h"

namespace el {

// What such a thread does until el_readers_close.
void read_by_usrbio(Worker &worker);

}  // namespace el
