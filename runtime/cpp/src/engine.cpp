#include "engine.h"

#include <optional>

#include "messages.h"

namespace dcompile {
namespace {

[[noreturn]] [[maybe_unused]] void left_out(const std::string& target, const char* option) {
    fail(
        ErrorKind::engine, "target ", repr(target), ": this library was built without its engine; build it with -D",
        option, "=ON"
    );
}

// What the source holds at this batch; nothing if only engines know.
std::optional<Port> needed(
    const Source& source, std::int64_t batch, const Manifest& manifest, const Named<Tensor>& tables
) {
    if (source.kind == Source::table) {
        const Tensor* table = find(tables, source.name);
        return Port{name_of(table->dtype), {table->shape.begin() + 1, table->shape.end()}};
    }
    const auto slots = manifest.slots();
    const StateSpec* spec = find(slots, source.name);
    return spec ? std::optional(Port{spec->dtype, spec->at(batch)}) : std::nullopt;
}

bool accepts(const Shape& port, const Shape& shape) {
    if (port.size() != shape.size()) return false;
    for (std::size_t i = 0; i < port.size(); ++i)
        if (port[i] >= 0 && port[i] != shape[i]) return false;
    return true;
}

void check_names(const EngineSpec& spec, const char* role, const Named<Source>& said, const Named<Port>& found) {
    const auto complain = [&](const std::string& port, const char* where) {
        const auto hint = did_you_mean(port, names(found));
        fail(ErrorKind::engine, spec.file, ": ", role, " ", repr(port), " is ", where, "; ", hint, "; compile again");
    };
    for (const auto& port : names(said))
        if (!find(found, port)) complain(port, "in the manifest only");
    for (const auto& port : names(found))
        if (!find(said, port)) complain(port, "in the file only");
}

}  // namespace

std::unique_ptr<Engine> open_engine(
    const std::string& target, const std::filesystem::path& path, const Options& options
) {
    if (target == "onnx") {
#ifdef DCOMPILE_WITH_ONNXRUNTIME
        return open_onnx_engine(path, options);
#else
        left_out(target, "DCOMPILE_WITH_ONNXRUNTIME");
#endif
    }
    if (target == "openvino") {
#ifdef DCOMPILE_WITH_OPENVINO
        return open_openvino_engine(path, options);
#else
        left_out(target, "DCOMPILE_WITH_OPENVINO");
#endif
    }
    if (target == "trt") {
#ifdef DCOMPILE_WITH_TENSORRT
        return open_tensorrt_engine(path, options);
#else
        left_out(target, "DCOMPILE_WITH_TENSORRT");
#endif
    }
    if (target == "aoti")
        fail(
            ErrorKind::engine,
            "target 'aoti' has no engine in this library: load its .pt2 files with PyTorch's C++ loader"
        );
    const auto hint = did_you_mean(target, {"onnx", "openvino", "trt", "aoti"});
    fail(ErrorKind::engine, "this runtime has no engine for target ", repr(target), "; ", hint);
}

void check_ports(const EngineSpec& spec, const Engine& engine, const Manifest& manifest, const Named<Tensor>& tables) {
    const auto check = [&](const char* role, const Named<Source>& said, const Named<Port>& found) {
        check_names(spec, role, said, found);
        for (const auto& [port, has] : found)
            for (auto batch : {manifest.contract.batch.min, manifest.contract.batch.max}) {
                const auto needs = needed(*find(said, port), batch, manifest, tables);
                if (!needs || (needs->dtype == has.dtype && accepts(has.shape, needs->shape))) continue;
                const auto says =
                    text("the manifest says ", needs->dtype, " ", spelled(needs->shape), "; compile again");
                fail(
                    ErrorKind::engine, spec.file, ": ", role, " ", repr(port), " is ", has.dtype, " ",
                    spelled(has.shape), ", ", says
                );
            }
    };
    check("input", spec.inputs, engine.inputs);
    check("output", spec.outputs, engine.outputs);
}

}  // namespace dcompile
