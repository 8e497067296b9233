// Normal noise that is the same on every machine and in every language; runtime/random.py states the rule.
#pragma once

#include <dcompile/tensor.h>

#include <array>
#include <cstdint>

namespace dcompile {

// Philox 4x32-10.
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

// Standard normal noise [seeds, *shape] times `scale`; sample i depends on seeds[i] and `draw` alone.
Tensor normal(const std::vector<std::uint64_t>& seeds, std::uint32_t draw, const Shape& shape, float scale = 1.0F);

}  // namespace dcompile
