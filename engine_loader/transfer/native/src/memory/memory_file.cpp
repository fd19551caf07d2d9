// Files that lie in memory: the window's. Rows are copied straight to where they go.
#include <string.h>

#include "readers/readers.h"

namespace el {

Outcome copy_block(Reader reader, const Block &block) {
    const File &file = reader.transfer.files[block.file];
    const int64_t begin = now_ns();
    for (uint32_t i = 0; i < block.pieces; i++) {
        const Piece &piece = reader.transfer.pieces[block.first_piece + i];
        char *destination = reinterpret_cast<char *>(piece.address);
        const uint64_t span = piece.dst_stride * (piece.rows - 1) + piece.row_bytes;
        if (piece.rows == 1 || piece.dst_stride == piece.row_bytes) reader.transfer.destinations.prefault(destination, span);
        const char *from = file.memory + piece.offset;
        for (uint32_t row = 0; row < piece.rows; row++) {
            memcpy(destination, from, piece.row_bytes);
            destination += piece.dst_stride;
            from += piece.src_stride;
        }
    }
    reader.worker.counters.scatter_ns.add(static_cast<uint64_t>(now_ns() - begin));
    return Outcome::done;
}

}  // namespace el
