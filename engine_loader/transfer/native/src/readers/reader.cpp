// Picks the way to read: per file as asked, per run where the page cache decides.
#include "readers/readers.h"

#include <algorithm>
#include <string.h>

namespace el {
namespace {

bool wants_direct(const File &file, const Run &run) {
    if (file.mode == EL_BUFFERED || file.direct_refused.load(std::memory_order_relaxed)) return false;
    return file.mode == EL_DIRECT || !in_page_cache(file.fd, run.offset, run.span);
}

// Read a run around the page cache by `direct`, where that is wanted and can be; else by `buffered`.
template <typename Direct, typename Buffered>
Outcome read_either(Reader reader, const Run &run, Direct direct, Buffered buffered) {
    File &file = reader.transfer.files[run.file];
    if (wants_direct(file, run)) {
        const Outcome outcome = direct();
        if (outcome != Outcome::refused) return outcome;
        if (!file.direct_refused.exchange(true)) reader.worker.counters.direct_refused.add(1);
    }
    return buffered();
}

}  // namespace

RunLimits run_limits(Reader reader, const Block &block) {
    const File &file = reader.transfer.files[block.file];
    const el_config &config = reader.transfer.readers.config;
    const uint64_t bytes = largest_block(config, file);
    // Rows stay whole, so a block may reach a quarter beyond its cell (planner.cpp).
    return RunLimits{bytes + bytes / 4, file.wide ? config.wide_gap_bytes : config.gap_bytes};
}

uint64_t span_room(Reader reader, const Run &run) {
    const File &file = reader.transfer.files[run.file];
    return run.span + (file.mode == EL_BUFFERED || file.mode == EL_MEMORY ? 0 : 2 * uint64_t{file.limits.offset});
}

Outcome read_span(Reader reader, const Run &run, char *&memory) {
    const File &file = reader.transfer.files[run.file];
    if (file.mode == EL_MEMORY) {
        memcpy(memory, file.memory + run.offset, run.span);
        return Outcome::done;
    }
    return read_either(
        reader, run, [&] { return read_span_direct(reader, run, memory); },
        [&] { return read_span_buffered(reader, run, memory); });
}

Outcome read_block(Reader reader, const Block &block) {
    if (reader.transfer.files[block.file].mode == EL_MEMORY) return copy_block(reader, block);
    RunCutter cutter(reader.transfer, block, run_limits(reader, block), reader.worker.segments);
    Run run;
    while (cutter.next(run)) {
        const Outcome outcome = read_either(
            reader, run, [&] { return read_direct(reader, run); }, [&] { return read_buffered(reader, run); });
        if (outcome != Outcome::done) return outcome;
    }
    return Outcome::done;
}

}  // namespace el
