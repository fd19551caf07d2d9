/* Buffers in shared memory, and the links below 3fs-virt/iovs by which the daemon finds them. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "emulator.h"

void uuid_text(const uint8_t id[16], char text[40]) {
    char *at = text;
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) *at++ = '-';
        at += sprintf(at, "%02x", id[i]);
    }
}

static void link_path(char *path, size_t capacity, const char *mount, const uint8_t id[16], size_t block_size) {
    char text[40], block[32] = "";
    uuid_text(id, text);
    if (block_size != 0) snprintf(block, sizeof block, ".b%zu", block_size);
    snprintf(path, capacity, "%s/3fs-virt/iovs/%s%s", mount, text, block);
}

static void *map_shared(int fd, size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void fatal(const char *what) {
    fprintf(stderr, "%s\n", what);
    abort();
}

static int check_arguments(const struct hf3fs_iov *iov, const char *mount, size_t size, size_t block_size) {
    if (iov == NULL || mount == NULL || *mount == '\0') return -EINVAL;
    if (strlen(mount) >= sizeof iov->mount_point) return -EINVAL;
    if (size == 0 && block_size == 0) raise(SIGFPE);
    if (block_size > size) fatal("terminate called after throwing an instance of 'std::runtime_error': block size");
    return 0;
}

static struct buffer *new_buffer(int fd, size_t size, size_t block_size, bool wrapped) {
    struct buffer *buffer = calloc(1, sizeof *buffer);
    buffer->memory = map_shared(fd, size);
    if (buffer->memory == NULL) {
        free(buffer);
        return NULL;
    }
    buffer->size = size;
    buffer->block_size = block_size != 0 ? block_size : size;
    buffer->references = 1;
    buffer->wrapped = wrapped;
    const int64_t number = ++emulator.counters.iovs_made;
    buffer->refused = emulator.options.buffer_every > 0 && number % emulator.options.buffer_every == 0;
    buffer->next = emulator.buffers;
    emulator.buffers = buffer;
    return buffer;
}

void release_buffer(struct buffer *buffer) {
    if (--buffer->references > 0) return;
    munmap(buffer->memory, buffer->size);
    free(buffer);
}

static void remove_buffer(struct buffer *buffer) {
    for (struct buffer **at = &emulator.buffers; *at != NULL; at = &(*at)->next) {
        if (*at != buffer) continue;
        *at = buffer->next;
        break;
    }
    release_buffer(buffer);
}

static int create(struct hf3fs_iov *iov, const char *mount, size_t size, size_t block_size, int numa) {
    char text[40], name[64], link[PATH_MAX];
    if (getrandom(iov->id, sizeof iov->id, 0) != sizeof iov->id) return -EIO;
    uuid_text(iov->id, text);
    snprintf(name, sizeof name, "/hf3fs-iov-%s", text);
    note_memory(name);
    const int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0666);
    if (fd < 0) return -EIO;
    struct buffer *buffer = NULL;
    void *base = NULL;
    int error = -EIO;
    if (ftruncate(fd, (off_t)size) == 0 && (base = map_shared(fd, size)) != NULL) {
        link_path(link, sizeof link, mount, iov->id, block_size);
        char target[96];
        snprintf(target, sizeof target, "/dev/shm%s", name);
        hold_mount(mount);
        error = mounted_symlink(target, link) == 0 ? 0 : -errno;
        lock();
        if (error == 0 && (buffer = new_buffer(fd, size, block_size, false)) != NULL) {
            memcpy(buffer->id, iov->id, sizeof iov->id);
            strcpy(buffer->shm_name, name);
            strcpy(buffer->link, link);
        }
        unlock();
    }
    close(fd);
    if (buffer == NULL) {
        if (base != NULL) munmap(base, size);
        unlink_memory(name);
        return error != 0 ? error : -ENOMEM;
    }
    iov->base = base;
    iov->iovh = buffer;
    strcpy(iov->mount_point, mount);
    iov->size = size;
    iov->block_size = block_size;
    iov->numa = numa;
    lock();
    emulator.counters.iovs++;
    unlock();
    return 0;
}

int hf3fs_iovcreate(struct hf3fs_iov *iov, const char *mount, size_t size, size_t block_size, int numa) {
    const int error = check_arguments(iov, mount, size, block_size);
    if (error != 0) return error;
    lock();
    read_control_file();
    const int refused = (int)emulator.options.iov_error;
    unlock();
    return refused != 0 ? -refused : create(iov, mount, size, block_size, numa);
}

int hf3fs_iovopen(struct hf3fs_iov *iov, const uint8_t id[16], const char *mount, size_t size, size_t block_size, int numa) {
    (void)iov, (void)id, (void)mount, (void)size, (void)block_size, (void)numa;
    return -EIO;
}

int hf3fs_iovwrap(struct hf3fs_iov *iov, void *base, const uint8_t id[16], const char *mount, size_t size,
                  size_t block_size, int numa) {
    if (iov == NULL || mount == NULL || strlen(mount) >= sizeof iov->mount_point) return -EINVAL;
    iov->iovh = NULL;
    iov->base = base;
    memcpy(iov->id, id, sizeof iov->id);
    strcpy(iov->mount_point, mount);
    iov->size = size;
    iov->block_size = block_size;
    iov->numa = numa;
    return 0;
}

void hf3fs_iovunlink(struct hf3fs_iov *iov) {
    if (iov == NULL || iov->iovh == NULL) return;
    lock();
    struct buffer *buffer = iov->iovh;
    if (buffer->shm_name[0] != '\0') unlink_memory(buffer->shm_name);
    buffer->shm_name[0] = '\0';
    unlock();
}

void hf3fs_iovdestroy(struct hf3fs_iov *iov) {
    if (iov == NULL || iov->iovh == NULL) return;
    hf3fs_iovunlink(iov);
    struct buffer *buffer = iov->iovh;
    mounted_unlink(buffer->link);
    lock();
    munmap(iov->base, iov->size);
    remove_buffer(buffer);
    iov->iovh = NULL;
    emulator.counters.iovs--;
    unlock();
}

/* A buffer that the client made itself: the daemon follows the link with its id. */
static struct buffer *open_wrapped(const struct hf3fs_iov *iov) {
    char link[PATH_MAX], target[PATH_MAX];
    link_path(link, sizeof link, iov->mount_point, iov->id, iov->block_size);
    if (realpath(link, target) == NULL || strncmp(target, "/dev/shm/", 9) != 0) return NULL;
    const int fd = open(target, O_RDWR | O_CLOEXEC);
    if (fd < 0) return NULL;
    struct stat status;
    struct buffer *buffer = NULL;
    if (fstat(fd, &status) == 0 && status.st_size > 0) {
        buffer = new_buffer(fd, (size_t)status.st_size, iov->block_size, true);
    }
    close(fd);
    if (buffer != NULL) {
        memcpy(buffer->id, iov->id, sizeof iov->id);
        strcpy(buffer->link, link);
    }
    return buffer;
}

struct buffer *find_buffer(const struct hf3fs_iov *iov) {
    struct stat status;
    for (struct buffer *buffer = emulator.buffers; buffer != NULL; buffer = buffer->next) {
        if (memcmp(buffer->id, iov->id, sizeof iov->id) != 0) continue;
        if (lstat(buffer->link, &status) == 0) return buffer;
        if (!buffer->wrapped) return NULL; /* the daemon has forgotten it; the client has not */
        remove_buffer(buffer);
        break;
    }
    return open_wrapped(iov);
}

void forget_wrapped_buffers(void) {
    for (struct buffer *buffer = emulator.buffers, *next; buffer != NULL; buffer = next) {
        next = buffer->next;
        if (buffer->wrapped) remove_buffer(buffer);
    }
}
