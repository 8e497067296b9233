// OpenVINO on the CPU, through its C++ API: the settings and the two compiled shapes of runtime/openvino_engine.py.
#include <openvino/core/version.hpp>
#include <openvino/runtime/core.hpp>
#include <utility>

#include "engine.h"
#include "messages.h"

namespace dcompile {
namespace {

const std::pair<ov::element::Type, Dtype> dtypes[] = {
    {ov::element::f32, Dtype::float32}, {ov::element::f16, Dtype::float16},     {ov::element::f64, Dtype::float64},
    {ov::element::i64, Dtype::int64},   {ov::element::i32, Dtype::int32},       {ov::element::i8, Dtype::int8},
    {ov::element::u8, Dtype::uint8},    {ov::element::boolean, Dtype::boolean},
};

ov::element::Type type_of(Dtype dtype) {
    for (const auto& each : dtypes)
        if (each.second == dtype) return each.first;
    return ov::element::dynamic;
}

std::string name_of_type(const ov::element::Type& type) {
    for (const auto& each : dtypes)
        if (each.first == type) return name_of(each.second);
    return type.get_type_name();
}

// OpenVINO names source files first and says what is wrong in the last line.
std::string reason(const std::exception& error) {
    std::string message = error.what();
    message.erase(message.find_last_not_of(" \t\r\n") + 1);
    return first_line(message.substr(message.rfind('\n') + 1));
}

std::string version() {
    const std::string build = ov::get_openvino_version().buildNumber;
    return build.substr(0, build.find('-'));
}

class OpenVinoEngine final : public Engine {
  public:
    OpenVinoEngine(std::filesystem::path path, const Options& options) : path_(std::move(path)) {
        attempt(text("OpenVINO ", version(), " does not load it"), [&] {
            model_ = core_.read_model(path_.string(), (path_.parent_path() / "weights.bin").string());
        });
        settings_ = settings(options);
        for (const auto& node : model_->get_parameters()) inputs.emplace_back(node->get_friendly_name(), port(*node));
        for (const auto& node : model_->get_results()) outputs.emplace_back(node->get_friendly_name(), port(*node));
    }

    // Inputs are read where they lie, outputs are written into fresh memory: those of the last run may live on as
    // states.
    std::vector<Tensor> run(const std::vector<Tensor>& values) override {
        auto& request = request_for(values);
        for (std::size_t i = 0; i < values.size(); ++i) {
            const ov::Shape shape(values[i].shape.begin(), values[i].shape.end());
            request.set_input_tensor(
                i, ov::Tensor(type_of(values[i].dtype), shape, const_cast<void*>(values[i].data.get()))
            );
        }
        std::vector<ov::Tensor> written;
        const auto& ports = request.get_compiled_model().outputs();
        for (std::size_t i = 0; i < ports.size(); ++i) {
            const auto shape = ports[i].get_partial_shape();
            written.emplace_back(
                ports[i].get_element_type(), shape.is_static() ? shape.to_shape() : shape.get_min_shape()
            );
            request.set_output_tensor(i, written.back());
        }
        attempt("OpenVINO failed", [&] { request.infer(); });
        std::vector<Tensor> results;
        for (auto& tensor : written) results.push_back(unwrapped(std::move(tensor)));
        return results;
    }

  private:
    template <class Work>
    void attempt(const std::string& refusal, Work work) const {
        try {
            work();
        } catch (const std::exception& error) {
            fail(ErrorKind::engine, path_.string(), ": ", refusal, ": ", reason(error));
        }
    }

    ov::AnyMap settings(const Options& options) const {
        const bool bf16 = model_->has_rt_info("dcompile", "precision") &&
                          model_->get_rt_info<std::string>("dcompile", "precision") == "bf16";
        ov::AnyMap settings{
            {"PERFORMANCE_HINT", "LATENCY"},
            {"NUM_STREAMS", "1"},
            {"INFERENCE_PRECISION_HINT", bf16 ? "bf16" : "f32"},
            {"DYNAMIC_QUANTIZATION_GROUP_SIZE", "0"},
            {"ENABLE_CPU_PINNING", "NO"},
        };
        if (options.threads > 0) settings["INFERENCE_NUM_THREADS"] = std::to_string(options.threads);
        for (const auto& [name, value] : options.engine) settings[name] = value;
        return settings;
    }

    template <class Node>
    Port port(const Node& node) const {
        Port out{name_of_type(node.get_output_element_type(0)), {}};
        for (const auto& dim : node.get_output_partial_shape(0))
            out.shape.push_back(dim.is_static() ? dim.get_length() : -1);
        return out;
    }

    // The request that runs these shapes: those of the first run are compiled as constants, which is quicker; any
    // others share a second model.
    ov::InferRequest& request_for(const std::vector<Tensor>& values) {
        std::vector<Shape> shapes;
        for (const auto& value : values) shapes.push_back(value.shape);
        if (!fixed_) {
            fixed_ = compiled(&shapes).create_infer_request();
            fixed_shapes_ = shapes;
        }
        if (shapes == fixed_shapes_) return fixed_;
        if (!any_) any_ = compiled(nullptr).create_infer_request();
        return any_;
    }

    ov::CompiledModel compiled(const std::vector<Shape>* shapes) {
        ov::CompiledModel result;
        attempt(text("OpenVINO ", version(), " does not compile it"), [&] {
            auto model = model_;
            if (shapes) {
                model = model_->clone();  // its weights are those of the original
                std::map<std::size_t, ov::PartialShape> fixed;
                for (std::size_t i = 0; i < shapes->size(); ++i)
                    fixed[i] = ov::PartialShape(std::vector<ov::Dimension>((*shapes)[i].begin(), (*shapes)[i].end()));
                model->reshape(fixed);
            }
            result = core_.compile_model(model, "CPU", settings_);
        });
        return result;
    }

    Tensor unwrapped(ov::Tensor tensor) const {
        const ov::Shape dims = tensor.get_shape();
        Shape shape(dims.begin(), dims.end());
        for (const auto& [type, dtype] : dtypes)
            if (type == tensor.get_element_type()) {
                const auto owner = std::make_shared<ov::Tensor>(std::move(tensor));
                return {dtype, std::move(shape), {owner, owner->data()}};
            }
        fail(ErrorKind::engine, path_.string(), ": an output has type ", tensor.get_element_type().get_type_name());
    }

    std::filesystem::path path_;
    ov::Core core_;
    std::shared_ptr<ov::Model> model_;
    ov::AnyMap settings_;
    std::vector<Shape> fixed_shapes_;
    ov::InferRequest fixed_, any_;  // for the shapes above, and for any
};

}  // namespace

std::unique_ptr<Engine> open_openvino_engine(const std::filesystem::path& path, const Options& options) {
    return std::make_unique<OpenVinoEngine>(path, options);
}

}  // namespace dcompile
