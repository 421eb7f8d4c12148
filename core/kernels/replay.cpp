// Calls that were made before, made again: numbers and addresses follow from how many rows there are. See core/replay.py.
#include "calls.h"

namespace {

constexpr int MOST_WORDS = 32; // of one call

struct Call {
  void (*function)(const Word *);
  int64_t words;
};

struct Line { // base + fixed + each * rows
  int64_t base, fixed, each;
};

} // namespace

// calls, how many, the lines of all their words, bases, rows
extern "C" void replay(const Word *w) {
  const Call *calls = w[0].at<const Call>();
  const Line *line = w[2].at<const Line>();
  const int64_t *bases = w[3].at<const int64_t>(), rows = w[4].number;
  for (int64_t i = 0; i < w[1].number; i++) {
    Word words[MOST_WORDS];
    for (int64_t word = 0; word < calls[i].words; word++, line++)
      words[word].number = bases[line->base] + line->fixed + line->each * rows;
    calls[i].function(words);
  }
}
