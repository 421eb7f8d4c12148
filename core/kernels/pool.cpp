#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

constexpr int SPINS = 4000; // looks for work before a helper sleeps: some hundred microseconds, more than between two kernels
constexpr int PATIENCE = 200; // looks at helpers that are not done before their core is offered to them

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct alignas(64) Stretch {
  std::atomic<int64_t> next;
  int64_t end;
};

class Pool {
public:
  void run(int64_t threads, int64_t count, void (*piece)(void *, int64_t), void *context) {
    threads = std::min<int64_t>({threads, count, MOST_THREADS});
    std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    if (threads < 2 || !mine.owns_lock()) { // another caller has the helpers
      for (int64_t i = 0; i < count; i++) piece(context, i);
      return;
    }
    while (helpers_ < threads - 1) std::thread(&Pool::help, this, ++helpers_).detach();
    piece_ = piece;
    context_ = context;
    stretches_ = int(threads);
    for (int64_t t = 0; t < threads; t++) {
      stretch_[t].next.store(count * t / threads, std::memory_order_relaxed);
      stretch_[t].end = count * (t + 1) / threads;
    }
    state_.fetch_add(TICKET); // open
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work(0);
    state_.fetch_add(TICKET); // closed: nobody comes in any more
    for (int looks = 0; state_.load() % TICKET != 0; looks++) looks < PATIENCE ? pause() : std::this_thread::yield();
  }

private:
  static constexpr uint64_t TICKET = 256; // of the state; what is below counts the helpers inside
  static bool open(uint64_t state) { return state / TICKET % 2 == 1; }

  void work(int first) {
    for (int turn = 0; turn < stretches_; turn++) {
      Stretch &stretch = stretch_[(first + turn) % stretches_];
      for (int64_t i; (i = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) piece_(context_, i);
    }
  }

  [[noreturn]] void help(int number) {
    uint64_t seen = 0;
    for (;;) {
      uint64_t state = state_.load();
      auto fresh = [&] { return open(state = state_.load()) && state / TICKET != seen; };
      for (int spin = 0; spin < SPINS && !fresh(); spin++) pause();
      if (!fresh()) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, fresh);
        asleep_.fetch_sub(1);
      }
      if (!state_.compare_exchange_strong(state, state + 1)) continue; // it was closed, or another one came in
      seen = state / TICKET;
      if (number < stretches_) work(number);
      state_.fetch_sub(1);
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> asleep_{0};
  int helpers_ = 0, stretches_ = 0;
  void (*piece_)(void *, int64_t) = nullptr;
  void *context_ = nullptr;
  Stretch stretch_[MOST_THREADS];
};

Pool &pool() {
  static Pool *one = new Pool; // for as long as the process lives: its helpers do
  return *one;
}

} // namespace

void share(int64_t threads, int64_t count, void (*piece)(void *, int64_t), void *context) {
  pool().run(threads, count, piece, context);
}
