// From extents to blocks: sort, merge neighbours, cut.
#pragma once

#include "core/state.h"

namespace el {

// Whether every extent lies within its file and numbers fit; nothing else checks them again.
bool valid_plan(const el_file *files, uint32_t n_files, const el_extent *extents, uint64_t n_extents);

// Fill in the transfer's pieces, blocks, lanes and counts. Its files are set. `flags` as for el_submit.
void plan_reads(Transfer &transfer, const el_extent *extents, uint64_t n_extents, uint32_t flags);

// Where a plan writes, for advise_huge_pages.
std::vector<Range> destinations(const el_extent *extents, uint64_t n_extents);

}  // namespace el
