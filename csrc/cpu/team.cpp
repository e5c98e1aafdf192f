#include "team.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <thread>

#include "problem.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace dante {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpins = 2000;  // some 20 to 50 microseconds, about what it costs to give up the core and get it back
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// What a calling thread has learned of the machine: how much of the last teams' time it spent on waiting for its helpers.
// Judged by windows of working time, from call to call; too much of it, and there is a pause without helpers, at first as
// long as two windows, then twice as long whenever the try after it fails again.
struct Judge {
  static constexpr Clock::duration kWindow = std::chrono::milliseconds(8), kLongest = 128 * kWindow;

  Clock::duration worked{0}, waited{0}, pause = 2 * kWindow;
  Clock::time_point pause_end;

  void add(Clock::duration work, Clock::duration wait) {
    worked += work;
    waited += wait;
    if (worked < kWindow) return;
    if (waited > worked * 2 / 5) {
      pause_end = Clock::now() + pause;
      pause = std::min(2 * pause, kLongest);
    } else {
      pause = 2 * kWindow;
    }
    worked = waited = {};
  }
  bool pauses() const { return Clock::now() < pause_end; }
};
thread_local Judge judge;

// Whether this process was forked from one that had loaded this library, or Python says so: the pool's threads, if there were
// any, are then not here, and asking for them may wait forever (as it does in torch's own operators).
bool forked = false;
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

void work_alone() { forked = true; }

Team::Team(int wanted, bool at_once)
    : most_(wanted > 1 && (forked || judge.pauses()) ? 1 : wanted), at_once_(at_once), start_(at_once ? 0 : -1) {}

void Team::run(const std::function<void(int, int64_t)>& body) {
  if (most_ == 1) return body(0, 0);
  const auto help = [&](int member) {
    for (int64_t start = -1, last = -1;; last = start) {
      ready_.fetch_add(1, std::memory_order_release);
      for (int tries = 0; (start = start_.load(std::memory_order_acquire)) <= last; ++tries) {
        if (tries < kSpins) {
          std::this_thread::yield();
        } else {
          std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
      }
      if (start == kNever) return;
      body(member, start);
    }
  };
  begin_ = Clock::now();
  Clock::time_point end;
  // The pool deals out ranges of members, of one member each unless it has too few threads or this call came from one.
  torch::stable::parallel_for(0, most_, 1, [&](int64_t first, int64_t last) {
    if (first > 0) return help(static_cast<int>(first));
    helpers_ = last == 1 ? most_ - 1 : 0;
    body(0, 0);
    end = Clock::now();
    if (size_ == 1 && !at_once_) begin_ = end;
    start_.store(kNever, std::memory_order_release);
  });
  if (helpers_ > 0) judge.add(Clock::now() - begin_, waited_ + (Clock::now() - end));
}

void Team::barrier(int member) {
  const int size = size_;  // it may change once all have arrived
  if (size == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  const Clock::time_point arrival = Clock::now();
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
  if (member == 0) waited_ += Clock::now() - arrival;
}

bool Team::stays(int member, int64_t next) {
  if (size_ > 1) {
    if (member == 0 && Clock::now() - begin_ > Judge::kWindow) {
      const Clock::time_point now = Clock::now();
      judge.add(now - begin_, waited_);
      begin_ = now;
      waited_ = {};
      leave_ = judge.pauses();
      if (leave_) ready_.store(0, std::memory_order_relaxed);
    }
    barrier(member);
    if (!leave_) return true;
    if (member != 0) return false;
    size_ = 1;  // the helpers pass the barrier by its generation alone
  } else if (helpers_ > 0 && ready_.load(std::memory_order_acquire) == helpers_ && !judge.pauses()) {
    size_ = helpers_ + 1;
    leave_ = false;
    begin_ = Clock::now();
    start_.store(next, std::memory_order_release);
  }
  return true;
}

}  // namespace dante
