#include "core/runs.h"

#include <algorithm>

namespace el {

RunCutter::RunCutter(const Transfer &transfer, const Block &block, RunLimits limits, std::vector<Segment> &segments)
    : transfer_(transfer), block_(block), limits_(limits), segments_(segments) {}

bool RunCutter::next(Run &run) {
    run = Run{};
    run.file = block_.file;
    run.segments = &segments_;
    segments_.clear();
    while (piece_ < block_.pieces) {
        if (!append(run, transfer_.pieces[block_.first_piece + piece_], row_)) break;
        advance(taken_);
    }
    return !segments_.empty();
}

// How much of the current row, which goes on at `offset`, is taken at a time.
uint64_t RunCutter::next_bytes(const Piece &piece, uint64_t offset) const {
    const uint64_t left = piece.row_bytes - within_;
    if (piece.row_bytes <= limits_.cell) return left;
    return std::min(left, (offset / limits_.cell + 1) * limits_.cell - offset);
}

// Add one row of a piece, or a part of a long one, to the run; false where it has to begin another one.
bool RunCutter::append(Run &run, const Piece &piece, uint64_t row) {
    const uint64_t offset = piece.offset + row * piece.src_stride + within_;
    const uint64_t address = piece.address + row * piece.dst_stride + within_;
    const uint64_t bytes = taken_ = next_bytes(piece, offset);
    if (!segments_.empty() && piece.row_bytes > limits_.cell && offset % limits_.cell == 0) return false;
    if (segments_.empty()) {
        run.offset = offset;
        run.extent = piece.extent;
    } else {
        const uint64_t end = run.offset + run.span;
        // Bytes that two extents want are read twice.
        if (offset < end || offset - end > limits_.gap) return false;
        if (offset + bytes - run.offset > limits_.span) return false;
        Segment &last = segments_.back();
        if (offset == end && last.address + last.bytes == address) {
            last.bytes += static_cast<uint32_t>(bytes);
            run.span += bytes;
            run.wanted += bytes;
            return true;
        }
        if (segments_.size() == kMaxSegments) return false;
        run.gaps += offset > end;
    }
    const auto at = static_cast<uint32_t>(offset - run.offset);
    segments_.push_back(Segment{address, at, static_cast<uint32_t>(bytes)});
    run.span = at + bytes;
    run.wanted += bytes;
    return true;
}

void RunCutter::advance(uint64_t bytes) {
    within_ += bytes;
    if (within_ < transfer_.pieces[block_.first_piece + piece_].row_bytes) return;
    within_ = 0;
    if (++row_ < transfer_.pieces[block_.first_piece + piece_].rows) return;
    row_ = 0;
    piece_++;
}

}  // namespace el
