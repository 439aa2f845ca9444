// Which instruction sets one binary holds, and how a function is declared and found for each of them.
//
// Every file of kernels/ is compiled once for each instruction set, with that set's flags and with FOVEAL_ISA set to its
// name; all that it defines lives in namespace foveal::<isa>. Nothing inline of the standard library may be called there:
// the linker keeps one copy of such a function for all, perhaps one with instructions that the machine does not have.
#pragma once

#if defined(__x86_64__)
#define FOVEAL_FOR_EACH_ISA(DO) DO(portable) DO(avx2) DO(avx512) DO(avx512_bf16) DO(amx)
#define FOVEAL_PICK(isa, f) (std::array{&portable::f, &avx2::f, &avx512::f, &avx512_bf16::f, &amx::f}[isa])
#else
#define FOVEAL_FOR_EACH_ISA(DO) DO(portable)
#define FOVEAL_PICK(isa, f) (std::array{&portable::f}[isa])
#endif

namespace foveal {

#define FOVEAL_ENUMERATOR(isa) isa##_isa,
enum Isa : int { FOVEAL_FOR_EACH_ISA(FOVEAL_ENUMERATOR) isa_count };
#undef FOVEAL_ENUMERATOR

}  // namespace foveal
