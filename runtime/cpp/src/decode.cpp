#include "decode.h"

#include <algorithm>
#include <limits>

#include "messages.h"

namespace dcompile {
namespace {

std::string shortened(const Json& value) {
    const std::string out = spelled(value);
    return out.size() <= 60 ? out : out.substr(0, 57) + "...";
}

}  // namespace

void Field::refuse(const char* type) const {
    fail(ErrorKind::bundle, where_, ": expected ", type, ", found ", shortened(value_));
}

bool Field::is_integer() const {
    const bool too_large =
        value_.is_number_unsigned() && value_.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max();
    return value_.is_number_integer() && !too_large;
}

std::int64_t Field::integer(const char* type) const {
    if (!is_integer()) refuse(type);
    return value_.get<std::int64_t>();
}

double Field::number(const char* type) const {
    if (!value_.is_number()) refuse(type);
    return value_.get<double>();
}

bool Field::truth() const {
    if (!value_.is_boolean()) refuse("bool");
    return value_.get<bool>();
}

std::string Field::string(const char* type) const {
    if (!value_.is_string()) refuse(type);
    return value_.get<std::string>();
}

const Field& Field::object(
    const char* type, std::initializer_list<const char*> needed, std::initializer_list<const char*> optional
) const {
    if (!value_.is_object()) refuse(type);
    std::vector<std::string> known(needed.begin(), needed.end());
    known.insert(known.end(), optional.begin(), optional.end());
    for (const auto& [name, _] : value_.items())
        if (std::find(known.begin(), known.end(), name) == known.end())
            fail(ErrorKind::bundle, at(name), ": unknown field; ", did_you_mean(name, known));
    for (const auto& name : needed)
        if (!value_.contains(name)) fail(ErrorKind::bundle, at(name), ": missing");
    return *this;
}

Field Field::operator[](const char* name) const {
    return {value_.at(name), at(name)};
}

}  // namespace dcompile
