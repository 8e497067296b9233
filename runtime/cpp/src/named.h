#pragma once

#include <string>
#include <utility>
#include <vector>

namespace dcompile {

// A few values by name, in the order of the manifest.
template <class Value>
using Named = std::vector<std::pair<std::string, Value>>;

template <class Value>
const Value* find(const Named<Value>& items, const std::string& name) {
    for (const auto& [each, value] : items)
        if (each == name) return &value;
    return nullptr;
}

template <class Items>
std::vector<std::string> names(const Items& items) {
    std::vector<std::string> out;
    for (const auto& item : items) out.push_back(item.first);
    return out;
}

}  // namespace dcompile
