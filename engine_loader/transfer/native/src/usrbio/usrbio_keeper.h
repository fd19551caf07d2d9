// The thread that makes a channel and gives it back. Calls into a mount whose daemon hangs do not return; then this thread
// is left behind with its channel, and nobody else waits.
#pragma once

#include <memory>
#include <vector>

#include "threads/sync.h"
#include "usrbio/usrbio_channel.h"

namespace el {

class Keeper : public std::enable_shared_from_this<Keeper> {
  public:
    enum class State { making, open, failed, closed };

    // `node`: see Channel::open. nullptr where no thread could be started, with `error` set.
    static std::shared_ptr<Keeper> start(const UsrbioConfig &config, int node, const std::vector<uint32_t> &cpus, int &error);
    Keeper(const UsrbioConfig &config, int node) : config_(config), node_(node), since_(now_ns()) {}
    Keeper(const Keeper &) = delete;
    Keeper &operator=(const Keeper &) = delete;

    int64_t since() const { return since_; }  // when making began
    State state();
    UsrbioFailure failure();  // of a channel that could not be made
    // The channel, once it is open. It is closed when all that share it have let go of it; to be called once.
    std::shared_ptr<Channel> share();
    // Nobody wants the channel.
    void retire();
    // Return when the state is another one, or at `when_ns`.
    void wait_while(State state, int64_t when_ns);

  private:
    static void *thread_main(void *keeper);
    void keep();
    void set(State state);

    const UsrbioConfig config_;
    const int node_;
    const int64_t since_;
    Channel channel_;
    Mutex mutex_;  // guards what follows
    Condition changed_;
    State state_ = State::making;
    UsrbioFailure failure_{};
    bool retired_ = false;
};

// The channel of one ring thread, at whatever stage it is.
class ChannelHolder {
  public:
    // Have a channel made unless that was begun. Whether there is one that can be used now; else failed() or it is making.
    bool ready(const UsrbioConfig &config, int node, const std::vector<uint32_t> &cpus);
    bool is_making() const { return keeper_ != nullptr && channel_ == nullptr; }
    int64_t making_since() const { return keeper_->since(); }
    // Whether making one, not begun before `since`, failed. Another one will be tried next.
    bool failed(int64_t since, UsrbioFailure &failure);
    const std::shared_ptr<Channel> &get() const { return channel_; }
    // Return when a channel was made or could not be, or at `when_ns`.
    void wait(int64_t when_ns) { keeper_->wait_while(Keeper::State::making, when_ns); }
    // Let go of the channel. Copies to devices that are under way keep it until they end.
    void retire();
    // The same, and wait until it was given back, until `when_ns`.
    void retire_and_wait(int64_t when_ns);

  private:
    std::shared_ptr<Keeper> keeper_;
    std::shared_ptr<Channel> channel_;
    int start_error_ = 0;
};

}  // namespace el
