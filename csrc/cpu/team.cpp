#include "team.h"

#include <thread>
#include <vector>

namespace dante {
namespace {

constexpr int kSpins = 2000;  // some 20 to 50 microseconds, about what it costs to give up the core and get it back

// A team is dissolved where member 0 waited for more than this and for two fifths of the time since the grace of its first
// steps (a new thread's first milliseconds may go by before it is given a core of its own). The next calls then do without one,
// and the one after them tries again.
constexpr auto kPatience = std::chrono::milliseconds(1), kGrace = std::chrono::milliseconds(8);
constexpr int kCallsAlone = 15;
std::atomic<int> calls_alone{0};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Team::Team(int wanted) : size_(wanted) {
  if (wanted > 1 && calls_alone.load(std::memory_order_relaxed) > 0) {
    calls_alone.fetch_sub(1, std::memory_order_relaxed);
    size_ = 1;
  }
}

void Team::run(const std::function<void(int)>& body) {
  std::atomic<int> start{0};  // 1: go, -1: a thread could not be had
  std::vector<std::thread> threads;
  const auto wait_then_work = [&](int member) {
    int go;
    while ((go = start.load(std::memory_order_acquire)) == 0) std::this_thread::yield();
    if (go > 0) body(member);
  };
  try {
    for (int member = 1; member < size_; ++member) threads.emplace_back(wait_then_work, member);
  } catch (...) {
    start.store(-1, std::memory_order_release);
    for (std::thread& thread : threads) thread.join();
    throw;
  }
  begin_ = Clock::now();
  start.store(1, std::memory_order_release);
  body(0);
  for (std::thread& thread : threads) thread.join();
}

void Team::barrier(int member) {
  if (size_ == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
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

bool Team::stays(int member) {
  if (size_ == 1) return true;
  if (member == 0 && !warm_) {
    warm_ = Clock::now() - begin_ > kGrace;
    if (warm_) begin_ = Clock::now(), waited_ = {};
  } else if (member == 0 && waited_ > kPatience && waited_ > (Clock::now() - begin_) * 2 / 5) {
    dissolved_.store(true, std::memory_order_relaxed);
    calls_alone.store(kCallsAlone, std::memory_order_relaxed);
  }
  barrier(member);
  if (!dissolved_.load(std::memory_order_relaxed)) return true;
  if (member != 0) return false;
  // The others have read all that they needed: they passed the barrier's generation, and leave without another.
  size_ = 1;
  return true;
}

}  // namespace dante
