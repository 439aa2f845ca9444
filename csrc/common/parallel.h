// One pool of threads: torch's own.
#pragma once

namespace foveal {

// Calls body(argument, item, thread) for every item in [0, items), each once, on up to `threads` threads; thread is less
// than `threads`. Items are taken in order, whichever thread is free. Returns when all are done. The body must not throw.
void parallel_items(int threads, int items, void (*body)(void* argument, int item, int thread), void* argument);

// The same for a lambda (item, thread).
template <class Body>
void parallel(int threads, int items, Body& body) {
  parallel_items(
      threads, items, [](void* argument, int item, int thread) { (*static_cast<Body*>(argument))(item, thread); },
      &body);
}

// The runtime behind it: "torch's OpenMP", or "own threads" where torch brought none that can be found.
const char* pool_name();

}  // namespace foveal
