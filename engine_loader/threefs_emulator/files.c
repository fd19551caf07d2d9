/* Which files are on 3FS, and the registration of their descriptors. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
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
    bool hangs, result;
    do {
        lock();
        read_control_file();
        result = below_mount(path) && !emulator.options.dead;
        hangs = below_mount(path) && emulator.options.ioctl_hang != 0;
        emulator.counters.blocked += hangs;
        unlock();
        if (hangs) usleep(2000);
        lock();
        emulator.counters.blocked -= hangs;
        unlock();
    } while (hangs);
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

/* The table of registered descriptors: 8 bytes for each that the hard limit allows, made and written to at load. */
void make_table(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    const char *cap = getenv("HF3FS_EMULATOR_MAX_FILES");
    int count = (int)limit.rlim_max;
    if (cap != NULL && (count < 0 || count > atoi(cap))) count = atoi(cap);
    if (count < 0) {
        fprintf(stderr, "terminate called after throwing an instance of 'std::length_error'\n");
        abort();
    }
    const size_t bytes = (size_t)count * sizeof *emulator.files;
    emulator.max_files = count;
    emulator.files = malloc(bytes);
    for (int i = 0; i < count; i++) ((struct registered *volatile *)emulator.files)[i] = NULL;
}

void release_file(struct registered *file) {
    if (--file->references > 0) return;
    close(file->dup_fd);
    free(file);
}

static int register_fd(int fd) {
    if (emulator.options.register_error != 0) return (int)emulator.options.register_error;
    if (fd >= emulator.max_files) return EBADF;
    if (emulator.files[fd] != NULL) return EINVAL;
    const int dup_fd = dup(fd); /* without O_CLOEXEC: inherited by child programs, as in the real library */
    if (dup_fd < 0) return errno;
    if (dup_fd >= emulator.max_files || emulator.files[dup_fd] != NULL) {
        close(dup_fd);
        return EINVAL;
    }
    struct stat status;
    fstat(fd, &status);
    struct registered *file = malloc(sizeof *file);
    *file = (struct registered){fd, dup_fd, 1, fcntl(fd, F_GETFL) & O_ACCMODE, status.st_ino};
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
