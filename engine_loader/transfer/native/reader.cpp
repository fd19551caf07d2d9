// Picks the way to read: per file as asked, per run where only the page cache can tell.
#include "readers.h"

#include <algorithm>

namespace el {
namespace {

RunLimits limits_of(const File &file, const el_config &config) {
    const uint64_t block = file.mode == EL_BUFFERED ? config.block_bytes : config.direct_block_bytes;
    // Rows stay whole, so a block may reach a quarter beyond its cell (planner.cpp).
    return RunLimits{block + block / 4, file.wide ? config.wide_gap_bytes : config.gap_bytes};
}

bool wants_direct(const File &file, const Run &run) {
    if (file.mode == EL_BUFFERED || file.direct_refused.load(std::memory_order_relaxed)) return false;
    return file.mode == EL_DIRECT || !in_page_cache(file.fd, run.offset, run.span);
}

Outcome read_run(Reader reader, const Run &run) {
    File &file = reader.transfer.files[run.file];
    if (wants_direct(file, run)) {
        const Outcome outcome = read_direct(reader, run);
        if (outcome != Outcome::refused) return outcome;
        if (!file.direct_refused.exchange(true)) reader.worker.counters.direct_refused.add(1);
    }
    return read_buffered(reader, run);
}

}  // namespace

Outcome read_block(Reader reader, const Block &block) {
    const RunLimits limits = limits_of(reader.transfer.files[block.file], reader.transfer.engine.config);
    RunCutter cutter(reader.transfer, block, limits, reader.worker.segments);
    Run run;
    while (cutter.next(run)) {
        const Outcome outcome = read_run(reader, run);
        if (outcome != Outcome::done) return outcome;
    }
    return Outcome::done;
}

}  // namespace el
