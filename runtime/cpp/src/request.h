// What a caller asks for -> tensors the engines take, or one line that says what to change.
#pragma once

#include <dcompile/program.h>

#include <cstdint>
#include <vector>

#include "named.h"

namespace dcompile {

// Every condition of the contract as a tensor [B, *shape] of its dtype; one B for all.
Named<Tensor> read_conditions(const Contract& contract, const Request& request);

// One seed a sample; their number is B where no condition sets it.
std::vector<std::uint64_t> read_seeds(
    const Contract& contract, const Request& request, const Named<Tensor>& conditions
);

}  // namespace dcompile
