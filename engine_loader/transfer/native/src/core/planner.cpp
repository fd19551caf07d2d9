#include "core/planner.h"

#include <algorithm>

#include "usrbio/usrbio_channel.h"

namespace el {
namespace {

constexpr uint64_t kSmallestBlock = 256 << 10;
constexpr uint64_t kSmallestUsrbioBlock = 1 << 20;
// One call of preadv takes this many; blocks of very many tiny pieces would make progress hard to see.
constexpr uint32_t kBlockPieces = 4096;
// A transfer so large that each thread has more than one of the largest reads.
constexpr uint64_t kAnyTotal = uint64_t{1} << 50;

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// What the extent reads, with rows that follow each other in file and memory made one.
Piece whole(const el_extent &extent, uint32_t number) {
    Piece piece{extent.offset, extent.address, extent.row_bytes, extent.src_stride, extent.dst_stride, extent.rows, number};
    const bool adjoining = extent.src_stride == extent.row_bytes && extent.dst_stride == extent.row_bytes;
    if (extent.rows > 1 && adjoining) {
        piece.rows = 1;
        piece.row_bytes = extent.rows * extent.row_bytes;
    }
    return piece;
}

// Extent numbers by file and offset; empty ones are left out.
std::vector<uint32_t> reading_order(const el_extent *extents, uint64_t n) {
    std::vector<uint32_t> order;
    order.reserve(n);
    for (uint64_t i = 0; i < n; i++) {
        if (extents[i].rows != 0 && extents[i].row_bytes != 0) order.push_back(static_cast<uint32_t>(i));
    }
    const auto before = [extents](uint32_t a, uint32_t b) {
        const el_extent &x = extents[a], &y = extents[b];
        if (x.file != y.file) return x.file < y.file;
        return x.offset != y.offset ? x.offset < y.offset : a < b;
    };
    // Plans mostly come in file order already.
    if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
    return order;
}

// Cuts pieces at multiples of the block size in the file, so that direct reads of neighbouring blocks share no sector,
// and that the earliest bytes are what all threads work on.
class Cutter {
  public:
    Cutter(Transfer &transfer, uint64_t total) : transfer_(transfer), total_(total) {}

    void add(Piece piece, uint32_t file) {
        if (file != file_) start_file(file);
        if (piece.rows == 1 || piece.row_bytes > block_bytes_ / 4) {
            add_long_rows(piece);
        } else {
            add_short_rows(piece);
        }
    }

  private:
    // A small transfer is cut finer, so that every thread has a part of it.
    void start_file(uint32_t file) {
        const File &f = transfer_.files[file];
        const el_config &config = transfer_.readers.config;
        if (f.mode == EL_USRBIO) {
            start_usrbio_file(*f.usrbio, file);
            return;
        }
        const uint64_t tuned = largest_block(config, f);
        const uint64_t threads = f.wide ? config.wide_threads : config.threads;
        const uint64_t share = round_up(total_ / (2 * threads) + 1, 64 << 10);
        block_bytes_ = std::min(tuned, std::max(share, kSmallestBlock));
        file_ = file;
        open_ = false;
    }

    // Cuts stay at multiples of the chunk size (or at halves, quarters, … of it).
    void start_usrbio_file(const UsrbioConfig &config, uint32_t file) {
        const uint64_t share = std::max(total_ / (2 * config.rings), kSmallestUsrbioBlock);
        block_bytes_ = config.io_bytes;
        while (block_bytes_ % 2 == 0 && block_bytes_ / 2 >= share) block_bytes_ /= 2;
        file_ = file;
        open_ = false;
    }

    void add_long_rows(Piece piece) {
        for (uint32_t row = 0; row < piece.rows; row++) {
            Piece part = piece;
            part.rows = 1;
            part.offset += row * piece.src_stride;
            part.address += row * piece.dst_stride;
            uint64_t left = piece.row_bytes;
            while (left > 0) {
                part.row_bytes = std::min(left, cell_end(part.offset) - part.offset);
                put(part);
                left -= part.row_bytes;
                part.offset += part.row_bytes;
                part.address += part.row_bytes;
            }
        }
    }

    // Rows stay whole: a block may end up to a quarter beyond its cell.
    void add_short_rows(Piece piece) {
        uint32_t left = piece.rows;
        while (left > 0) {
            piece.rows = std::min(left, rows_that_start_in_cell(piece));
            put(piece);
            left -= piece.rows;
            piece.offset += piece.rows * piece.src_stride;
            piece.address += piece.rows * piece.dst_stride;
        }
    }

    uint32_t rows_that_start_in_cell(const Piece &piece) const {
        const uint64_t room = cell_end(piece.offset) - piece.offset;
        // Rows may repeat the same bytes (stride 0); then the bytes they fill are what is limited.
        const uint64_t step = std::max(piece.src_stride, piece.row_bytes);
        return static_cast<uint32_t>(std::min<uint64_t>((room + step - 1) / step, UINT32_MAX));
    }

    uint64_t cell_end(uint64_t offset) const { return (offset / block_bytes_ + 1) * block_bytes_; }

    void put(const Piece &piece) {
        const uint64_t cell = piece.offset / block_bytes_;
        auto &blocks = transfer_.blocks;
        if (!open_ || cell != cell_ || blocks.back().pieces == kBlockPieces) {
            const auto first = static_cast<uint32_t>(transfer_.pieces.size());
            blocks.push_back(Block{piece.offset, 0, first, 0, file_});
            cell_ = cell;
            open_ = true;
        }
        blocks.back().pieces++;
        blocks.back().bytes += piece.bytes();
        transfer_.pieces.push_back(piece);
    }

    Transfer &transfer_;
    const uint64_t total_;
    uint64_t block_bytes_ = 0;
    uint64_t cell_ = 0;
    uint32_t file_ = UINT32_MAX;
    bool open_ = false;
};

Lane &lane_of(Transfer &transfer, const Block &block) {
    const File &file = transfer.files[block.file];
    if (file.mode == EL_USRBIO) return transfer.rings;
    return file.wide ? transfer.wide : transfer.narrow;
}

void fill_lanes(Transfer &transfer, bool ordered) {
    std::vector<uint32_t> order(transfer.blocks.size());
    for (uint32_t i = 0; i < order.size(); i++) order[i] = i;
    if (!ordered) {
        const auto larger = [&](uint32_t a, uint32_t b) { return transfer.blocks[a].bytes > transfer.blocks[b].bytes; };
        std::stable_sort(order.begin(), order.end(), larger);
    }
    for (const uint32_t block : order) {
        lane_of(transfer, transfer.blocks[block]).blocks.push_back(block);
    }
}

}  // namespace

bool valid_plan(const el_file *files, uint32_t n_files, const el_extent *extents, uint64_t n_extents) {
    if (n_extents >= EL_NO_EXTENT) return false;
    for (uint64_t i = 0; i < n_extents; i++) {
        const el_extent &e = extents[i];
        if (e.rows == 0 || e.row_bytes == 0) continue;
        if (e.file >= n_files) return false;
        uint64_t last_row, end, bytes;
        if (__builtin_mul_overflow(e.src_stride, uint64_t{e.rows} - 1, &last_row)) return false;
        if (__builtin_add_overflow(e.offset, last_row, &end)) return false;
        if (__builtin_add_overflow(end, e.row_bytes, &end) || end > files[e.file].size) return false;
        if (__builtin_mul_overflow(e.row_bytes, uint64_t{e.rows}, &bytes)) return false;
        if (end > static_cast<uint64_t>(INT64_MAX)) return false;
    }
    return true;
}

void plan_reads(Transfer &transfer, const el_extent *extents, uint64_t n_extents, uint32_t flags) {
    transfer.n_extents = n_extents;
    transfer.remaining.resize(n_extents);
    transfer.completed.reserve(n_extents);
    transfer.pieces.reserve(n_extents + n_extents / 8);
    uint64_t total = 0;
    for (uint64_t i = 0; i < n_extents; i++) {
        transfer.remaining[i] = extents[i].rows * extents[i].row_bytes;
        total += transfer.remaining[i];
        if (transfer.remaining[i] == 0) transfer.completed.push_back(static_cast<uint32_t>(i));
    }
    Cutter cutter(transfer, (flags & EL_LARGE) != 0 ? kAnyTotal : total);
    for (const uint32_t number : reading_order(extents, n_extents)) {
        cutter.add(whole(extents[number], number), extents[number].file);
    }
    fill_lanes(transfer, (flags & EL_ORDERED) != 0);
}

std::vector<Range> destinations(const el_extent *extents, uint64_t n_extents) {
    std::vector<Range> ranges;
    ranges.reserve(n_extents);
    for (uint64_t i = 0; i < n_extents; i++) {
        const el_extent &e = extents[i];
        if (e.rows == 0 || e.row_bytes == 0) continue;
        const uint64_t bytes = e.dst_stride * (e.rows - 1) + e.row_bytes;
        // Rows far apart leave most of the memory between them alone; small pages suit that.
        if (e.rows == 1 || e.dst_stride <= 2 * e.row_bytes) ranges.push_back(Range{e.address, e.address + bytes});
    }
    return ranges;
}

}  // namespace el
