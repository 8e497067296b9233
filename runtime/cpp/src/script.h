// The script: calls of engines, and jumps on one float. The whole instruction set of a bundle.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "manifest.h"

namespace dcompile {

constexpr std::size_t rows_bound = 10;  // times the script's length: more than that is an endless loop

using Slots = std::unordered_map<std::string, Tensor>;

// An engine, and where each of its inputs comes from and each of its outputs goes, in the engine's order.
struct Stage {
    std::unique_ptr<Engine> engine;
    std::vector<Source> inputs;
    std::vector<std::string> outputs;

    Stage(std::unique_ptr<Engine> engine, const EngineSpec& spec);
};

// The rows, and per row the slots that it reads or writes and that no row after it reads, whichever way its jumps go:
// they are dropped then, so that memory holds what is needed and no more.
struct Script {
    std::vector<Row> rows;
    std::vector<std::vector<std::string>> dead;

    Script(std::vector<Row> rows, const Named<EngineSpec>& engines);
};

struct Spent {
    std::int64_t calls = 0, steps = 0;
    double engines_s = 0.0;
};

// Told the number of steps so far; before the first call of each step, and after the call that ends it by writing slot
// "sample". Either may be empty; the first may refill slots.
struct Listeners {
    std::function<void(std::int64_t)> before_step, after_step;
};

// Runs the rows on `slots`, in place. What an engine returned is what the next one gets: no tensor is copied here.
Spent run_script(
    const Script& script, const Named<Stage>& stages, const Named<Tensor>& tables, Slots& slots,
    const Listeners& listeners = {}
);

}  // namespace dcompile
