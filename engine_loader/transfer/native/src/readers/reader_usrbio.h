// The threads that read by USRBIO: each keeps a window of IOs in flight on a ring of its own.
#pragma once

#include "core/state.h"

namespace el {

// What such a thread does until the engine closes.
void read_by_usrbio(Worker &worker);

}  // namespace el
