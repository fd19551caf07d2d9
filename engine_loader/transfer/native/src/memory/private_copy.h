// Pages of a file mapping replaced by memory of one's own, in place.
#pragma once

#include <stdint.h>

namespace el {

// Put anonymous memory with the same content in the place of the pages of a range. Copy on write alone would not do: when a
// file is cut short, the kernel takes even pages that were written from its private mappings. Nobody may write to the
// range meanwhile. 0 or an errno (EFAULT: a page cannot be had; never a SIGBUS).
int make_private(uint64_t address, uint64_t bytes);

}  // namespace el
