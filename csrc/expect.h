// What the C++ tests share: a check that counts and prints failures.
#pragma once

#include <cstdio>

inline int failures = 0;

template <class... Args>
void expect(bool holds, const char* what, Args... args) {
  if (holds || ++failures > 20) return;
  std::printf(what, args...), std::puts("");
}
