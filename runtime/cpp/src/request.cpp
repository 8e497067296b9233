#include "request.h"

#include <algorithm>

#include "manifest.h"
#include "messages.h"

namespace dcompile {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    fail(ErrorKind::request, parts...);
}

std::vector<std::string> names_of(const Contract& contract) {
    std::vector<std::string> out;
    for (const auto& each : contract.conditions) out.push_back(each.name);
    return out;
}

std::int64_t class_number(const Condition& condition, const Label& label) {
    if (const auto* number = std::get_if<std::int64_t>(&label)) return *number;
    const auto& name = std::get<std::string>(label);
    if (!condition.labels)
        refuse(
            "label ", repr(name), ": ", repr(condition.name),
            " has no label names in this bundle; give a number below ", *condition.classes
        );
    const auto& known = *condition.labels;
    const auto found = std::find(known.begin(), known.end(), name);
    if (found == known.end())
        refuse("no label of ", repr(condition.name), " is called ", repr(name), "; ", did_you_mean(name, known));
    return found - known.begin();
}

// The labels, as values of the one condition that takes them.
void add_labels(const Contract& contract, const Request& request, Named<Tensor>& given) {
    if (request.labels.empty()) return;
    std::vector<const Condition*> labelled;
    for (const auto& each : contract.conditions)
        if (each.classes && !request.conditions.count(each.name)) labelled.push_back(&each);
    if (labelled.size() != 1)
        refuse(
            "labels: ", labelled.size(), " conditions that are not given otherwise take labels, needed 1; use ",
            "conditions={name: values}, ", did_you_mean("", names_of(contract))
        );
    std::vector<std::int64_t> numbers;
    for (const auto& label : request.labels) numbers.push_back(class_number(*labelled[0], label));
    const Shape shape{std::int64_t(numbers.size())};
    if (labelled[0]->dtype == "int32") {
        given.emplace_back(
            labelled[0]->name, Tensor::of(shape, std::vector<std::int32_t>(numbers.begin(), numbers.end()))
        );
        return;
    }
    given.emplace_back(labelled[0]->name, Tensor::of(shape, std::move(numbers)));
}

template <class Integer>
void check_classes(const Condition& condition, const Tensor& value) {
    for (std::size_t i = 0; i < value.size(); ++i)
        if (const auto label = std::int64_t(value.values<Integer>()[i]); label < 0 || label >= *condition.classes)
            refuse(
                "label ", label, " of ", repr(condition.name), ": this bundle knows ", *condition.classes, ", 0..",
                *condition.classes - 1
            );
}

// [B, *condition.shape], of its dtype, its values in range.
void check_value(const Condition& condition, const Tensor& value) {
    const auto where = text("condition ", repr(condition.name), ": ");
    if (name_of(value.dtype) != condition.dtype)
        refuse(where, "dtype ", name_of(value.dtype), ", needed ", condition.dtype);
    if (value.shape.empty() || Shape(value.shape.begin() + 1, value.shape.end()) != condition.shape) {
        std::string needed = "batch";
        for (auto dim : condition.shape) needed += text(", ", dim);
        refuse(where, "shape ", spelled(value.shape), ", needed [", needed, "]");
    }
    if (!value.data && value.size() > 0) refuse(where, "has no values");
    if (condition.classes && value.dtype == Dtype::int64) check_classes<std::int64_t>(condition, value);
    if (condition.classes && value.dtype == Dtype::int32) check_classes<std::int32_t>(condition, value);
}

void check_one_batch(const Named<Tensor>& given) {
    std::string sizes;
    bool one = true;
    for (const auto& [name, value] : given) {
        sizes += text(sizes.empty() ? "" : ", ", name, " has ", value.shape[0]);
        one &= value.shape[0] == given[0].second.shape[0];
    }
    if (!one) refuse("conditions of one request must have one batch: " + sizes);
}

}  // namespace

Named<Tensor> read_conditions(const Contract& contract, const Request& request) {
    Named<Tensor> given(request.conditions.begin(), request.conditions.end());
    add_labels(contract, request, given);
    for (const auto& name : names(given))
        if (const auto known = names_of(contract); std::find(known.begin(), known.end(), name) == known.end())
            refuse("no condition is called ", repr(name), "; ", did_you_mean(name, known));
    for (const auto& condition : contract.conditions) {
        const Tensor* value = find(given, condition.name);
        if (!value)
            refuse(
                "condition ", repr(condition.name), " is missing: give conditions={", repr(condition.name), ": ...}",
                condition.classes ? " or labels=[...]" : ""
            );
        check_value(condition, *value);
    }
    check_one_batch(given);
    return given;
}

std::vector<std::uint64_t> read_seeds(
    const Contract& contract, const Request& request, const Named<Tensor>& conditions
) {
    auto seeds = request.seeds;
    const std::int64_t asked = seeds.empty() ? 1 : std::int64_t(seeds.size());
    const std::int64_t batch = conditions.empty() ? asked : conditions[0].second.shape[0];
    const auto [least, most] = contract.batch;
    if (batch < least || batch > most)
        refuse(
            "batch ", batch, ": this bundle takes ", least, "..", most, "; ",
            batch > most ? "split the request, or compile for a larger batch" : "ask for more samples at once"
        );
    if (!seeds.empty() && asked != batch)
        refuse(asked, " seeds for a batch of ", batch, ": give one seed for each sample, or a single int");
    for (auto seed = request.seed; std::int64_t(seeds.size()) < batch; ++seed) {
        if (!seeds.empty() && seed == 0) refuse("seed 18446744073709551616 is outside 0..2**64 - 1");
        seeds.push_back(seed);
    }
    return seeds;
}

}  // namespace dcompile
