// JSON values -> C++ values, with errors that say where.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "named.h"

namespace dcompile {

using Json = nlohmann::ordered_json;

// A JSON value and the path that leads to it. Each reader takes the type as errors spell it.
class Field {
  public:
    Field(const Json& value, std::string where) : value_(value), where_(std::move(where)) {}

    bool is_null() const { return value_.is_null(); }
    bool is_integer() const;
    bool has(const char* name) const { return value_.is_object() && value_.contains(name); }

    std::int64_t integer(const char* type = "int") const;
    double number(const char* type = "float") const;
    bool truth() const;
    std::string string(const char* type = "str") const;

    // An object with these fields and no others; the optional ones may be missing.
    const Field& object(
        const char* type, std::initializer_list<const char*> needed, std::initializer_list<const char*> optional = {}
    ) const;
    Field operator[](const char* name) const;  // of an object that has it

    // What `read` makes of each item of a list; `size`: it must have so many.
    template <class Read>
    auto list(const char* type, Read read, std::optional<std::size_t> size = {}) const {
        if (!value_.is_array() || (size && value_.size() != *size)) refuse(type);
        std::vector<decltype(read(*this))> items;
        for (std::size_t i = 0; i < value_.size(); ++i)
            items.push_back(read(Field(value_[i], where_ + "[" + std::to_string(i) + "]")));
        return items;
    }

    // What `read` makes of each value of an object, by name, in the file's order.
    template <class Read>
    auto mapping(const char* type, Read read) const {
        if (!value_.is_object()) refuse(type);
        Named<decltype(read(*this))> items;
        for (const auto& [name, each] : value_.items()) items.emplace_back(name, read(Field(each, at(name))));
        return items;
    }

    [[noreturn]] void refuse(const char* type) const;

  private:
    std::string at(const std::string& name) const { return where_.empty() ? name : where_ + "." + name; }

    const Json& value_;
    std::string where_;
};

}  // namespace dcompile
