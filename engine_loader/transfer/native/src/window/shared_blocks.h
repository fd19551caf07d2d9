// What of a plan each block of the window holds: the same blocks for every rank, whatever its plan wants of them.
#pragma once

#include <stdint.h>
#include <vector>

#include "window/node_window.h"
#include "window/window.h"

namespace el {

struct SharedBlock {
    enum class State { pending, waiting, reading, copying, over };

    BlockKey key{};
    uint32_t file = 0;
    uint32_t expected = 0;  // members that will want it
    uint64_t first_extent = 0;  // of BlockPlan.extents
    uint64_t n_extents = 0;
    uint64_t wanted = 0;  // bytes
    State state = State::pending;
    bool by_us = false;  // this member read it
    bool begun = false;  // it was wanted before
    Claim claim{};
    int64_t since = 0;  // when another was first seen to read it
    el_transfer *transfer = nullptr;
    uint32_t number = 0;  // of a read that somebody else carries out; 0: none
};

struct BlockPlan {
    std::vector<SharedBlock> blocks;  // in the order of files and offsets
    std::vector<el_extent> extents;   // by block
};

bool valid_regions(const el_shared_file *files, uint32_t n_files, const el_shared_region *regions, uint32_t n_regions,
                   const el_extent *extents, const uint32_t *region_of, uint64_t n_extents);

// Cut a plan at the multiples of slot_bytes in the files. The arrays are valid.
BlockPlan cut_blocks(const el_shared_file *files, const el_shared_region *regions, const el_extent *extents,
                     const uint32_t *region_of, uint64_t n_extents, uint64_t slot_bytes);

}  // namespace el
