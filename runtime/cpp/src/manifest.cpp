#include "manifest.h"

#include <algorithm>
#include <fstream>
#include <iterator>

#include "decode.h"
#include "messages.h"
#include "sha256.h"

namespace dcompile {
namespace {

struct DtypeName {
    Dtype dtype;
    const char* name;
    std::size_t bytes;
};

constexpr DtypeName dtypes[] = {
    {Dtype::float32, "float32", 4}, {Dtype::float16, "float16", 2}, {Dtype::float64, "float64", 8},
    {Dtype::int64, "int64", 8},     {Dtype::int32, "int32", 4},     {Dtype::int8, "int8", 1},
    {Dtype::uint8, "uint8", 1},     {Dtype::boolean, "bool", 1},
};

void need(bool truth, const std::string& otherwise) {
    if (!truth) fail(ErrorKind::bundle, otherwise);
}

void need_known(const std::string& where, const std::string& name, const std::vector<std::string>& known) {
    if (std::find(known.begin(), known.end(), name) == known.end())
        fail(ErrorKind::bundle, where, ": there is no ", repr(name), "; ", did_you_mean(name, known));
}

// --- fields ---

Shape read_shape(const Field& field) {
    return field.list("tuple[int, ...]", [](const Field& each) { return each.integer(); });
}

std::string read_string(const Field& field) {
    return field.string();
}

Condition read_condition(const Field& field) {
    field.object("Condition", {"name", "dtype", "shape"}, {"classes", "labels"});
    Condition condition{field["name"].string(), field["dtype"].string(), read_shape(field["shape"]), {}, {}};
    if (field.has("classes") && !field["classes"].is_null()) condition.classes = field["classes"].integer("int | None");
    if (field.has("labels") && !field["labels"].is_null())
        condition.labels = field["labels"].list("tuple[str, ...] | None", read_string);
    return condition;
}

std::optional<std::pair<double, double>> read_range(const Field& field) {
    if (field.is_null()) return std::nullopt;
    const auto ends = field.list(
        "tuple[float, float] | None", [](const Field& each) { return each.number(); }, 2
    );
    return std::pair(ends[0], ends[1]);
}

Contract read_contract(const Field& field) {
    field.object(
        "Contract",
        {"sample", "value_range", "predicts", "steps", "guidance", "initial_scale", "stochastic", "batch", "conditions"}
    );
    const Field sample = field["sample"].object("SampleSpec", {"shape", "dtype"});
    const Field batch = field["batch"].object("Batch", {"min", "max"});
    return {
        {read_shape(sample["shape"]), sample["dtype"].string()},
        read_range(field["value_range"]),
        field["predicts"].string(),
        field["steps"].integer(),
        field["guidance"].number(),
        field["initial_scale"].number(),
        field["stochastic"].truth(),
        {batch["min"].integer(), batch["max"].integer()},
        field["conditions"].list("tuple[Condition, ...]", read_condition),
    };
}

Dim read_dim(const Field& field) {
    if (field.is_integer()) return {field.integer(), false};
    const auto pair = field.list(
        "int | tuple[Literal['batch'], int]", [](const Field& each) { return each; }, 2
    );
    if (pair[0].string("Literal['batch']") != "batch") pair[0].refuse("Literal['batch']");
    return {pair[1].integer(), true};
}

Source read_input(const Field& field) {
    if (field.has("slot")) return {Source::slot, field.object("Slot", {"slot"})["slot"].string()};
    if (field.has("table")) return {Source::table, field.object("Table", {"table"})["table"].string()};
    field.refuse("Slot | Table");
}

Source read_output(const Field& field) {
    return {Source::slot, field.object("Slot", {"slot"})["slot"].string()};
}

EngineSpec read_engine(const Field& field) {
    field.object("EngineSpec", {"file", "inputs", "outputs"});
    return {
        field["file"].string(),
        field["inputs"].mapping("Mapping[str, Slot | Table]", read_input),
        field["outputs"].mapping("Mapping[str, Slot]", read_output),
    };
}

Row read_row(const Field& field) {
    if (field.has("call")) {
        field.object("Call", {"call", "row"});
        return Call{field["call"].string(), field["row"].integer()};
    }
    if (!field.has("jump")) field.refuse("Call | Jump");
    field.object("Jump", {"jump", "slot", "below"});
    return Jump{field["jump"].integer(), field["slot"].string(), field["below"].number()};
}

FileSpec read_file(const Field& field) {
    field.object("FileSpec", {"bytes", "sha256"});
    return {field["bytes"].integer(), field["sha256"].string()};
}

Manifest decode(const Field& field) {
    field.object(
        "Manifest",
        {"dcompile", "name", "target", "tools", "contract", "states", "engines", "script", "tables", "files"},
        {"schema"}
    );
    field["dcompile"].string();
    field["name"].string();
    field["tools"].mapping("Mapping[str, str]", read_string);
    return {
        field["target"].string(),
        read_contract(field["contract"]),
        field["states"].mapping("Mapping[str, StateSpec]", read_state_spec),
        field["engines"].mapping("Mapping[str, EngineSpec]", read_engine),
        field["script"].list("tuple[Call | Jump, ...]", read_row),
        field["tables"].string(),
        field["files"].mapping("Mapping[str, FileSpec]", read_file),
    };
}

// --- the facts that no single field shows: every name refers to something, every number is in range ---

void check_contract(const Contract& contract) {
    const Batch batch = contract.batch;
    need(
        1 <= batch.min && batch.min <= batch.max,
        text("contract.batch: expected 1 <= min <= max, found ", batch.min, " and ", batch.max)
    );
    need(contract.steps >= 1, text("contract.steps: expected 1 or more, found ", contract.steps));
    for (const auto& each : contract.conditions)
        if (each.labels) {
            const auto classes = each.classes ? std::to_string(*each.classes) : "None";
            const auto found = text(each.labels->size(), " labels for ", classes, " classes");
            need(
                each.classes && std::int64_t(each.labels->size()) == *each.classes,
                text("contract.conditions: ", repr(each.name), " has ", found)
            );
        }
}

void check_slots(const Named<StateSpec>& slots, const Contract& contract) {
    std::vector<std::string> known;
    for (const auto& each : dtypes) known.emplace_back(each.name);
    for (const auto& [name, spec] : slots) {
        need_known(text("dtype of ", repr(name)), spec.dtype, known);
        count(spec.at(contract.batch.max));
    }
    need(
        contract.sample.dtype == "float32",
        text("contract.sample.dtype: this runtime generates float32, found ", repr(contract.sample.dtype))
    );
}

void check_files(const Manifest& manifest) {
    for (const auto& name : names(manifest.files)) {
        const std::filesystem::path path(name);
        const bool climbs = std::find(path.begin(), path.end(), "..") != path.end();
        need(!path.is_absolute() && !climbs, text("files: ", repr(name), " is outside the bundle"));
    }
    need_known("tables", manifest.tables, names(manifest.files));
}

std::vector<std::string> check_engines(const Manifest& manifest) {
    auto written = names(manifest.slots());
    for (const auto& engine : manifest.engines)
        for (const auto& target : engine.second.outputs) written.push_back(target.second.name);
    for (const auto& [name, engine] : manifest.engines) {
        need_known(text("engines.", name, ".file"), engine.file, names(manifest.files));
        for (const auto& [port, source] : engine.inputs)
            if (source.kind == Source::slot)
                need_known(text("engines.", name, ".inputs.", port, ".slot"), source.name, written);
    }
    return written;
}

void check_script(const Manifest& manifest, const std::vector<std::string>& written) {
    const auto& script = manifest.script;
    need(!script.empty(), "script: expected a call or more, found none");
    for (std::size_t index = 0; index < script.size(); ++index) {
        const auto where = text("script[", index, "]");
        if (const auto* call = std::get_if<Call>(&script[index])) {
            need_known(where + ".call", call->call, names(manifest.engines));
            need(call->row >= 0, text(where, ".row: expected 0 or more, found ", call->row));
            continue;
        }
        const auto& jump = std::get<Jump>(script[index]);
        need_known(where + ".slot", jump.slot, written);
        need(
            0 <= jump.jump && jump.jump <= std::int64_t(script.size()),
            text(where, ".jump: ", jump.jump, " is outside the script (0..", script.size(), ")")
        );
    }
}

void check(const Manifest& manifest) {
    check_contract(manifest.contract);
    check_slots(manifest.slots(), manifest.contract);
    check_files(manifest);
    check_script(manifest, check_engines(manifest));
}

void check_schema(const Json& value) {
    const Json found = value.is_object() && value.contains("schema") ? value["schema"] : Json();
    const Field field(found, "schema");
    if (!field.is_integer() || field.integer() < 1)
        fail(
            ErrorKind::bundle, "schema: expected a number from 1, found ", spelled(found),
            "; is this a dcompile bundle?"
        );
    if (field.integer() > schema)
        fail(
            ErrorKind::bundle, "written by a newer dcompile: schema ", field.integer(), ", this runtime reads up to ",
            schema, "; upgrade dcompile"

        );
}

}  // namespace

StateSpec read_state_spec(const Field& field) {
    field.object("StateSpec", {"shape", "dtype"});
    return {field["shape"].list("tuple[int | tuple[Literal['batch'], int], ...]", read_dim), field["dtype"].string()};
}

Shape StateSpec::at(std::int64_t batch) const {
    Shape out;
    for (const auto& dim : shape) {
        std::int64_t size = dim.size;
        if (dim.of_batch && __builtin_mul_overflow(size, batch, &size)) size = -1;
        out.push_back(size);
    }
    return out;
}

Named<StateSpec> Manifest::slots() const {
    const auto batched = [](const Shape& shape) {
        std::vector<Dim> dims{{1, true}};
        for (auto size : shape) dims.push_back({size, false});
        return dims;
    };
    const StateSpec sample{batched(contract.sample.shape), contract.sample.dtype};
    Named<StateSpec> out{{"sample", sample}};
    if (contract.stochastic) out.emplace_back("noise", sample);
    for (const auto& each : contract.conditions)
        out.emplace_back(each.name, StateSpec{batched(each.shape), each.dtype});
    out.insert(out.end(), states.begin(), states.end());
    return out;
}

Manifest read_manifest(const std::filesystem::path& bundle) {
    const auto path = bundle / "manifest.json";
    if (!std::filesystem::is_regular_file(path))
        fail(
            ErrorKind::bundle, path.string(),
            ": not found; a bundle is the directory that `dcompile MODEL -o DIRECTORY` writes"
        );
    std::ifstream file(path, std::ios::binary);
    return parse_manifest({std::istreambuf_iterator<char>(file), {}}, path.string());
}

Manifest parse_manifest(const std::string& content, const std::string& source) {
    try {
        const Json value = Json::parse(content);
        check_schema(value);
        auto manifest = decode(Field(value, ""));
        check(manifest);
        return manifest;
    } catch (const nlohmann::json::exception& error) {
        const auto why = first_line(error.what());
        fail(ErrorKind::bundle, source, ": not JSON (", why, "); the file is damaged: copy the bundle again");
    } catch (const Failure& failure) {
        fail(failure.error.kind, text(source, ": ", failure.error.message));
    }
}

void verify(const std::filesystem::path& bundle, const Manifest& manifest) {
    for (const auto& [name, expected] : manifest.files) {
        const auto path = bundle / name;
        if (!std::filesystem::is_regular_file(path))
            fail(ErrorKind::bundle, path.string(), ": missing; the bundle is incomplete: copy it again");
        const auto size = std::filesystem::file_size(path);
        if (std::int64_t(size) != expected.bytes)
            fail(
                ErrorKind::bundle, path.string(), ": ", size, " bytes, expected ", expected.bytes,
                "; damaged: copy the bundle again"
            );
        if (sha256_of(path) != expected.sha256)
            fail(
                ErrorKind::bundle, path.string(),
                ": its sha256 is not the manifest's; damaged or edited: copy the "
                "bundle again"

            );
    }
}

Dtype dtype_of(const std::string& name) {
    for (const auto& each : dtypes)
        if (each.name == name) return each.dtype;
    fail(ErrorKind::internal, "no dtype is called ", repr(name));
}

std::string name_of(Dtype dtype) {
    return dtypes[std::size_t(dtype)].name;
}

std::size_t bytes_of(Dtype dtype) {
    return dtypes[std::size_t(dtype)].bytes;
}

std::size_t count(const Shape& shape) {
    constexpr std::int64_t most = std::int64_t(1) << 56;  // so that bytes can be counted too
    std::int64_t product = 1;
    for (auto dim : shape)
        if (dim < 0 || __builtin_mul_overflow(product, dim, &product) || product > most)
            fail(ErrorKind::bundle, "shape ", spelled(shape), ": no tensor has so many values; compile again");
    return std::size_t(product);
}

}  // namespace dcompile
