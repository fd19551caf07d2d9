#include "window/shared_blocks.h"

#include <algorithm>

namespace el {
namespace {

struct Part {
    uint32_t region;
    uint64_t cell;
    el_extent extent;
};

class Cutter {
  public:
    explicit Cutter(uint64_t slot_bytes) : slot_bytes_(slot_bytes) {}

    void add(const el_extent &extent, uint32_t region) {
        el_extent part = extent;
        for (uint32_t row = 0; row < extent.rows; row += part.rows) {
            part.offset = extent.offset + row * extent.src_stride;
            part.address = extent.address + row * extent.dst_stride;
            part.row_bytes = extent.row_bytes;
            const uint64_t room = cell_end(part.offset) - part.offset;
            if (extent.row_bytes > room) {
                part.rows = 1;
                cut_row(part, region);
                continue;
            }
            const uint64_t more = extent.src_stride == 0 ? extent.rows : (room - extent.row_bytes) / extent.src_stride;
            part.rows = static_cast<uint32_t>(std::min<uint64_t>(extent.rows - row, more + 1));
            parts.push_back(Part{region, part.offset / slot_bytes_, part});
        }
    }

    std::vector<Part> parts;

  private:
    void cut_row(el_extent part, uint32_t region) {
        uint64_t left = part.row_bytes;
        while (left > 0) {
            part.row_bytes = std::min(left, cell_end(part.offset) - part.offset);
            parts.push_back(Part{region, part.offset / slot_bytes_, part});
            left -= part.row_bytes;
            part.offset += part.row_bytes;
            part.address += part.row_bytes;
        }
    }

    uint64_t cell_end(uint64_t offset) const { return (offset / slot_bytes_ + 1) * slot_bytes_; }

    const uint64_t slot_bytes_;
};

}  // namespace

bool valid_regions(const el_shared_file *files, uint32_t n_files, const el_shared_region *regions, uint32_t n_regions,
                   const el_extent *extents, const uint32_t *region_of, uint64_t n_extents) {
    for (uint32_t i = 0; i < n_regions; i++) {
        const el_shared_region &region = regions[i];
        if (region.file >= n_files) return false;
        const uint64_t size = files[region.file].file.size;
        if (region.bytes > size || region.offset > size - region.bytes) return false;
    }
    for (uint64_t i = 0; i < n_extents; i++) {
        const el_extent &e = extents[i];
        if (region_of[i] >= n_regions) return false;
        if (e.rows == 0 || e.row_bytes == 0) continue;
        const el_shared_region &region = regions[region_of[i]];
        uint64_t span;
        if (__builtin_mul_overflow(e.src_stride, uint64_t{e.rows} - 1, &span)) return false;
        if (__builtin_add_overflow(span, e.row_bytes, &span)) return false;
        if (e.file != region.file || e.offset < region.offset || span > region.bytes) return false;
        if (e.offset - region.offset > region.bytes - span) return false;
    }
    return true;
}

BlockPlan cut_blocks(const el_shared_file *files, const el_shared_region *regions, const el_extent *extents,
                     const uint32_t *region_of, uint64_t n_extents, uint64_t slot_bytes) {
    Cutter cutter(slot_bytes);
    for (uint64_t i = 0; i < n_extents; i++) {
        if (extents[i].rows != 0 && extents[i].row_bytes != 0) cutter.add(extents[i], region_of[i]);
    }
    const auto before = [regions](const Part &a, const Part &b) {
        const el_shared_region &x = regions[a.region], &y = regions[b.region];
        if (x.file != y.file) return x.file < y.file;
        if (x.offset != y.offset) return x.offset < y.offset;
        return a.region != b.region ? a.region < b.region : a.cell < b.cell;
    };
    std::stable_sort(cutter.parts.begin(), cutter.parts.end(), before);
    BlockPlan plan;
    plan.extents.reserve(cutter.parts.size());
    std::vector<uint32_t> part_region;
    part_region.reserve(cutter.parts.size());
    const Part *last = nullptr;
    for (const Part &part : cutter.parts) {
        if (last == nullptr || last->region != part.region || last->cell != part.cell) {
            const el_shared_region &region = regions[part.region];
            const uint64_t begin = std::max(region.offset, part.cell * slot_bytes);
            const uint64_t end = std::min(region.offset + region.bytes, (part.cell + 1) * slot_bytes);
            const el_shared_file &file = files[region.file];
            SharedBlock block;
            block.key = BlockKey{{file.key[0], file.key[1]}, begin, end - begin};
            block.file = region.file;
            block.expected = region.expected;
            block.first_extent = plan.extents.size();
            plan.blocks.push_back(block);
        }
        last = &part;
        plan.extents.push_back(part.extent);
        part_region.push_back(part.region);
        plan.blocks.back().n_extents++;
        plan.blocks.back().wanted += part.extent.rows * part.extent.row_bytes;
    }
    for (SharedBlock &block : plan.blocks) {
        const el_shared_region &region = regions[part_region[block.first_extent]];
        // Of a block that is not wanted whole, the rest is wanted by others.
        if (block.wanted < block.key.bytes) block.expected = std::max(block.expected, std::min(2 * block.expected, region.most));
    }
    return plan;
}

}  // namespace el
