#include "script.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <set>

#include "messages.h"

namespace dcompile {
namespace {

using Clock = std::chrono::steady_clock;

const Tensor& slot(const Slots& slots, const std::string& name) {
    const auto found = slots.find(name);
    if (found == slots.end())
        fail(
            ErrorKind::engine, "script: slot ", repr(name), " is read before any engine has written it; compile again"
        );
    return found->second;
}

// The row of a table, over the table's memory.
Tensor row_of(const Tensor& table, std::int64_t row) {
    Shape shape(table.shape.begin() + 1, table.shape.end());
    const auto* first = static_cast<const std::byte*>(table.data.get());
    const auto row_bytes = count(shape) * bytes_of(table.dtype);
    return {table.dtype, std::move(shape), {table.data, first + std::size_t(row) * row_bytes}};
}

float scalar(const Slots& slots, const std::string& name) {
    const Tensor& value = slot(slots, name);
    if (value.size() == 1 && value.dtype == Dtype::float32) return *value.values<float>();
    if (value.size() == 1 && value.dtype == Dtype::float64) return float(*value.values<double>());
    const auto found = value.size() == 1 ? "dtype " + name_of(value.dtype) : "shape " + spelled(value.shape);
    fail(ErrorKind::engine, "script: a jump needs one float in slot ", repr(name), ", found ", found);
}

using Names = std::set<std::string>;

// Makes of the slots that are needed after a call those that are needed before it; returns those that the call uses and
// that are needed no more.
std::vector<std::string> pass_back(const EngineSpec& engine, Names& needed) {
    const Names after = needed;
    Names used;
    for (const auto& [port, target] : engine.outputs) {
        used.insert(target.name);
        needed.erase(target.name);
    }
    for (const auto& [port, source] : engine.inputs)
        if (source.kind == Source::slot) {
            used.insert(source.name);
            needed.insert(source.name);
        }
    std::vector<std::string> dead;
    std::set_difference(used.begin(), used.end(), after.begin(), after.end(), std::back_inserter(dead));
    return dead;
}

}  // namespace

Stage::Stage(std::unique_ptr<Engine> given, const EngineSpec& spec) : engine(std::move(given)) {
    for (const auto& port : names(engine->inputs)) inputs.push_back(*find(spec.inputs, port));
    for (const auto& port : names(engine->outputs)) outputs.push_back(find(spec.outputs, port)->name);
}

Script::Script(std::vector<Row> given, const Named<EngineSpec>& engines) : rows(std::move(given)), dead(rows.size()) {
    std::vector<Names> needed(rows.size() + 1);  // by that row and those after
    needed.back() = {"sample"};
    for (bool changed = true; changed;) {  // once, and once more for each jump back
        changed = false;
        for (auto index = rows.size(); index-- > 0;) {
            Names before = needed[index + 1];
            if (const auto* jump = std::get_if<Jump>(&rows[index])) {
                const auto& there = needed[std::size_t(jump->jump)];
                before.insert(there.begin(), there.end());
                before.insert(jump->slot);
            } else {
                before.insert("sample");
                dead[index] = pass_back(*find(engines, std::get<Call>(rows[index]).call), before);
            }
            changed |= before != needed[index];
            needed[index] = std::move(before);
        }
    }
}

Spent run_script(
    const Script& script, const Named<Stage>& stages, const Named<Tensor>& tables, Slots& slots,
    const Listeners& listeners
) {
    Spent spent;
    std::size_t position = 0, rows = 0;
    std::int64_t begun = -1;
    while (position < script.rows.size()) {
        if (++rows > rows_bound * script.rows.size())
            fail(
                ErrorKind::engine, "script: ", rows, " rows run of a script of ", script.rows.size(),
                ": its jumps loop; compile again"
            );
        if (const auto* jump = std::get_if<Jump>(&script.rows[position])) {
            position = scalar(slots, jump->slot) < float(jump->below) ? std::size_t(jump->jump) : position + 1;
            continue;
        }
        if (listeners.before_step && begun != spent.steps) listeners.before_step(begun = spent.steps);
        const auto& call = std::get<Call>(script.rows[position]);
        const Stage& stage = *find(stages, call.call);
        std::vector<Tensor> values;
        for (const auto& [kind, name] : stage.inputs)
            values.push_back(kind == Source::table ? row_of(*find(tables, name), call.row) : slot(slots, name));
        const auto started = Clock::now();
        auto outputs = stage.engine->run(values);
        spent.engines_s += std::chrono::duration<double>(Clock::now() - started).count();
        for (std::size_t i = 0; i < outputs.size(); ++i) slots[stage.outputs[i]] = std::move(outputs[i]);
        values.clear();  // or it would keep what is dropped here until the next call returns
        for (const auto& name : script.dead[position]) slots.erase(name);
        ++position, ++spent.calls;
        if (std::count(stage.outputs.begin(), stage.outputs.end(), "sample") > 0) {
            ++spent.steps;
            if (listeners.after_step) listeners.after_step(spent.steps);
        }
    }
    return spent;
}

}  // namespace dcompile
