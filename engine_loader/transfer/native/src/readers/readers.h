// The ways to read a block.
#pragma once

#include "readers/io.h"
#include "core/runs.h"

namespace el {

constexpr uint32_t kLargestSector = 64 << 10;

// Read one run through the page cache: straight to where it goes, or through scratch memory where that is less work.
Outcome read_buffered(Reader reader, const Run &run);

// Read one run around the page cache; refused where that cannot be.
Outcome read_direct(Reader reader, const Run &run);

// The same for all bytes of a run, into memory that has span_room(), which begins at a multiple of 4096 (of direct reads'
// alignment where that is more). `memory` is where the run begins, when it was done.
Outcome read_span(Reader reader, const Run &run, char *&memory);
Outcome read_span_buffered(Reader reader, const Run &run, char *memory);
Outcome read_span_direct(Reader reader, const Run &run, char *&memory);
uint64_t span_room(Reader reader, const Run &run);

// How much of a block is read in one go.
RunLimits run_limits(Reader reader, const Block &block);

// Copy a block of a file that lies in memory.
Outcome copy_block(Reader reader, const Block &block);

// Read all of a block in the way that its file asks for.
Outcome read_block(Reader reader, const Block &block);

// Which alignments O_DIRECT reads of this descriptor want; false where it takes none.
bool find_direct_limits(int direct_fd, DirectLimits &limits);

// Read files of 3FS by a ring until el_readers_close; what a thread with such a ring does.
void read_by_usrbio(Worker &worker);

// Copy a run from memory that holds its span.
void scatter(Reader reader, const Run &run, const char *span);

}  // namespace el
