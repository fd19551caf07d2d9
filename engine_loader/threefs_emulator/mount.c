/* The mount: what symlink, unlink, readlink and open do below 3fs-virt/iovs, as the kernel and the daemon answer them.
 *
 * The library calls these functions itself. For the calls of a whole program, libemulated_mount.so is preloaded
 * (mount_preload.c). The daemon outlives its clients, so what it knows of them lies in files: 3fs-virt/.daemon has a
 * symbolic link per link and per open handle of 3fs-virt/iovs, and its target is the thread id that the daemon saw. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "emulator.h"

enum { HANDLES = 4096 }; /* descriptors below this are followed */

static _Atomic unsigned char is_handle[HANDLES];

static bool in_mount(const char *path) {
    const size_t length = strlen(emulator.options.mount);
    return length > 0 && strncmp(path, emulator.options.mount, length) == 0 && strncmp(path + length, "/3fs-virt/iovs", 14) == 0;
}

/* A daemon that hangs answers when the option is taken back. */
static void wait_for_answer(const char *path) {
    if (!in_mount(path)) return;
    for (;;) {
        lock();
        read_control_file();
        const bool hangs = emulator.options.mount_hang != 0;
        if (hangs) emulator.counters.blocked++;
        unlock();
        if (!hangs) return;
        usleep(2000);
        lock();
        emulator.counters.blocked--;
        unlock();
    }
}

/* The thread as the daemon sees it: by number, or as 0 where the daemon is in another PID namespace. */
static long seen_thread(void) { return emulator.options.other_pid_namespace ? 0 : (long)syscall(SYS_gettid); }

static void record_path(char *path, size_t capacity, const char *name) {
    snprintf(path, capacity, "%s/3fs-virt/.daemon/%s", emulator.options.mount, name);
}

static void note(const char *name) {
    char path[2 * PATH_MAX], thread[32];
    record_path(path, sizeof path, name);
    snprintf(thread, sizeof thread, "%ld", seen_thread());
    syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    syscall(SYS_symlinkat, thread, AT_FDCWD, path);
}

static long noted(const char *name) {
    char path[2 * PATH_MAX], thread[32];
    record_path(path, sizeof path, name);
    const long n = syscall(SYS_readlinkat, AT_FDCWD, path, thread, sizeof thread - 1);
    if (n < 0) return -1;
    thread[n] = '\0';
    return atol(thread);
}

static void forget(const char *name) {
    char path[2 * PATH_MAX];
    record_path(path, sizeof path, name);
    syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

static bool is_handle_record(const char *name) { return strncmp(name, "handle.", 7) == 0; }
static bool is_memory_record(const char *name) { return strncmp(name, "memory.", 7) == 0; }

static void memory_record(char *record, const char *name) { snprintf(record, 96, "memory.%d.%s", (int)getpid(), name + 1); }

void note_memory(const char *name) {
    char record[96];
    memory_record(record, name);
    note(record);
}

void unlink_memory(const char *name) {
    char record[96];
    shm_unlink(name);
    memory_record(record, name);
    forget(record);
}

/* Calls `visit` with the name of each record; they are listed first, because the visits remove some. */
static void for_each_record(void (*visit)(const char *name, long thread), long thread) {
    char path[2 * PATH_MAX];
    struct dirent **found;
    record_path(path, sizeof path, "");
    const int count = scandir(path, &found, NULL, NULL);
    for (int i = 0; i < count; i++) {
        if (found[i]->d_name[0] != '.') visit(found[i]->d_name, thread);
        free(found[i]);
    }
    if (count >= 0) free(found);
}

static void remove_link_of(const char *name, long thread) {
    if (is_handle_record(name) || is_memory_record(name) || noted(name) != thread) return;
    char path[2 * PATH_MAX];
    snprintf(path, sizeof path, "%s/3fs-virt/iovs/%s", emulator.options.mount, name);
    syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    forget(name);
}

/* What the daemon does when a handle of 3fs-virt/iovs is closed: it forgets the links that the handle's thread made. */
static void release(const char *handle) {
    const long thread = noted(handle);
    forget(handle);
    if (thread >= 0) for_each_record(remove_link_of, thread);
}

int mounted_symlink(const char *target, const char *link) {
    wait_for_answer(link);
    if (syscall(SYS_symlinkat, target, AT_FDCWD, link) != 0) return -1;
    if (in_mount(link)) note(strrchr(link, '/') + 1);
    return 0;
}

int mounted_unlink(const char *path) {
    wait_for_answer(path);
    if (syscall(SYS_unlinkat, AT_FDCWD, path, 0) != 0) return -1;
    if (in_mount(path)) forget(strrchr(path, '/') + 1);
    return 0;
}

ssize_t mounted_readlink(const char *path, char *target, size_t capacity) {
    wait_for_answer(path);
    return syscall(SYS_readlinkat, AT_FDCWD, path, target, capacity);
}

static void handle_name(char name[64], int fd) { snprintf(name, 64, "handle.%d.%d", (int)getpid(), fd); }

int mounted_open(const char *path, int flags, unsigned mode) {
    wait_for_answer(path);
    const int fd = (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (fd < 0 || fd >= HANDLES || (flags & O_DIRECTORY) == 0 || !in_mount(path)) return fd;
    char name[64];
    handle_name(name, fd);
    note(name);
    is_handle[fd] = 1;
    return fd;
}

int mounted_close(int fd) {
    if (fd >= 0 && fd < HANDLES && is_handle[fd] && emulator.pid == getpid()) {
        is_handle[fd] = 0; /* before the number is another file's */
        char name[64];
        handle_name(name, fd);
        release(name);
    }
    return (int)syscall(SYS_close, fd);
}

void forget_handles(void) {
    for (int fd = 0; fd < HANDLES; fd++) is_handle[fd] = 0;
}

void hold_mount(const char *mount) {
    static char held[PATH_MAX]; /* one mount per emulator */
    char path[2 * PATH_MAX];
    lock();
    const bool first = strcmp(held, mount) != 0;
    if (first) snprintf(held, sizeof held, "%s", mount);
    unlock();
    snprintf(path, sizeof path, "%s/3fs-virt/iovs", mount);
    if (first) mounted_open(path, O_RDONLY | O_DIRECTORY, 0); /* stays open, and without O_CLOEXEC, as in the real library */
}

static bool has_ended(const char *pid) { return kill((pid_t)atol(pid), 0) != 0 && errno == ESRCH; }

static void release_if_ended(const char *name, long unused) {
    (void)unused;
    if (is_handle_record(name) && has_ended(name + 7)) release(name);
    if (is_memory_record(name) && has_ended(name + 7)) {
        char of_memory[96];
        snprintf(of_memory, sizeof of_memory, "/%s", strchr(name + 7, '.') + 1);
        shm_unlink(of_memory);
        forget(name);
    }
}

/* The kernel closes the handles of processes that have ended. The memory that they had not unlinked yet stays with the
 * real library and daemon; here it goes, so that who tries this leaves nothing. */
void hf3fs_emulator_sweep(void) { for_each_record(release_if_ended, 0); }

int hf3fs_emulator_symlink(const char *target, const char *link) { return mounted_symlink(target, link); }
int hf3fs_emulator_unlink(const char *path) { return mounted_unlink(path); }
int hf3fs_emulator_open(const char *path, int flags, unsigned mode) { return mounted_open(path, flags, mode); }
int hf3fs_emulator_close(int fd) { return mounted_close(fd); }
ssize_t hf3fs_emulator_readlink(const char *path, char *target, size_t capacity) {
    return mounted_readlink(path, target, capacity);
}
