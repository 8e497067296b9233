#pragma once

#include <dcompile/contract.h>
#include <dcompile/program.h>

namespace dcompile {

// Samples [B, C, H, W] -> pixels; Program::images says how.
Pixels to_pixels(const Tensor& samples, const std::optional<std::pair<double, double>>& value_range);

}  // namespace dcompile
