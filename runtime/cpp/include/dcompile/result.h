#pragma once

#include <string>
#include <utility>
#include <variant>

namespace dcompile {

enum class ErrorKind {
    bundle,    // missing, damaged, inconsistent, or written by a newer dcompile
    request,   // the bundle is sound, but cannot serve what was asked of it
    engine,    // an engine does not load, does not match the manifest, or failed while running
    callback,  // the caller's callback threw
    internal,  // a bug of ours, or no memory left
};

// One line that says what, where, found, needed, what to do next.
struct Error {
    ErrorKind kind;
    std::string message;
};

// A value or an error. As with a pointer, look before reading: `*result` needs `if (result)`, `error()` the opposite.
template <class Value>
class [[nodiscard]] Result {
  public:
    Result(Value value) : content_(std::in_place_index<0>, std::move(value)) {}
    Result(Error error) : content_(std::in_place_index<1>, std::move(error)) {}

    explicit operator bool() const noexcept { return content_.index() == 0; }
    Value& operator*() & noexcept { return *std::get_if<0>(&content_); }
    const Value& operator*() const& noexcept { return *std::get_if<0>(&content_); }
    Value&& operator*() && noexcept { return std::move(*std::get_if<0>(&content_)); }
    Value* operator->() noexcept { return std::get_if<0>(&content_); }
    const Value* operator->() const noexcept { return std::get_if<0>(&content_); }
    const Error& error() const noexcept { return *std::get_if<1>(&content_); }

  private:
    std::variant<Value, Error> content_;
};

}  // namespace dcompile
