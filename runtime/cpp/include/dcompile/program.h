// Runs a bundle that dcompile has written:
//
//     auto program = dcompile::Program::open("build/glyphs");
//     if (!program) return report(program.error());
//     dcompile::Request request;
//     request.labels = {"A", "B"};
//     request.seed = 7;
//     auto samples = program->generate(request);
//
// The same seed gives the samples that the Python runtime gives. Nothing here throws, exits or keeps global state.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "contract.h"
#include "result.h"
#include "tensor.h"

#define DCOMPILE_EXPORT __attribute__((visibility("default")))

namespace dcompile {

struct Options {
    bool verify = true;                         // compare every file's size and sha256 with the manifest
    int threads = 0;                            // of one operator; 0 lets the engine decide
    std::map<std::string, std::string> engine;  // settings of the engine, by its own names
};

using Label = std::variant<std::int64_t, std::string>;

struct Request {
    std::vector<Label> labels;                 // names or numbers for the one condition that has classes
    std::map<std::string, Tensor> conditions;  // values [B, ...] by condition name, of its dtype
    std::uint64_t seed = 0;                    // sample i starts from seed + i,
    std::vector<std::uint64_t> seeds;          // unless these are given, one for each sample
};

using Samples = Tensor;  // float32 [B, *sample shape]

// Called with (step, steps, sample) after every step, from 1. What it throws ends the request with an error.
using Callback = std::function<void(std::int64_t step, std::int64_t steps, const Tensor& sample)>;

struct Pixels {
    std::int64_t batch, height, width, channels;
    std::vector<std::uint8_t> values;  // [batch, height, width, channels]
};

// Where the last `generate` spent its time. copied_bytes: of tensors that engines could not take or give as they are.
struct Timing {
    double total_s, engines_s;
    std::int64_t calls, steps;
    std::uint64_t copied_bytes;
};

// One request at a time: threads that share a Program take turns, or each opens its own. One that was moved from
// answers every request with an error, and has no timing and no contract to look at.
class DCOMPILE_EXPORT Program {
  public:
    // Opens the bundle directory `path`; schema, files, tables and shapes are checked before anything runs.
    static Result<Program> open(const std::filesystem::path& path, const Options& options = {}) noexcept;

    Program(Program&&) noexcept;
    Program& operator=(Program&&) noexcept;
    ~Program();

    // A sample depends on its own seed and conditions, not on its batch, and on no request before.
    Result<Samples> generate(const Request& request, const Callback& callback = {}) noexcept;

    // Samples [B, C, H, W] -> pixels: floor(255 * x + 0.5), value_range mapped to x in 0..1. Without a value_range
    // (a latent), the first three channels (the first, if there are fewer) are stretched between each sample's own
    // minimum and maximum: for looking at, not for measuring.
    Result<Pixels> images(const Samples& samples) const noexcept;

    // Forgets the last request. States do not outlive a request, so only `last_timing` is left to forget.
    void reset() noexcept;

    const std::optional<Timing>& last_timing() const noexcept;
    const Contract& contract() const noexcept;

  private:
    struct State;
    explicit Program(std::unique_ptr<State> state) noexcept;
    std::unique_ptr<State> state_;  // none: moved from
};

}  // namespace dcompile
