/* Which files are on 3FS, and the registration of their descriptors. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "emulator.h"

static bool below_mount(const char *path) {
    const size_t length = strlen(emulator.options.mount);
    return length > 0 && strncmp(path, emulator.options.mount, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

bool hf3fs_is_hf3fs(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return false;
    path[n] = '\0';
    lock();
    read_control_file();
    const bool result = below_mount(path) && !emulator.options.dead;
    unlock();
    return result;
}

int hf3fs_extract_mount_point(char *mount, int size, const char *path) {
    char real[PATH_MAX];
    if (realpath(path, real) == NULL) {
        fprintf(stderr, "terminate called after throwing an instance of 'boost::filesystem::filesystem_error': %s\n", path);
        abort(); /* the real library throws through its C interface */
    }
    lock();
    const bool found = below_mount(real);
    const int length = (int)strlen(emulator.options.mount);
    if (found && length < size) strcpy(mount, emulator.options.mount);
    unlock();
    return found ? length + 1 : -1;
}

static int max_files(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    return limit.rlim_max > (1 << 20) ? 1 << 20 : (int)limit.rlim_max;
}

void release_file(struct registered *file) {
    if (--file->references > 0) return;
    close(file->dup_fd);
    free(file);
}

static int register_fd(int fd) {
    if (emulator.files == NULL) {
        emulator.max_files = max_files();
        emulator.files = calloc((size_t)emulator.max_files, sizeof *emulator.files);
    }
    if (emulator.options.register_error != 0) return (int)emulator.options.register_error;
    if (fd >= emulator.max_files) return EBADF;
    if (emulator.files[fd] != NULL) return EINVAL;
    const int dup_fd = dup(fd); /* without O_CLOEXEC: inherited by child programs, as in the real library */
    if (dup_fd < 0) return errno;
    if (dup_fd >= emulator.max_files || emulator.files[dup_fd] != NULL) {
        close(dup_fd);
        return EINVAL;
    }
    struct registered *file = malloc(sizeof *file);
    *file = (struct registered){fd, dup_fd, 1, fcntl(fd, F_GETFL) & O_ACCMODE};
    emulator.files[fd] = emulator.files[dup_fd] = file;
    emulator.counters.registrations++;
    return -dup_fd;
}

int hf3fs_reg_fd(int fd, uint64_t flags) {
    (void)flags;
    if (!hf3fs_is_hf3fs(fd)) return EBADF;
    lock();
    const int result = register_fd(fd);
    unlock();
    return result;
}

void hf3fs_dereg_fd(int fd) {
    if (fd < 0 || !hf3fs_is_hf3fs(fd)) return;
    lock();
    struct registered *file = emulator.files != NULL && fd < emulator.max_files ? emulator.files[fd] : NULL;
    if (file != NULL) {
        emulator.files[file->fd] = emulator.files[file->dup_fd] = NULL;
        emulator.counters.registrations--;
        release_file(file);
    }
    unlock();
}

int hf3fs_hardlink(const char *target, const char *link_name) { return link(target, link_name) == 0 ? 0 : errno; }

int hf3fs_punchhole(int fd, int n, const size_t *start, const size_t *end, size_t flags) {
    (void)fd, (void)n, (void)start, (void)end, (void)flags;
    return EOPNOTSUPP;
}
