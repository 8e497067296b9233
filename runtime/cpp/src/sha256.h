#pragma once

#include <filesystem>
#include <string>

namespace dcompile {

// In hexadecimal, read in one streamed pass: the file's content is never in memory at once.
std::string sha256_of(const std::filesystem::path& file);

}  // namespace dcompile
