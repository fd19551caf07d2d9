/* The daemon's limits: how many batches it carries out at once, and how many requests of which size it sends to the
 * storage servers meanwhile. A batch is cut at chunks, and the pieces for one server are sent together. */
#include <stdlib.h>
#include <string.h>

#include "emulator.h"

enum { MOST_SERVERS = 256 };

static int on_server[MOST_SERVERS], on_all;

static bool limited(int64_t count, int64_t limit) { return limit > 0 && count >= limit; }

bool may_start_batch(void) { return !limited(emulator.counters.running_batches, emulator.options.batches); }

static bool may_send(const struct io *request) {
    const struct options *options = &emulator.options;
    return !limited(on_all, options->requests) && !limited(on_server[request->server], options->server_requests);
}

void send_requests(void) {
    const int64_t now = now_ns();
    for (struct io **at = &emulator.unsent; *at != NULL;) {
        struct io *request = *at;
        if (!may_send(request)) {
            at = &request->next;
            continue;
        }
        *at = request->next;
        on_all++;
        on_server[request->server]++;
        if (on_all > emulator.counters.max_requests) emulator.counters.max_requests = on_all;
        emulator.counters.requests++;
        request->due_ns = arrival(request, now);
        push_due(request);
    }
    emulator.unsent_end = &emulator.unsent;
    while (*emulator.unsent_end != NULL) emulator.unsent_end = &(*emulator.unsent_end)->next;
}

void request_done(const struct io *request) {
    on_all--;
    on_server[request->server]--;
}

static void queue_request(struct batch *batch, int server, uint64_t bytes) {
    struct io *request = calloc(1, sizeof *request);
    request->ring = batch->ios->ring;
    request->batch = batch;
    request->server = server;
    request->length = bytes;
    request->is_request = request->carried_out = true;
    *emulator.unsent_end = request;
    emulator.unsent_end = &request->next;
    batch->missing++;
}

void queue_requests(struct batch *batch) {
    const struct options *options = &emulator.options;
    const int servers = options->servers < 1 ? 1 : options->servers > MOST_SERVERS ? MOST_SERVERS : (int)options->servers;
    const uint64_t chunk = options->chunk_bytes > 0 ? (uint64_t)options->chunk_bytes : 1 << 20;
    const uint64_t most = options->request_bytes > 0 ? (uint64_t)options->request_bytes : UINT64_MAX;
    uint64_t gathered[MOST_SERVERS] = {0};
    for (const struct io *io = batch->ios; io != NULL; io = io->batch_next) {
        if (io->result < 0) continue; /* refused when it was prepared */
        for (uint64_t at = io->offset, end = io->offset + io->length, n; at < end; at += n) {
            n = chunk - at % chunk;
            if (n > end - at) n = end - at;
            const int server = (int)((at / chunk + io->file->inode) % (uint64_t)servers);
            if (gathered[server] + n > most && gathered[server] > 0) {
                queue_request(batch, server, gathered[server]);
                gathered[server] = 0;
            }
            gathered[server] += n;
        }
    }
    for (int server = 0; server < servers; server++) {
        if (gathered[server] > 0) queue_request(batch, server, gathered[server]);
    }
}

bool requests_are_limited(void) { return emulator.options.requests > 0; }

void forget_requests(void) {
    memset(on_server, 0, sizeof on_server);
    on_all = 0;
    emulator.unsent = NULL;
    emulator.unsent_end = &emulator.unsent;
}

/* Batches and requests that may start now, because others ended or an option changed; rings take turns. */
void start_what_may(void) {
    static unsigned turn;
    int count = 0;
    for (struct ring *ring = emulator.rings; ring != NULL; ring = ring->next) count++;
    unsigned skip = count > 0 ? turn++ % (unsigned)count : 0;
    struct ring *first = emulator.rings;
    while (skip-- > 0) first = first->next;
    for (struct ring *ring = first; ring != NULL; ring = ring->next) start_batches(ring);
    for (struct ring *ring = emulator.rings; ring != first; ring = ring->next) start_batches(ring);
    send_requests();
}
