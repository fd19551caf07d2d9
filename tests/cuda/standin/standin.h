/* What tests tell the stand-in for the CUDA runtime, and ask it; see standin.cpp. */
#ifndef STANDIN_H
#define STANDIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct { /* what there is now; all 0 when nothing leaked */
    uint64_t pinned, streams, events, allocations;
} standin_live_info;

typedef struct { /* what was done since standin_reset */
    uint64_t copies, copies_2d, bytes, most_in_flight;
} standin_done_info;

/* Back to the start: no delays, failures, holds or violations. Nothing may be in flight. */
void standin_reset(uint64_t seed);
/* Every operation on a stream begins up to so many microseconds late. */
void standin_delay(uint32_t most_us);
/* Nothing is done on this stream (NULL: the default one), or on any of the others with standin_hold_copies. */
void standin_hold(void *stream, int held);
void standin_hold_copies(int held);
/* The `nth` next call of a function ("MemcpyAsync"), from 1 on, fails with `error`. */
void standin_fail_call(const char *function, uint32_t nth, int error);
/* The `nth` next copy that is carried out fails with `error`, which all later events of its stream tell. */
void standin_fail_copy(uint32_t nth, int error);
/* So many of a thousand copies fail while they are carried out, and so many calls. */
void standin_faults(uint32_t copies, uint32_t calls);

/* Device memory; poisoned when it is made and when it is freed. standin_free is what a caching allocator does: at once,
 * whatever is in flight. Freed memory stays mapped until the reset, so that what is written there late is seen. */
void *standin_malloc(size_t bytes);
void standin_free(void *memory);
/* What a kernel on the owner's stream does. */
void standin_fill(void *stream, void *memory, int value, size_t bytes);

void standin_live(standin_live_info *info);
void standin_done(standin_done_info *info);
uint64_t standin_in_flight(void);
/* Whether all of a range is device memory that has not been freed. */
int standin_is_live(const void *memory, size_t bytes);
/* Note that a rule was broken. `text` is kept. */
void standin_violate(const char *text);
/* Whether nothing is waiting on a stream. */
int standin_idle(void *stream);
/* How often a rule was broken, and in what way first. */
uint64_t standin_violations(char *text, size_t capacity);

#ifdef __cplusplus
}
#endif
#endif
