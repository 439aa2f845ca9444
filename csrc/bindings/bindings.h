// One function of each file beside this one, called for every instruction set that the machine has.
//
// Tensors arrive as addresses (integers): a tensor object would cost microseconds a call. What they point to has been checked
// in foveal/kernels/cpu, which is the only caller.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"

namespace foveal {

namespace nb = nanobind;

using Address = uintptr_t;
using GilReleased = nb::call_guard<nb::gil_scoped_release>;

template <class T>
const T* reading(Address address) {
  return reinterpret_cast<const T*>(address);
}
template <class T>
T* writing(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_activation(nb::module_& module, Isa isa);
void bind_block(nb::module_& module, Isa isa);
void bind_block_types(nb::module_& module);  // once, for all instruction sets
void bind_conv(nb::module_& module, Isa isa);
void bind_delta(nb::module_& module, Isa isa);
void bind_experts(nb::module_& module, Isa isa);
void bind_flash(nb::module_& module, Isa isa);
void bind_latent(nb::module_& module, Isa isa);
void bind_linear(nb::module_& module, Isa isa);
void bind_norm(nb::module_& module, Isa isa);
void bind_peak(nb::module_& module, Isa isa);
void bind_quantise(nb::module_& module, Isa isa);
void bind_rope(nb::module_& module, Isa isa);
void bind_scan(nb::module_& module, Isa isa);
void bind_select(nb::module_& module, Isa isa);
void bind_sparse(nb::module_& module, Isa isa);

}  // namespace foveal
