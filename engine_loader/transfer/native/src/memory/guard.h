/* Mapped files that are cut short must not kill the process.
 *
 * Touching a page of a mapping that lies behind the file's new end raises SIGBUS. While a range is guarded, such a page is replaced by an
 * empty one instead, and the guard remembers it, so that the reader can report the file rather than die. (Wayland compositors guard the
 * memory that their clients share in the same way.)
 */
#ifndef ENGINE_LOADER_GUARD_H
#define ENGINE_LOADER_GUARD_H

#include "core/c_interface.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Guard a mapping. The first guard installs the signal handler, which passes on what is not in a guarded range.
 * Returns a number >= 0 for the calls below, or EL_E_MEMORY when all entries are taken (the caller then does without mapping). */
EL_API int32_t el_guard_add(uint64_t address, uint64_t nbytes);

/* Whether a page of the range had to be replaced since it was guarded: 1 or 0. */
EL_API int el_guard_tripped(int32_t guard);

/* Stop guarding, and say whether a page was replaced. Call it before the range is unmapped. */
EL_API int el_guard_remove(int32_t guard);

/* Replace mapped pages by memory of the process's own with the same content: neither a change of the file nor its end (which takes
 * private copies of its pages along, too) reaches them any more. Whole pages are replaced, so nobody may write to them meanwhile.
 * Returns 0 or an errno. */
EL_API int el_detach(uint64_t address, uint64_t nbytes);

#ifdef __cplusplus
}
#endif
#endif
