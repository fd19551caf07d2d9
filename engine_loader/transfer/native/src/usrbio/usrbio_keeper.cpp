#include "usrbio/usrbio_keeper.h"

#include <pthread.h>
#include <utility>

#include "threads/threads.h"

namespace el {

std::shared_ptr<Keeper> Keeper::start(const UsrbioConfig &config, int node, const std::vector<uint32_t> &cpus, int &error) {
    auto keeper = std::make_shared<Keeper>(config, node);
    auto own = std::make_unique<std::shared_ptr<Keeper>>(keeper);
    pthread_t thread;
    error = start_thread(thread, cpus, "el-channel", thread_main, own.get());
    if (error != 0) return nullptr;
    own.release();  // the thread's
    pthread_detach(thread);
    return keeper;
}

void *Keeper::thread_main(void *argument) {
    const std::unique_ptr<std::shared_ptr<Keeper>> keeper(static_cast<std::shared_ptr<Keeper> *>(argument));
    (*keeper)->keep();
    return nullptr;
}

void Keeper::keep() {
    UsrbioFailure failure{};
    const bool made = channel_.open(config_, node_, failure);
    if (!made) channel_.close();
    {
        Lock lock(mutex_);
        failure_ = failure;
        state_ = made ? State::open : State::failed;
        changed_.notify_all();
        if (!made) return;
        while (!retired_) changed_.wait(lock);
    }
    channel_.close();
    set(State::closed);
}

void Keeper::set(State state) {
    Lock lock(mutex_);
    state_ = state;
    changed_.notify_all();
}

Keeper::State Keeper::state() {
    Lock lock(mutex_);
    return state_;
}

UsrbioFailure Keeper::failure() {
    Lock lock(mutex_);
    return failure_;
}

std::shared_ptr<Channel> Keeper::share() {
    auto self = shared_from_this();
    return std::shared_ptr<Channel>(&channel_, [self](Channel *) { self->retire(); });
}

void Keeper::retire() {
    Lock lock(mutex_);
    retired_ = true;
    changed_.notify_all();
}

void Keeper::wait_while(State state, int64_t when_ns) {
    Lock lock(mutex_);
    while (state_ == state && now_ns() < when_ns) changed_.wait_until(lock, when_ns);
}

bool ChannelHolder::ready(const UsrbioConfig &config, int node, const std::vector<uint32_t> &cpus) {
    if (channel_ != nullptr) return true;
    if (keeper_ == nullptr) keeper_ = Keeper::start(config, node, cpus, start_error_);
    if (keeper_ == nullptr || keeper_->state() != Keeper::State::open) return false;
    channel_ = keeper_->share();
    return true;
}

bool ChannelHolder::failed(int64_t since, UsrbioFailure &failure) {
    if (keeper_ == nullptr) {
        failure = {EL_USRBIO_RING, start_error_};
        return std::exchange(start_error_, 0) != 0;
    }
    if (keeper_->state() != Keeper::State::failed) return false;
    failure = keeper_->failure();
    const bool current = keeper_->since() >= since;
    keeper_.reset();
    return current;
}

void ChannelHolder::retire() {
    if (channel_ == nullptr && keeper_ != nullptr) keeper_->retire();
    channel_.reset();
    keeper_.reset();
}

void ChannelHolder::retire_and_wait(int64_t when_ns) {
    const std::shared_ptr<Keeper> keeper = keeper_;
    retire();
    if (keeper == nullptr) return;
    keeper->wait_while(Keeper::State::making, when_ns);
    keeper->wait_while(Keeper::State::open, when_ns);
}

}  // namespace el
