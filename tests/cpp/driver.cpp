// Runs requests for the tests in one process: a line of JSON on stdin, its answer on stdout.
//
//     {"open": "path", "verify": true, "options": {}}     the bundle of the requests that follow
//     {"labels": ["A", 3], "seed": 7}                     or "seeds": [1, 2], "conditions": {name: {dtype, shape,
//     values}}
//
// An answer is {"error", "kind"}, {"steps"} of a bundle, or {"shape", "values", ...}. "throw_at": the callback throws
// at that step.
#include <dcompile/program.h>

#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

using nlohmann::json;

namespace {

json answer(const dcompile::Error& error) {
    const char* kinds[] = {"bundle", "request", "engine", "callback", "internal"};
    return {{"error", error.message}, {"kind", kinds[int(error.kind)]}};
}

dcompile::Tensor tensor_of(const json& value) {
    const auto shape = value.at("shape").get<dcompile::Shape>();
    const auto dtype = value.at("dtype").get<std::string>();
    const auto& values = value.at("values");
    if (dtype == "int64") return dcompile::Tensor::of(shape, values.get<std::vector<std::int64_t>>());
    if (dtype == "float64") return dcompile::Tensor::of(shape, values.get<std::vector<double>>());
    return dcompile::Tensor::of(shape, values.get<std::vector<float>>());
}

dcompile::Request request_of(const json& line) {
    dcompile::Request request;
    const auto labels = line.value("labels", json::array());
    const auto conditions = line.value("conditions", json::object());
    for (const auto& label : labels) {
        if (label.is_string()) request.labels.emplace_back(label.get<std::string>());
        else request.labels.emplace_back(label.get<std::int64_t>());
    }
    for (const auto& [name, value] : conditions.items()) request.conditions[name] = tensor_of(value);
    request.seed = line.value("seed", std::uint64_t(0));
    request.seeds = line.value("seeds", std::vector<std::uint64_t>());
    return request;
}

json run(dcompile::Program& program, const json& line) {
    json steps = json::array();
    std::vector<float> last;
    const auto watch = [&](std::int64_t step, std::int64_t of, const dcompile::Tensor& sample) {
        steps.push_back({step, of});
        last.assign(sample.values<float>(), sample.values<float>() + sample.size());
        if (line.value("throw_at", 0) == step) throw std::runtime_error("enough\nof this");
    };
    program.reset();
    if (program.last_timing()) return {{"error", "reset keeps the timing"}};
    auto samples = program.generate(request_of(line), watch);
    if (!samples) return answer(samples.error());
    auto pixels = program.images(*samples);
    const std::vector<float> values(samples->values<float>(), samples->values<float>() + samples->size());
    const auto& timing = *program.last_timing();
    return {
        {"shape", samples->shape},
        {"values", values},
        {"pixels", pixels ? json(pixels->values) : answer(pixels.error())},
        {"steps", steps},
        {"callback_saw_the_samples", last == values},
        {"calls", timing.calls},
        {"steps_run", timing.steps},
        {"copied_bytes", timing.copied_bytes},
        {"engines_s", timing.engines_s},
        {"total_s", timing.total_s},
    };
}

}  // namespace

int main() {
    std::optional<dcompile::Program> program;
    for (std::string line; std::getline(std::cin, line);) {
        const json asked = json::parse(line);
        if (!asked.contains("open")) {
            std::cout << (program ? run(*program, asked) : json{{"error", "no bundle is open"}}) << std::endl;
            continue;
        }
        program.reset();
        dcompile::Options options;
        options.threads = 1;
        options.verify = asked.value("verify", true);
        options.engine = asked.value("options", std::map<std::string, std::string>());
        auto opened = dcompile::Program::open(asked["open"].get<std::string>(), options);
        std::cout << (opened ? json{{"steps", opened->contract().steps}} : answer(opened.error())) << std::endl;
        if (!opened) continue;
        program.emplace(std::move(*opened));  // a program can be moved, and used where it is now
        if (auto empty = opened->generate({}); empty || empty.error().kind != dcompile::ErrorKind::request) return 1;
    }
}
