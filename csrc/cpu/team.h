// Threads that run one function side by side and meet at barriers.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>

namespace dante {

class Team {
 public:
  // Of `wanted` members; of one while the last teams found that the machine's cores are busy with something else.
  explicit Team(int wanted);
  int size() const { return size_; }

  // Runs body(member) for members 0 .. size - 1, member 0 on the calling thread, and returns when all are done. The
  // threads live as long as the call: nothing stays behind for a fork() to break, and starting one costs less than a
  // step. Where the system gives no more threads, throws before any work is done.
  void run(const std::function<void(int)>& body);

  // Returns once every member has arrived; what each wrote before is then visible to all. Waits by spinning for a while
  // (a step's phases are microseconds apart), then lets other threads have the core, which matters when one of them is
  // the very member that is waited for.
  void barrier(int member);

  // Whether this member goes on after a barrier that ends a step. False where member 0 found that it waits for the
  // others for most of the time, since another process keeps a core busy: then they leave, and it goes on alone.
  bool stays(int member);

 private:
  using Clock = std::chrono::steady_clock;

  int size_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> generation_{0};
  std::atomic<bool> dissolved_{false};
  bool warm_ = false;
  Clock::time_point begin_;
  Clock::duration waited_{};  // of member 0, at barriers
};

}  // namespace dante
