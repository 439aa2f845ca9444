// Memory for one call, taken piece by piece and given back at its end.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace foveal::FOVEAL_ISA {

// Every piece begins at a multiple of 64 bytes; `Scratch::space` says how many bytes a piece takes.
struct Scratch {
  explicit Scratch(int64_t bytes) : memory(static_cast<char*>(aligned_alloc(64, space<char>(bytes + 1)))), next(memory) {
    if (!memory) abort();
  }
  ~Scratch() { free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static constexpr int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  template <class T>
  static constexpr int64_t space(int64_t count) {
    return rounded(count * static_cast<int64_t>(sizeof(T)));
  }

  template <class T>
  T* take(int64_t count) {
    return take<T>(next, count);
  }
  // A piece of memory that was itself taken, such as one thread's share.
  template <class T>
  static T* take(char*& next, int64_t count) {
    char* piece = next;
    next += space<T>(count);
    return reinterpret_cast<T*>(piece);
  }

 private:
  char *memory, *next;
};

}  // namespace foveal::FOVEAL_ISA
