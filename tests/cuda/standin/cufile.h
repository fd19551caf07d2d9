/* What tests tell the stand-in for cuFile, and ask it; see cufile.cpp. */
#ifndef CUFILE_H
#define CUFILE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct { /* `drivers`: opened; the rest: what there is now */
    uint64_t drivers, handles, registered;
} cufile_live_info;

/* The `nth` next read, from 1 on, fails; every file is refused; no driver opens; every 1000th byte is wrong. */
void cufile_fail_read(uint32_t nth);
void cufile_refuse_files(int refused);
void cufile_refuse_driver(int refused);
void cufile_spoil(int spoiled);
/* Every read begins up to so many microseconds late. */
void cufile_delay(uint32_t most_us);
/* Whether devices have GPUDirect RDMA. */
void cufile_supported(int supported);

void cufile_live(cufile_live_info *info);
/* Bytes that were read since the start. */
uint64_t cufile_bytes(void);

#ifdef __cplusplus
}
#endif
#endif
