// manifest.json: what a bundle is. The structs bear the names of runtime/manifest.py, which says more of each.
#pragma once

#include <dcompile/contract.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <variant>
#include <vector>

#include "named.h"

namespace dcompile {

constexpr std::int64_t schema = 1;

struct Dim {
    std::int64_t size;
    bool of_batch;  // size times the batch
};

// A tensor slot, with its batch axis; a state is zero when a request starts.
struct StateSpec {
    std::vector<Dim> shape;
    std::string dtype;

    Shape at(std::int64_t batch) const;
};

// Where an engine's input comes from and its output goes: a slot, or the row of a table that the call names.
struct Source {
    enum { slot, table } kind;
    std::string name;
};

struct EngineSpec {
    std::string file;
    Named<Source> inputs, outputs;
};

struct Call {
    std::string call;  // an engine
    std::int64_t row;  // of every table it reads
};

// Go to script row `jump` (the script's length: finish) if the one float in `slot` is less than `below`.
struct Jump {
    std::int64_t jump;
    std::string slot;
    double below;
};

using Row = std::variant<Call, Jump>;

struct FileSpec {
    std::int64_t bytes;
    std::string sha256;
};

struct Manifest {
    std::string target;
    Contract contract;
    Named<StateSpec> states;
    Named<EngineSpec> engines;
    std::vector<Row> script;
    std::string tables;
    Named<FileSpec> files;

    // The slots whose shape is known before anything runs: sample, noise, conditions, states.
    Named<StateSpec> slots() const;
};

Manifest read_manifest(const std::filesystem::path& bundle);
Manifest parse_manifest(const std::string& content, const std::string& source);

// Fails with the name of the first file that is missing or is not, byte for byte, what was written.
void verify(const std::filesystem::path& bundle, const Manifest& manifest);

class Field;
StateSpec read_state_spec(const Field& field);

// "float32" -> Dtype::float32; fails for what is no dtype.
Dtype dtype_of(const std::string& name);
std::string name_of(Dtype dtype);
std::size_t bytes_of(Dtype dtype);

// How many values the shape holds; fails for a negative dimension, or where bytes of them could not be counted.
std::size_t count(const Shape& shape);

}  // namespace dcompile
