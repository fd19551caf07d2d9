// Runs: what of a block is read in one go. Wanted bytes that are near each other in the file, and where they go.
#pragma once

#include "core/state.h"

namespace el {

struct Run {
    uint32_t file = 0;
    uint32_t extent = 0;  // the first one in it, for messages
    uint64_t offset = 0;  // in the file
    uint64_t span = 0;    // bytes from there on, gaps included
    uint64_t wanted = 0;  // bytes without gaps
    uint32_t gaps = 0;
    std::vector<Segment> *segments = nullptr;
};

struct RunLimits {
    uint64_t span;
    uint64_t gap;  // between two segments, to be read through
    uint64_t cell = UINT64_MAX;  // longer rows are cut at multiples of this in the file
};

// Cuts a block into runs. The segments of a run lie in the worker's memory and are gone with the next one.
class RunCutter {
  public:
    RunCutter(const Transfer &transfer, const Block &block, RunLimits limits, std::vector<Segment> &segments);
    bool next(Run &run);

  private:
    bool append(Run &run, const Piece &piece, uint64_t row);
    uint64_t next_bytes(const Piece &piece, uint64_t offset) const;
    void advance(uint64_t bytes);

    const Transfer &transfer_;
    const Block &block_;
    const RunLimits limits_;
    std::vector<Segment> &segments_;
    uint32_t piece_ = 0;
    uint32_t row_ = 0;
    uint64_t within_ = 0;  // bytes of the row that are in runs
    uint64_t taken_ = 0;   // bytes that the last append() added
};

}  // namespace el
