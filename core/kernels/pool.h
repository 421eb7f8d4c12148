// Work shared among threads of our own. Nobody waits for a helper that does not come: whoever is there does what is left, so
// that a machine which is busy with something else costs its share and not a time slice at each of a step's hundreds of
// products, as a barrier does.
#pragma once
#include <cstdint>

constexpr int MOST_THREADS = 64;
constexpr int64_t FEW = 1 << 14; // numbers that one thread is done with before a second one has begun

// Calls piece(context, i) once for each i from 0 to count, on this thread and on helpers; back when all are done. Each
// thread has its own stretch of neighbours first, and takes from the others' when that is done.
void share(int64_t threads, int64_t count, void (*piece)(void *, int64_t), void *context);

template <typename F> void share(int64_t threads, int64_t count, F f) {
  share(threads, count, [](void *context, int64_t i) { (*static_cast<F *>(context))(i); }, &f);
}
