// Engines: one file of a bundle each, all called the same way.
#pragma once

#include <dcompile/program.h>
#include <dcompile/tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "manifest.h"
#include "named.h"

namespace dcompile {

struct Port {
    std::string dtype;
    Shape shape;  // -1: any size
};

class Engine {
  public:
    Named<Port> inputs, outputs;
    std::uint64_t copied_bytes = 0;  // of tensors that could not be taken or given as they are, since it was opened

    Engine() = default;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;
    virtual ~Engine() = default;

    // Tensors in the order of `inputs` -> tensors in the order of `outputs`, which stay valid when it runs again.
    virtual std::vector<Tensor> run(const std::vector<Tensor>& values) = 0;
};

// The engine in a file of this target. Fails for an unknown target, one that was left out, or a damaged file.
std::unique_ptr<Engine> open_engine(
    const std::string& target, const std::filesystem::path& path, const Options& options
);

std::unique_ptr<Engine> open_onnx_engine(const std::filesystem::path& path, const Options& options);
std::unique_ptr<Engine> open_openvino_engine(const std::filesystem::path& path, const Options& options);
std::unique_ptr<Engine> open_tensorrt_engine(const std::filesystem::path& path, const Options& options);

// Fails unless the engine's inputs and outputs are those the manifest describes.
void check_ports(const EngineSpec& spec, const Engine& engine, const Manifest& manifest, const Named<Tensor>& tables);

}  // namespace dcompile
