// Locks, conditions and the clock. The standard library's timed waits use pthread_cond_clockwait, which
// ThreadSanitizer of gcc 12 does not know, so conditions are pthread's own with a monotonic clock.
#pragma once

#include <pthread.h>
#include <stdint.h>
#include <time.h>

namespace el {

constexpr int64_t kMillisecond = 1000000;
constexpr int64_t kForever = INT64_MAX;

inline int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
}

// The time `timeout_ms` from now; without limit when negative.
inline int64_t deadline_in(int64_t timeout_ms) {
    const int64_t now = now_ns();
    if (timeout_ms < 0 || timeout_ms >= (kForever - now) / kMillisecond) return kForever;
    return now + timeout_ms * kMillisecond;
}

class Mutex {
  public:
    Mutex() { pthread_mutex_init(&mutex_, nullptr); }
    ~Mutex() { pthread_mutex_destroy(&mutex_); }
    Mutex(const Mutex &) = delete;
    Mutex &operator=(const Mutex &) = delete;
    void lock() { pthread_mutex_lock(&mutex_); }
    void unlock() { pthread_mutex_unlock(&mutex_); }
    pthread_mutex_t *native() { return &mutex_; }

  private:
    pthread_mutex_t mutex_;
};

// Holds a mutex for a scope; may let go of it in between.
class Lock {
  public:
    explicit Lock(Mutex &mutex) : mutex_(mutex) { mutex_.lock(); }
    ~Lock() {
        if (held_) mutex_.unlock();
    }
    Lock(const Lock &) = delete;
    Lock &operator=(const Lock &) = delete;
    void unlock() {
        held_ = false;
        mutex_.unlock();
    }
    void lock() {
        mutex_.lock();
        held_ = true;
    }
    Mutex &mutex() { return mutex_; }

  private:
    Mutex &mutex_;
    bool held_ = true;
};

class Condition {
  public:
    Condition() {
        pthread_condattr_t attributes;
        pthread_condattr_init(&attributes);
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        pthread_cond_init(&condition_, &attributes);
        pthread_condattr_destroy(&attributes);
    }
    ~Condition() { pthread_cond_destroy(&condition_); }
    Condition(const Condition &) = delete;
    Condition &operator=(const Condition &) = delete;

    void wait_until(Lock &lock, int64_t when_ns) {
        if (when_ns == kForever) {
            pthread_cond_wait(&condition_, lock.mutex().native());
            return;
        }
        timespec when;
        when.tv_sec = static_cast<time_t>(when_ns / 1000000000);
        when.tv_nsec = static_cast<long>(when_ns % 1000000000);
        pthread_cond_timedwait(&condition_, lock.mutex().native(), &when);
    }
    void wait(Lock &lock) { wait_until(lock, kForever); }
    void notify_one() { pthread_cond_signal(&condition_); }
    void notify_all() { pthread_cond_broadcast(&condition_); }

  private:
    pthread_cond_t condition_;
};

}  // namespace el
