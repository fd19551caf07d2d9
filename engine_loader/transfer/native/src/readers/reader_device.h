// Reading a block for a device.
#pragma once

#include "readers/io.h"

namespace el {

// Read the block into slots and begin its copies. The block is given back when all of them have landed, which may be
// after this returns; the worker has then let go of the transfer.
void read_block_to_device(Reader reader, const Block &block);

}  // namespace el
