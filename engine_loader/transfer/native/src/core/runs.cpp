#include "core/runs.h"

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
        advance();
    }
    return !segments_.empty();
}

// Add one row of a piece to the run; false where it has to begin another one.
bool RunCutter::append(Run &run, const Piece &piece, uint64_t row) {
    const uint64_t offset = piece.offset + row * piece.src_stride;
    const uint64_t address = piece.address + row * piece.dst_stride;
    if (segments_.empty()) {
        run.offset = offset;
        run.extent = piece.extent;
    } else {
        const uint64_t end = run.offset + run.span;
        // Bytes that two extents want are read twice.
        if (offset < end || offset - end > limits_.gap) return false;
        if (offset + piece.row_bytes - run.offset > limits_.span) return false;
        Segment &last = segments_.back();
        if (offset == end && last.address + last.bytes == address) {
            last.bytes += static_cast<uint32_t>(piece.row_bytes);
            run.span += piece.row_bytes;
            run.wanted += piece.row_bytes;
            return true;
        }
        if (segments_.size() == kMaxSegments) return false;
        run.gaps += offset > end;
    }
    const auto at = static_cast<uint32_t>(offset - run.offset);
    segments_.push_back(Segment{address, at, static_cast<uint32_t>(piece.row_bytes)});
    run.span = at + piece.row_bytes;
    run.wanted += piece.row_bytes;
    return true;
}

void RunCutter::advance() {
    if (++row_ < transfer_.pieces[block_.first_piece + piece_].rows) return;
    row_ = 0;
    piece_++;
}

}  // namespace el
