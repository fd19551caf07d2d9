// How the ranks of a node find one window: by sockets in a directory that only this user can enter. Every member answers
// at one of its own, so that no member's end keeps others from joining.
#pragma once

#include <memory>
#include <stdint.h>
#include <string>

#include "window/node_window.h"

namespace el {

struct WindowPlace {
    std::string directory;  // of this user, which nobody else can enter
    uint64_t bytes;         // of a window that is made because there is none
    uint64_t slot_bytes;
    int64_t patience_ns;  // how long to wait for others in all
};

// A member: its window, and the thread that holds `alive` and hands the window over to whoever asks.
class Membership {
  public:
    // 0 or an errno.
    int join(const WindowPlace &place);
    ~Membership();
    Membership() = default;
    Membership(const Membership &) = delete;
    Membership &operator=(const Membership &) = delete;

    NodeWindow &window() { return window_; }
    bool made() const { return made_; }  // whether there was none before

  private:
    int find_or_make(int directory, const WindowPlace &place, int64_t until);
    int ask_others(int directory, int64_t until);
    int make(const WindowPlace &place);
    int listen_in(int directory);
    int start();
    static void *serve(void *self);
    void answer_until_asked_to_end();
    void answer_one();

    NodeWindow window_;
    bool made_ = false;
    int directory_ = -1;
    int listening_ = -1;
    int ending_ = -1;  // an event descriptor
    std::string name_;
    pthread_t thread_{};
    bool started_ = false;
    std::atomic<int> entered_{-1};  // -1: not yet; else what enter() said
};

}  // namespace el
