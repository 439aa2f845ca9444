// Weights as they arrive from Python: the numbers of weight_arguments in foveal/kernels/cpu/linear.py.
#pragma once

#include "bindings/bindings.h"
#include "kernels/linear.h"

namespace foveal {

using WeightArguments = std::tuple<Address, Address, Address, int64_t, int64_t, int, int>;

inline Weight weight_at(const WeightArguments& w) {
  return {reading<void>(std::get<0>(w)), reading<void>(std::get<1>(w)), reading<void>(std::get<2>(w)),
          std::get<3>(w), std::get<4>(w), std::get<5>(w), static_cast<Coding>(std::get<6>(w))};
}

}  // namespace foveal
