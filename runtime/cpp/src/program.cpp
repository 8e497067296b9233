#include <dcompile/program.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <numeric>

#include "engine.h"
#include "images.h"
#include "manifest.h"
#include "messages.h"
#include "random.h"
#include "request.h"
#include "safetensors.h"
#include "script.h"

namespace dcompile {
namespace {

using Clock = std::chrono::steady_clock;

// What `work` returns, or what it threw as an error: no exception passes.
template <class Value, class Work>
Result<Value> caught(Work work) noexcept {
    try {
        return work();
    } catch (Failure& failure) {
        return std::move(failure.error);
    } catch (const std::bad_alloc&) {
        return Error{ErrorKind::internal, "out of memory"};  // short enough to need none
    } catch (const std::exception& error) {
        return Error{ErrorKind::internal, first_line(error.what())};
    } catch (...) {
        return Error{ErrorKind::internal, "unknown error"};
    }
}

// The tables, once every row that a call asks for is known to be there.
Named<Tensor> read_tables(const std::filesystem::path& bundle, const Manifest& manifest) {
    const auto path = bundle / manifest.tables;
    auto tables = read_safetensors(path);
    const auto check = [&](const std::string& engine, const std::string& name) {
        const Tensor* table = find(tables, name);
        if (!table || table->shape.empty())
            fail(
                ErrorKind::bundle, path.string(), ": engine ", repr(engine), " reads rows of ", repr(name), "; ",
                did_you_mean(name, names(tables))

            );
        for (std::size_t index = 0; index < manifest.script.size(); ++index) {
            const auto* call = std::get_if<Call>(&manifest.script[index]);
            if (call && call->call == engine && call->row >= table->shape[0])
                fail(
                    ErrorKind::bundle, path.string(), ": table ", repr(name), " has ", table->shape[0],
                    " rows, script[", index, "] asks for row ", call->row, "; compile again"

                );
        }
    };
    for (const auto& [engine, spec] : manifest.engines)
        for (const auto& [port, source] : spec.inputs)
            if (source.kind == Source::table) check(engine, source.name);
    return tables;
}

// From calloc: large blocks come as zeros from the system, which nobody has to write.
Tensor zeros(Shape shape, Dtype dtype) {
    std::shared_ptr<void> memory(std::calloc(std::max<std::size_t>(count(shape), 1), bytes_of(dtype)), std::free);
    if (!memory) throw std::bad_alloc();
    const void* data = memory.get();
    return {dtype, std::move(shape), {std::move(memory), data}};
}

// The same values in memory of our own, so that they may outlive the engines.
Samples kept(const Tensor& sample) {
    std::vector<float> values(sample.values<float>(), sample.values<float>() + sample.size());
    return Tensor::of(sample.shape, std::move(values));
}

}  // namespace

struct Program::State {
    Manifest manifest;
    Script script;
    Named<Tensor> tables;
    Named<Stage> stages;
    std::optional<Timing> last_timing;

    State(const std::filesystem::path& bundle, const Options& options)
        : manifest(read_manifest(bundle)), script(manifest.script, manifest.engines) {
        if (options.verify) verify(bundle, manifest);
        tables = read_tables(bundle, manifest);
        for (const auto& [name, spec] : manifest.engines) {
            auto engine = open_engine(manifest.target, bundle / spec.file, options);
            check_ports(spec, *engine, manifest, tables);
            stages.emplace_back(name, Stage(std::move(engine), spec));
        }
    }

    Samples generate(const Request& request, const Callback& callback) {
        const auto started = Clock::now();
        const auto copied_before = copied_bytes();
        const Contract& contract = manifest.contract;
        const auto given = read_conditions(contract, request);
        const auto seeds = read_seeds(contract, request, given);
        Slots slots{{"sample", normal(seeds, 0, contract.sample.shape, float(contract.initial_scale))}};
        for (const auto& [name, spec] : manifest.states)
            slots[name] = zeros(spec.at(std::int64_t(seeds.size())), dtype_of(spec.dtype));
        for (const auto& [name, value] : given) slots[name] = value;
        Listeners listeners;
        if (contract.stochastic)
            listeners.before_step = [&](std::int64_t step) {
                slots["noise"] = normal(seeds, std::uint32_t(step + 1), contract.sample.shape);
            };
        if (callback) listeners.after_step = [&](std::int64_t step) { tell(callback, step, slots["sample"]); };
        const auto spent = run_script(script, stages, tables, slots, listeners);
        auto samples = kept(slots["sample"]);
        const auto total_s = std::chrono::duration<double>(Clock::now() - started).count();
        last_timing = Timing{total_s, spent.engines_s, spent.calls, spent.steps, copied_bytes() - copied_before};
        return samples;
    }

    void tell(const Callback& callback, std::int64_t step, const Tensor& sample) const {
        try {
            callback(step, manifest.contract.steps, sample);
        } catch (const std::exception& error) {
            fail(ErrorKind::callback, "the callback threw at step ", step, ": ", first_line(error.what()));
        } catch (...) {
            fail(ErrorKind::callback, "the callback threw at step ", step);
        }
    }

    std::uint64_t copied_bytes() const {
        return std::accumulate(stages.begin(), stages.end(), std::uint64_t(0), [](auto sum, const auto& stage) {
            return sum + stage.second.engine->copied_bytes;
        });
    }
};

Result<Program> Program::open(const std::filesystem::path& path, const Options& options) noexcept {
    return caught<Program>([&] { return Program(std::make_unique<State>(path, options)); });
}

Program::Program(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}
Program::Program(Program&&) noexcept = default;
Program& Program::operator=(Program&&) noexcept = default;
Program::~Program() = default;

Result<Samples> Program::generate(const Request& request, const Callback& callback) noexcept {
    return caught<Samples>([&] {
        if (!state_) fail(ErrorKind::request, "the program was moved from; open the bundle again");
        return state_->generate(request, callback);
    });
}

Result<Pixels> Program::images(const Samples& samples) const noexcept {
    return caught<Pixels>([&] {
        if (!state_) fail(ErrorKind::request, "the program was moved from; open the bundle again");
        return to_pixels(samples, state_->manifest.contract.value_range);
    });
}

void Program::reset() noexcept {
    if (state_) state_->last_timing.reset();
}

const std::optional<Timing>& Program::last_timing() const noexcept {
    return state_->last_timing;
}

const Contract& Program::contract() const noexcept {
    return state_->manifest.contract;
}

}  // namespace dcompile
