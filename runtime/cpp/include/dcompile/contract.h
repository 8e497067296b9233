#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace dcompile {

struct SampleSpec {
    Shape shape;  // without the batch
    std::string dtype;
};

struct Batch {
    std::int64_t min, max;
};

// An input beside the sample. `classes`: its values are 0..classes-1, called `labels` if those are given.
struct Condition {
    std::string name, dtype;
    Shape shape;  // without the batch
    std::optional<std::int64_t> classes;
    std::optional<std::vector<std::string>> labels;
};

// What a caller gives and gets. A sample starts as `initial_scale` times normal noise.
struct Contract {
    SampleSpec sample;
    std::optional<std::pair<double, double>> value_range;  // of a finished sample; none: a latent
    std::string predicts;
    std::int64_t steps;
    double guidance;
    double initial_scale;
    bool stochastic;  // slot "noise" holds fresh normal noise at every step
    Batch batch;
    std::vector<Condition> conditions;
};

}  // namespace dcompile
