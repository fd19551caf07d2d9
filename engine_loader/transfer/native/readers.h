// The ways to read a block.
#pragma once

#include "io.h"
#include "runs.h"

namespace el {

// Read one run through the page cache: straight to where it goes, or through scratch memory where that is less work.
Outcome read_buffered(Reader reader, const Run &run);

// Read one run around the page cache; refused where that cannot be.
Outcome read_direct(Reader reader, const Run &run);

// Read all of a block in the way that its file asks for.
Outcome read_block(Reader reader, const Block &block);

// Which alignments O_DIRECT reads of this descriptor want; false where it takes none.
bool find_direct_limits(int direct_fd, DirectLimits &limits);

// Copy a run from memory that holds its span.
void scatter(Reader reader, const Run &run, const char *span);

}  // namespace el
