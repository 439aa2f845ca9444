// The Python module foveal.kernels.cpu._native: a submodule for each instruction set that this machine has.
#include "bindings/bindings.h"
#include "common/parallel.h"

#if defined(__x86_64__) && !defined(FOVEAL_EMULATED)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace foveal {
namespace {

#if defined(__x86_64__) && !defined(FOVEAL_EMULATED)
// Whether there are AMX tiles with bf16 and int8, and Linux lets this process use them: it has to be asked once.
bool has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile | int8)) != (bf16 | tile | int8)) return false;
#if defined(SYS_arch_prctl)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

bool machine_has(Isa isa) {
#if defined(FOVEAL_EMULATED)
  return true;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512vbmi");
  switch (isa) {
    case avx2_isa:
      return avx2;
    case avx512_isa:
      return avx512;
    case avx512_bf16_isa:
      return bf16;
    case amx_isa:
      return bf16 && has_tiles();
    default:
      return true;
  }
#else
  return true;
#endif
}

void add_instruction_set(nb::module_& parent, Isa isa, const char* name) {
  if (!machine_has(isa)) return;
  nb::module_ module = parent.def_submodule(name);
  bind_activation(module, isa);
  bind_block(module, isa);
  bind_conv(module, isa);
  bind_delta(module, isa);
  bind_experts(module, isa);
  bind_flash(module, isa);
  bind_latent(module, isa);
  bind_linear(module, isa);
  bind_norm(module, isa);
  bind_peak(module, isa);
  bind_quantise(module, isa);
  bind_rope(module, isa);
  bind_scan(module, isa);
  bind_select(module, isa);
  bind_sparse(module, isa);
}

}  // namespace

NB_MODULE(_native, module) {
  bind_block_types(module);
#define FOVEAL_ADD(isa) add_instruction_set(module, isa##_isa, #isa);
  FOVEAL_FOR_EACH_ISA(FOVEAL_ADD)
#undef FOVEAL_ADD
  module.def("pool_name", &pool_name);
#if defined(__x86_64__)
  module.attr("intel") = static_cast<bool>(__builtin_cpu_is("intel"));
#else
  module.attr("intel") = false;
#endif
}

}  // namespace foveal
