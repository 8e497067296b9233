// Errors inside the library, and the words of their messages: those that the Python runtime uses.
#pragma once

#include <dcompile/result.h>
#include <dcompile/tensor.h>

#include <nlohmann/json_fwd.hpp>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace dcompile {

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// Inside the library errors travel as this exception; program.cpp makes results of them, so none leaves it.
struct Failure {
    Error error;
};

template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
    throw Failure{{kind, text(parts...)}};
}

// 'name', as Python spells it.
std::string repr(std::string_view name);

// A JSON value as Python spells it.
std::string spelled(const nlohmann::ordered_json& value);

// [1, 4, 4]; a negative dimension, any size, is "?".
std::string spelled(const Shape& shape);

// The end of a sentence about an unknown name: the closest known one, else all of them.
std::string did_you_mean(const std::string& name, const std::vector<std::string>& known);

std::string first_line(std::string_view message);

}  // namespace dcompile
