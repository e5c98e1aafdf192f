// Threads of torch's own pool that run one function side by side and meet at barriers.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>

namespace dante {

// The work is a sequence of positions from 0 on, done in pieces; a piece gives the same bits whatever the size of the team
// that does it. So the caller never waits for its helpers to be given a core: it works alone until they run, and where it
// waits for them too much, since something else keeps a core busy, it goes on alone and asks them again later.
class Team {
 public:
  // Of up to `wanted` members. `at_once`: helpers begin at position 0 whenever they are there, and share the work without
  // barrier() and stays().
  explicit Team(int wanted, bool at_once = false);

  // How many members there can be, and how many work side by side now. The latter changes only in between pieces.
  int most() const { return most_; }
  int size() const { return size_; }

  // Runs body(member, position): for member 0 on the calling thread from position 0 on, for every helper on a thread of the
  // pool from where it joins. Returns when all are done. Where the pool has too few threads, the caller works alone.
  void run(const std::function<void(int, int64_t)>& body);

  // Returns once every member has arrived; what each wrote before is then visible to all. Waits by spinning for a while
  // (the phases of a piece are microseconds apart), then lets other threads have the core, which matters when one of them
  // is the very member that is waited for.
  void barrier(int member);

  // Ends a piece, of which every member has passed a barrier; `next` is the position behind it. Whether this member goes on
  // with the next piece: a helper may be asked to leave.
  bool stays(int member, int64_t next);

 private:
  using Clock = std::chrono::steady_clock;

  int most_, size_ = 1, helpers_ = 0;
  bool at_once_, leave_ = false;
  std::atomic<int64_t> start_;  // where helpers join that have not been there yet
  std::atomic<int> ready_{0}, arrived_{0};
  std::atomic<uint32_t> generation_{0};
  Clock::time_point begin_;    // of the team's present window
  Clock::duration waited_{0};  // of member 0, at barriers since then
};

}  // namespace dante
