#pragma once

#include <dcompile/tensor.h>

#include <filesystem>

#include "named.h"

namespace dcompile {

// The tensors of a .safetensors file, in one piece of memory.
Named<Tensor> read_safetensors(const std::filesystem::path& file);

}  // namespace dcompile
