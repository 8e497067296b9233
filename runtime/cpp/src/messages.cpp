#include "messages.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace dcompile {
namespace {

// Characters in the blocks that a and b have in common: the longest first, then left and right of it (difflib's way).
std::size_t matching(std::string_view a, std::string_view b) {
    std::size_t length = 0, at_a = 0, at_b = 0;
    for (std::size_t i = 0; i < a.size(); ++i)
        for (std::size_t j = 0; j < b.size(); ++j) {
            std::size_t k = 0;
            while (i + k < a.size() && j + k < b.size() && a[i + k] == b[j + k]) ++k;
            if (k > length) length = k, at_a = i, at_b = j;
        }
    if (length == 0) return 0;
    return length + matching(a.substr(0, at_a), b.substr(0, at_b)) +
           matching(a.substr(at_a + length), b.substr(at_b + length));
}

constexpr std::size_t longest_compared = 200;  // what is longer is no name, and would take long

double likeness(std::string_view a, std::string_view b) {
    if (a.size() > longest_compared || b.size() > longest_compared) return 0.0;
    return a.size() + b.size() == 0 ? 1.0 : 2.0 * double(matching(a, b)) / double(a.size() + b.size());
}

template <class Items, class Spell>
std::string joined(const Items& items, Spell spell) {
    std::string out;
    for (const auto& each : items) out += (out.empty() ? "" : ", ") + spell(each);
    return out;
}

}  // namespace

std::string repr(std::string_view name) {
    const char quote = name.find('\'') != name.npos && name.find('"') == name.npos ? '"' : '\'';
    std::string out(1, quote);
    for (char c : name) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == quote || c == '\\') out += '\\';
        if (c == '\n') out += "\\n";
        else if (c == '\r') out += "\\r";
        else if (c == '\t') out += "\\t";
        else if (byte < 0x20 || byte == 0x7f)
            out += text("\\x", "0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]);
        else out += c;
    }
    return out + quote;
}

std::string spelled(const nlohmann::ordered_json& value) {
    if (value.is_null()) return "None";
    if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
    if (value.is_string()) return repr(value.get_ref<const std::string&>());
    if (value.is_array()) return "[" + joined(value, [](const auto& each) { return spelled(each); }) + "]";
    if (!value.is_object()) return value.dump();
    return "{" +
           joined(value.items(), [](const auto& each) { return repr(each.key()) + ": " + spelled(each.value()); }) +
           "}";
}

std::string spelled(const Shape& shape) {
    return "[" + joined(shape, [](auto dim) { return dim < 0 ? "?" : std::to_string(dim); }) + "]";
}

std::string did_you_mean(const std::string& name, const std::vector<std::string>& known) {
    std::pair<double, std::string> closest{0.0, ""};
    for (const auto& each : known) closest = std::max(closest, {likeness(each, name), each});
    if (closest.first >= 0.6) return "did you mean " + repr(closest.second) + "?";
    const std::vector<std::string> shown(
        known.begin(), known.begin() + std::min<std::ptrdiff_t>(known.end() - known.begin(), 40)
    );
    const auto names = joined(shown, [](const auto& each) { return each; });
    return "known: " + (names.empty() ? "none" : names) + (known.size() > 40 ? ", ..." : "");
}

std::string first_line(std::string_view message) {
    const auto begin = message.find_first_not_of(" \t\r\n");
    if (begin == message.npos) return "";
    message.remove_prefix(begin);
    return std::string(message.substr(0, message.find('\n')));
}

}  // namespace dcompile
