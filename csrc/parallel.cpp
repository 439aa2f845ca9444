// Threads. torch's OpenMP runtime is found in the process and asked for its team: a second runtime, or threads of our own,
// would fight torch's waiting workers for the cores. GOMP_parallel is the entry that GCC's compiled code calls; LLVM's and
// Intel's runtimes offer it as well.
#include "common/parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

namespace foveal {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

int open_openmp(dl_phdr_info* info, size_t, void* found) {
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* name = slash ? slash + 1 : info->dlpi_name;
  if (std::strncmp(name, "libgomp", 7) && std::strncmp(name, "libomp", 6) && std::strncmp(name, "libiomp", 7)) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return 0;
  *static_cast<void**>(found) = dlsym(library, "GOMP_parallel");
  return *static_cast<void**>(found) != nullptr;
}

GompParallel find_openmp() {
  void* found = nullptr;
  dl_iterate_phdr(open_openmp, &found);
  return reinterpret_cast<GompParallel>(found);
}

GompParallel openmp() {
  static const GompParallel found = find_openmp();
  return found;
}

struct Work {
  void (*body)(void*, int, int);
  void* argument;
  int items;
  std::atomic<int> next_item{0};
  std::atomic<int> next_thread{0};
};

void take_items(void* data) {
  Work& work = *static_cast<Work*>(data);
  const int thread = work.next_thread.fetch_add(1, std::memory_order_relaxed);
  for (int item; (item = work.next_item.fetch_add(1, std::memory_order_relaxed)) < work.items;)
    work.body(work.argument, item, thread);
}

void run_own_threads(Work& work, int threads) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(take_items, &work);
  take_items(&work);
  for (std::thread& other : others) other.join();
}

}  // namespace

void parallel_items(int threads, int items, void (*body)(void*, int, int), void* argument) {
  if (threads > items) threads = items;
  if (threads <= 1) {
    for (int item = 0; item < items; ++item) body(argument, item, 0);
    return;
  }
  Work work;
  work.body = body;
  work.argument = argument;
  work.items = items;
  if (GompParallel start = openmp())
    start(take_items, &work, static_cast<unsigned>(threads), 0);
  else
    run_own_threads(work, threads);
}

const char* pool_name() { return openmp() ? "torch's OpenMP" : "own threads"; }

}  // namespace foveal
