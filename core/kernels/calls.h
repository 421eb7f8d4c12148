// How kernels are called: with words of eight bytes, each a number or an address. So one list holds calls of any kernel.
#pragma once
#include <cstdint>

union Word {
  int64_t number;
  double real;
  void *address;
  template <typename T> T *at() const { return static_cast<T *>(address); }
};
