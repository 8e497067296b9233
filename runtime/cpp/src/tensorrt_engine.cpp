// TensorRT engines on the first NVIDIA GPU, as runtime/tensorrt_engine.py runs them; TensorRT for RTX has the same API.
// Inputs are copied to the GPU and outputs back; its buffers are kept between calls.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <utility>

#include "decode.h"
#include "engine.h"
#include "messages.h"

namespace dcompile {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr const char* package = "tensorrt_rtx";
#else
constexpr const char* package = "tensorrt";
#endif

// TensorRT keeps the first logger of a process for ever, so this one is never destroyed; it prints nothing and keeps
// the last error of each thread.
class Logger final : public nvinfer1::ILogger {
  public:
    static std::string& last() {
        thread_local std::string message;
        return message;
    }

    static Logger& instance() {
        static Logger logger;
        return logger;
    }

    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kERROR) last() = first_line(message);
    }
};

std::string reason() {
    return Logger::last().empty() ? "it gives no reason" : Logger::last();
}

struct Profile {
    std::int64_t least, most;  // batch
};

// How an engine was built; <engine>.json beside it says so.
struct Facts {
    std::string package;
    std::vector<std::string> compute_capabilities;
    Named<StateSpec> inputs, outputs;
    Named<Profile> profiles;
};

Facts read_facts(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string content(std::istreambuf_iterator<char>(file), {});
    std::string why;
    try {
        const Json value = Json::parse(content);
        const Field field(value, "");
        field.object(
            "EngineFacts", {"package", "version", "compute_capabilities", "precision", "inputs", "outputs", "profiles"}
        );
        const auto read_profile = [](const Field& each) {
            const auto sizes = each.list(
                "tuple[int, int, int]", [](const Field& size) { return size.integer(); }, 3
            );
            return Profile{sizes[0], sizes[2]};
        };
        const auto read_string = [](const Field& each) { return each.string(); };
        return {
            field["package"].string(),
            field["compute_capabilities"].list("tuple[str, ...]", read_string),
            field["inputs"].mapping("Mapping[str, StateSpec]", read_state_spec),
            field["outputs"].mapping("Mapping[str, StateSpec]", read_state_spec),
            field["profiles"].mapping("Mapping[str, tuple[int, int, int]]", read_profile),
        };
    } catch (const nlohmann::json::exception& error) {
        why = text("cannot be read (", first_line(error.what()), ")");
    } catch (const Failure& failure) {
        why = failure.error.message;
    }
    fail(ErrorKind::bundle, path.string(), ": ", why, "; copy the bundle again");
}

// Number of the profile for a batch: of those that take it the narrowest, as its kernels are the most specific.
std::int32_t pick_profile(const Named<Profile>& profiles, std::int64_t batch) {
    std::int32_t best = -1;
    std::string known;
    for (std::size_t i = 0; i < profiles.size(); ++i) {
        const auto& [name, each] = profiles[i];
        const auto width = each.most - each.least;
        const bool fits = each.least <= batch && batch <= each.most;
        if (fits &&
            (best < 0 || width < profiles[std::size_t(best)].second.most - profiles[std::size_t(best)].second.least))
            best = std::int32_t(i);
        known += text(known.empty() ? "" : ", ", name, " (", each.least, " to ", each.most, ")");
    }
    if (best < 0)
        fail(
            ErrorKind::request, "a batch of ", batch, " is outside the profiles of this bundle: ", known,
            "; split the request, or compile again with another --profile"
        );
    return best;
}

// The batch that the given tensors have; 1 where no input has one. Fails for a wrong input.
std::int64_t batch_of(const Named<StateSpec>& specs, const std::vector<Tensor>& given) {
    std::int64_t batch = 0;
    for (std::size_t i = 0; i < specs.size(); ++i)
        for (std::size_t axis = 0; axis < std::min(specs[i].second.shape.size(), given[i].shape.size()); ++axis)
            if (const auto& dim = specs[i].second.shape[axis]; batch == 0 && dim.of_batch && dim.size > 0)
                batch = given[i].shape[axis] / dim.size;
    batch = std::max<std::int64_t>(1, batch);
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const auto& [name, spec] = specs[i];
        if (name_of(given[i].dtype) != spec.dtype || given[i].shape != spec.at(batch))
            fail(
                ErrorKind::request, "input ", repr(name), " is ", name_of(given[i].dtype), " ", spelled(given[i].shape),
                ", needed ", spec.dtype, " ", spelled(spec.at(batch)), " at a batch of ", batch
            );
    }
    return batch;
}

nvinfer1::Dims dims_of(const Shape& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = std::int32_t(shape.size());
    for (std::size_t i = 0; i < shape.size(); ++i) dims.d[i] = static_cast<std::decay_t<decltype(dims.d[0])>>(shape[i]);
    return dims;
}

class TensorRtEngine final : public Engine {
  public:
    TensorRtEngine(std::filesystem::path path) : path_(std::move(path)) {
        auto facts_file = path_;
        facts_ = read_facts(facts_file.replace_extension(".json"));
        check_machine();
        std::ifstream file(path_, std::ios::binary);
        const std::string content(std::istreambuf_iterator<char>(file), {});
        runtime_.reset(nvinfer1::createInferRuntime(Logger::instance()));
        if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
        if (!engine_)
            fail(ErrorKind::engine, path_.string(), ": ", package, " does not load it: ", reason(), "; compile again");
        did(cudaStreamCreate(&stream_), "make a stream");
        inputs = ports(facts_.inputs);
        outputs = ports(facts_.outputs);
    }

    ~TensorRtEngine() override {
        contexts_.clear();
        for (const auto& each : buffers_) cudaFree(each.second.address);
        if (stream_) cudaStreamDestroy(stream_);
    }

    std::vector<Tensor> run(const std::vector<Tensor>& values) override {
        const auto batch = batch_of(facts_.inputs, values);
        auto& context = context_of(facts_.profiles.empty() ? 0 : pick_profile(facts_.profiles, batch));
        for (std::size_t i = 0; i < values.size(); ++i) {
            const auto& name = facts_.inputs[i].first;
            const auto size = values[i].size() * bytes_of(values[i].dtype);
            copy(buffer(name, size), values[i].data.get(), size, cudaMemcpyHostToDevice);
            context.setInputShape(name.c_str(), dims_of(values[i].shape));
            context.setTensorAddress(name.c_str(), buffer(name, size));
        }
        for (const auto& [name, spec] : facts_.outputs)
            context.setTensorAddress(name.c_str(), buffer(name, bytes(spec, batch)));
        if (!context.enqueueV3(stream_)) fail(ErrorKind::engine, path_.string(), ": ", package, " failed: ", reason());
        std::vector<Tensor> results;
        for (const auto& [name, spec] : facts_.outputs) {
            const auto host = std::make_shared<std::vector<std::byte>>(bytes(spec, batch));
            copy(host->data(), buffer(name, host->size()), host->size(), cudaMemcpyDeviceToHost);
            results.push_back({dtype_of(spec.dtype), spec.at(batch), {host, host->data()}});
        }
        did(cudaStreamSynchronize(stream_), "finish the step");
        return results;
    }

  private:
    struct Buffer {
        void* address = nullptr;
        std::size_t size = 0;
    };

    static Named<Port> ports(const Named<StateSpec>& specs) {
        Named<Port> out;
        for (const auto& [name, spec] : specs) {
            Port port{spec.dtype, {}};
            for (const auto& dim : spec.shape) port.shape.push_back(dim.of_batch ? -1 : dim.size);
            out.emplace_back(name, std::move(port));
        }
        return out;
    }

    static std::size_t bytes(const StateSpec& spec, std::int64_t batch) {
        return count(spec.at(batch)) * bytes_of(dtype_of(spec.dtype));
    }

    void check_machine() const {
        int devices = 0, major = 0, minor = 0;
        if (const auto code = cudaGetDeviceCount(&devices); code != cudaSuccess || devices == 0)
            fail(
                ErrorKind::engine, path_.string(), ": ", code == cudaSuccess ? "no GPU" : cudaGetErrorString(code),
                ", and a TensorRT engine runs on an NVIDIA GPU; run it where one is, or compile for --target onnx"
            );
        did(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "tell its compute capability");
        did(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "tell its compute capability");
        const auto own = text(major, ".", minor);
        std::string wanted;
        bool fits = false;
        for (const auto& each : facts_.compute_capabilities) {
            wanted += (wanted.empty() ? "" : ", ") + each;
            fits |= each == own;
        }
        if (!fits)
            fail(
                ErrorKind::engine, path_.string(), ": built for compute capability ", wanted, ", the GPU here is ", own,
                "; compile again with --compute-capability ", own
            );
        if (facts_.package != package)
            fail(
                ErrorKind::engine, path_.string(), ": built by ", facts_.package, ", and this library was built with ",
                package, "; build it with the other, or compile again"
            );
    }

    // The execution context of a profile, made when it is first asked for.
    nvinfer1::IExecutionContext& context_of(std::int32_t profile) {
        auto& context = contexts_[profile];
        if (!context) {
            context.reset(engine_->createExecutionContext());
            if (!context || !context->setOptimizationProfileAsync(profile, stream_)) {
                contexts_.erase(profile);
                fail(
                    ErrorKind::engine, path_.string(), ": no execution context for profile ", profile, ": ", reason(),
                    "; free GPU memory"
                );
            }
            did(cudaStreamSynchronize(stream_), "set the profile");
        }
        return *context;
    }

    // At least `size` bytes on the GPU, kept for the port.
    void* buffer(const std::string& name, std::size_t size) {
        auto& buffer = buffers_[name];
        if (buffer.size < size) {
            did(cudaFree(std::exchange(buffer, {}).address), "free memory");
            did(cudaMalloc(&buffer.address, size), text("allocate ", size, " bytes"));
            buffer.size = size;
        }
        return buffer.address;
    }

    void copy(void* target, const void* source, std::size_t size, cudaMemcpyKind kind) {
        did(cudaMemcpyAsync(target, source, size, kind, stream_), "copy");
        copied_bytes += size;
    }

    void did(cudaError_t code, const std::string& what) const {
        if (code != cudaSuccess)
            fail(ErrorKind::engine, path_.string(), ": the GPU could not ", what, ": ", cudaGetErrorString(code));
    }

    std::filesystem::path path_;
    Facts facts_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::map<std::int32_t, std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;
    std::map<std::string, Buffer> buffers_;
    cudaStream_t stream_ = nullptr;
};

}  // namespace

std::unique_ptr<Engine> open_tensorrt_engine(const std::filesystem::path& path, const Options&) {
    return std::make_unique<TensorRtEngine>(path);
}

}  // namespace dcompile
