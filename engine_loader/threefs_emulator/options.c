/* Options: HF3FS_EMULATOR_MOUNT and HF3FS_EMULATOR_OPTIONS ("latency_us=2000,bandwidth=2000000000") at load, the file
 * HF3FS_EMULATOR_CONTROL whenever it changes, hf3fs_emulator_configure() from the same process. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "emulator.h"

struct emulator emulator = {.lock = PTHREAD_MUTEX_INITIALIZER};

#define OPTION(name) {#name, offsetof(struct options, name)}
static const struct {
    const char *name;
    size_t at;
} known[] = {
    OPTION(latency_us), OPTION(jitter_us),  OPTION(bandwidth),  OPTION(threads),      OPTION(eager_every), OPTION(error),
    OPTION(error_every), OPTION(short_every), OPTION(zero_every), OPTION(hole_at),      OPTION(hole_bytes), OPTION(hang_every),
    OPTION(late_every),  OPTION(late_ms),     OPTION(full_every), OPTION(buffer_every), OPTION(dead),       OPTION(die_after),
    OPTION(iov_error),   OPTION(ior_error),   OPTION(register_error), OPTION(seed), OPTION(dma),
    OPTION(semaphore_error), OPTION(no_negative_depth), OPTION(mount_hang), OPTION(ioctl_hang), OPTION(other_pid_namespace),
    OPTION(batches), OPTION(requests), OPTION(server_requests), OPTION(request_bytes), OPTION(chunk_bytes), OPTION(servers),
    OPTION(shared_link),
};

#define COUNTER(name) {#name, offsetof(struct counters, name)}
static const struct {
    const char *name;
    size_t at;
} counted[] = {
    COUNTER(rings), COUNTER(iovs), COUNTER(registrations), COUNTER(threads), COUNTER(in_flight), COUNTER(ios), COUNTER(bytes),
    COUNTER(rings_made), COUNTER(iovs_made), COUNTER(batches), COUNTER(max_in_flight), COUNTER(errors), COUNTER(violations),
    COUNTER(running_batches), COUNTER(requests), COUNTER(blocked), COUNTER(max_batches), COUNTER(max_requests),
};

static void reset_options(void) {
    const struct options fresh = {.threads = 4, .eager_every = 3, .error = EREMOTEIO, .late_ms = 500, .seed = 1};
    char mount[PATH_MAX];
    strcpy(mount, emulator.options.mount);
    emulator.options = fresh;
    strcpy(emulator.options.mount, mount);
    emulator.counters.max_in_flight = emulator.counters.in_flight;
    emulator.counters.max_batches = emulator.counters.running_batches;
    emulator.counters.max_requests = 0;
}

/* When the link is free, and the bytes that went over it, in memory that all processes with this mount share. */
static int share_link(const char *path) {
    const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return -errno;
    void *memory = MAP_FAILED;
    const size_t bytes = 2 * sizeof(int64_t);
    if (ftruncate(fd, (off_t)bytes) == 0) memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    emulator.shared_link_free_ns = memory == MAP_FAILED ? NULL : memory;
    emulator.shared_bytes = memory == MAP_FAILED ? NULL : emulator.shared_link_free_ns + 1;
    return 0;
}

static int set_mount(const char *path) {
    char real[PATH_MAX], virtual[PATH_MAX + 32];
    if (realpath(path, real) == NULL) return -errno;
    strcpy(emulator.options.mount, real);
    snprintf(virtual, sizeof virtual, "%s/3fs-virt", real);
    mkdir(virtual, 0777);
    strcat(virtual, "/iovs");
    mkdir(virtual, 0777);
    snprintf(virtual, sizeof virtual, "%s/3fs-virt/.daemon", real);
    mkdir(virtual, 0777);
    return share_link(strcat(virtual, "/.link"));
}

/* As 3FS ships: the daemon's batch coroutines for normal priority, the storage client's requests, the setup guide's chunks. */
static void set_usual_limits(void) {
    struct options *options = &emulator.options;
    options->batches = 112;
    options->requests = 32;
    options->server_requests = 8;
    options->request_bytes = 4 << 20;
    options->chunk_bytes = 1 << 20;
    options->servers = 16;
}

static int set_option(const char *name, const char *value) {
    if (strcmp(name, "mount") == 0) return set_mount(value);
    if (strcmp(name, "limits") == 0) {
        set_usual_limits();
        return 0;
    }
    if (strcmp(name, "reset") == 0) {
        reset_options();
        return 0;
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(name, known[i].name) != 0) continue;
        char *end;
        const int64_t number = strtoll(value, &end, 10);
        if (end == value || *end != '\0' || number < 0) return -EINVAL;
        *(int64_t *)((char *)&emulator.options + known[i].at) = number;
        if (strcmp(name, "seed") == 0) emulator.random = (uint64_t)number * 2654435761u + 88172645463325252u;
        return 0;
    }
    return -EINVAL;
}

int parse_options(const char *text) {
    char *copy = strdup(text), *state = NULL;
    int result = 0;
    for (char *item = strtok_r(copy, ", \n", &state); item != NULL; item = strtok_r(NULL, ", \n", &state)) {
        char *value = strchr(item, '=');
        if (value != NULL) *value++ = '\0';
        const int error = set_option(item, value != NULL ? value : "1");
        if (error != 0) {
            fprintf(stderr, "3FS emulator: bad option %s\n", item);
            result = error;
        }
    }
    free(copy);
    return result;
}

void read_control_file(void) {
    static struct timespec seen;
    const char *path = getenv("HF3FS_EMULATOR_CONTROL");
    struct stat status;
    if (path == NULL || stat(path, &status) != 0) return;
    if (status.st_mtim.tv_sec == seen.tv_sec && status.st_mtim.tv_nsec == seen.tv_nsec) return;
    seen = status.st_mtim;
    char text[4096];
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    const ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n < 0) return;
    text[n] = '\0';
    reset_options();
    parse_options(text);
}

int hf3fs_emulator_configure(const char *options) {
    lock();
    const int result = parse_options(options);
    start_what_may();
    pthread_cond_broadcast(&emulator.work);
    unlock();
    return result;
}

int64_t hf3fs_emulator_count(const char *what) {
    int64_t result = -1;
    lock();
    for (size_t i = 0; i < sizeof counted / sizeof *counted; i++) {
        if (strcmp(what, counted[i].name) == 0) result = *(int64_t *)((char *)&emulator.counters + counted[i].at);
    }
    unlock();
    return result;
}

void lock(void) { pthread_mutex_lock(&emulator.lock); }
void unlock(void) { pthread_mutex_unlock(&emulator.lock); }

int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

uint64_t random_below(uint64_t limit) {
    uint64_t x = emulator.random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    emulator.random = x;
    return limit == 0 ? 0 : x % limit;
}

/* The client broke a rule of the real library that the real library does not report: tests check the counter. */
void violation(const char *what) {
    emulator.counters.violations++;
    fprintf(stderr, "3FS emulator: %s\n", what);
}

static void init_work(void) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&emulator.work, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* After fork, the parent has threads, rings and IOs; registrations also exist in the child, as in the real library. */
static void in_child(void) {
    pthread_mutex_init(&emulator.lock, NULL);
    init_work();
    emulator.counters.threads = emulator.counters.rings = emulator.counters.iovs = emulator.counters.in_flight = 0;
    emulator.rings = NULL;
    emulator.buffers = NULL;
    emulator.ready = NULL;
    emulator.ready_end = &emulator.ready;
    emulator.due_count = 0;
    emulator.hung = NULL;
    emulator.counters.running_batches = 0;
    forget_requests();
    forget_handles();
    emulator.pid = getpid();
}

__attribute__((constructor)) static void load(void) {
    init_work();
    reset_options();
    emulator.random = 88172645463325252u;
    emulator.ready_end = &emulator.ready;
    emulator.unsent_end = &emulator.unsent;
    emulator.pid = getpid();
    make_table();
    pthread_atfork(lock, unlock, in_child);
    const char *mount = getenv("HF3FS_EMULATOR_MOUNT"), *options = getenv("HF3FS_EMULATOR_OPTIONS");
    if (mount != NULL && set_mount(mount) != 0) fprintf(stderr, "3FS emulator: there is no directory %s\n", mount);
    if (options != NULL) parse_options(options);
}
