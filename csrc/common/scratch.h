// Memory for the length of one call, cut into aligned pieces.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace foveal::FOVEAL_ISA {

struct Scratch {
  static constexpr int64_t ALIGNMENT = 64;

  static constexpr int64_t rounded(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

  explicit Scratch(int64_t bytes) : memory(static_cast<char*>(std::aligned_alloc(ALIGNMENT, rounded(bytes)))) {
    if (!memory) std::abort();
    next = memory;
  }
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next piece; whoever made this has counted rounded(count * sizeof(T)) bytes for it.
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += rounded(count * static_cast<int64_t>(sizeof(T)));
    return piece;
  }

 private:
  char* memory;
  char* next;
};

}  // namespace foveal::FOVEAL_ISA
