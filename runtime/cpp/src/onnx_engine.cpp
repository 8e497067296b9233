// ONNX Runtime on the CPU, through its C API, whose binary interface is stable: headers and library may be of different
// versions, each from 1.17 on.
#include <onnxruntime_c_api.h>

#include <array>
#include <utility>

#include "engine.h"
#include "messages.h"

namespace dcompile {
namespace {

constexpr std::uint32_t api_version = 17;

constexpr std::pair<ONNXTensorElementDataType, Dtype> dtypes[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, Dtype::float32},  {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, Dtype::float16},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, Dtype::float64}, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, Dtype::int64},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, Dtype::int32},    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, Dtype::int8},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, Dtype::uint8},    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, Dtype::boolean},
};

class OnnxEngine final : public Engine {
  public:
    OnnxEngine(std::filesystem::path path, const Options& options) : path_(std::move(path)) {
        const auto version = OrtGetApiBase()->GetVersionString();
        if (!api_) fail(ErrorKind::engine, path_.string(), ": ONNX Runtime ", version, " is too old; needed 1.17");
        refusal_ = text("ONNX Runtime ", version, " does not load it");
        env_ = made<OrtEnv>(api_->ReleaseEnv, [&](auto env) {
            return api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "dcompile", env);
        });
        session_ = open(options);
        refusal_ = "ONNX Runtime failed";
        inputs = read_ports(api_->SessionGetInputCount, api_->SessionGetInputName, api_->SessionGetInputTypeInfo);
        outputs = read_ports(api_->SessionGetOutputCount, api_->SessionGetOutputName, api_->SessionGetOutputTypeInfo);
        for (const auto& port : inputs) input_names_.push_back(port.first.c_str());
        for (const auto& port : outputs) output_names_.push_back(port.first.c_str());
        host_ = made<OrtMemoryInfo>(api_->ReleaseMemoryInfo, [&](auto info) {
            return api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, info);
        });
    }

    std::vector<Tensor> run(const std::vector<Tensor>& values) override {
        std::vector<Owned<OrtValue>> given;
        std::vector<const OrtValue*> in;
        for (const auto& value : values) {
            given.push_back(wrapped(value));
            in.push_back(given.back().get());
        }
        std::vector<OrtValue*> out(outputs.size(), nullptr);
        check(api_->Run(
            session_.get(), nullptr, input_names_.data(), in.data(), in.size(), output_names_.data(), out.size(),
            out.data()
        ));
        std::vector<std::shared_ptr<OrtValue>> owned;
        for (auto* each : out) owned.emplace_back(each, api_->ReleaseValue);
        std::vector<Tensor> results;
        for (auto& each : owned) results.push_back(unwrapped(std::move(each)));
        return results;
    }

  private:
    template <class T>
    using Owned = std::unique_ptr<T, void (*)(T*)>;

    void check(OrtStatus* status) const {
        if (!status) return;
        const Owned<OrtStatus> owned(status, api_->ReleaseStatus);
        fail(ErrorKind::engine, path_.string(), ": ", refusal_, ": ", first_line(api_->GetErrorMessage(status)));
    }

    template <class T, class Make>
    Owned<T> made(void (*release)(T*), Make make) const {
        T* value = nullptr;
        check(make(&value));
        return {value, release};
    }

    Owned<OrtSession> open(const Options& options) const {
        const auto settings = made<OrtSessionOptions>(api_->ReleaseSessionOptions, [&](auto out) {
            return api_->CreateSessionOptions(out);
        });
        check(api_->SetIntraOpNumThreads(settings.get(), options.threads));
        check(api_->SetSessionLogSeverityLevel(settings.get(), ORT_LOGGING_LEVEL_FATAL));  // errors are returned
        // Each engine has its own threads: without this the last engine's spin on while the next one works.
        auto entries = options.engine;
        entries.emplace("session.force_spinning_stop", "1");
        for (const auto& [name, value] : entries)
            check(api_->AddSessionConfigEntry(settings.get(), name.c_str(), value.c_str()));
        return made<OrtSession>(api_->ReleaseSession, [&](auto out) {
            return api_->CreateSession(env_.get(), path_.c_str(), settings.get(), out);
        });
    }

    template <class Count, class Name, class Type>
    Named<Port> read_ports(Count count, Name name, Type type) const {
        OrtAllocator* allocator = nullptr;
        check(api_->GetAllocatorWithDefaultOptions(&allocator));
        std::size_t size = 0;
        check(count(session_.get(), &size));
        Named<Port> ports;
        for (std::size_t i = 0; i < size; ++i) {
            char* spelled = nullptr;
            check(name(session_.get(), i, allocator, &spelled));
            const std::string copied = spelled;
            check(api_->AllocatorFree(allocator, spelled));
            const auto info =
                made<OrtTypeInfo>(api_->ReleaseTypeInfo, [&](auto out) { return type(session_.get(), i, out); });
            ports.emplace_back(copied, read_port(info.get()));
        }
        return ports;
    }

    Port read_port(const OrtTypeInfo* info) const {
        const OrtTensorTypeAndShapeInfo* tensor = nullptr;
        check(api_->CastTypeInfoToTensorInfo(info, &tensor));
        if (!tensor) return {"no tensor", {}};
        auto [type, shape] = read_shape(tensor);
        const Dtype* dtype = known(type);
        return {dtype ? name_of(*dtype) : text("ONNX type ", int(type)), std::move(shape)};
    }

    std::pair<ONNXTensorElementDataType, Shape> read_shape(const OrtTensorTypeAndShapeInfo* info) const {
        auto type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        std::size_t dims = 0;
        check(api_->GetTensorElementType(info, &type));
        check(api_->GetDimensionsCount(info, &dims));
        Shape shape(dims);
        check(api_->GetDimensions(info, shape.data(), dims));
        return {type, std::move(shape)};
    }

    static const Dtype* known(ONNXTensorElementDataType type) {
        for (const auto& each : dtypes)
            if (each.first == type) return &each.second;
        return nullptr;
    }

    // Over the tensor's memory, which ONNX Runtime only reads.
    Owned<OrtValue> wrapped(const Tensor& value) const {
        auto type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        for (const auto& each : dtypes)
            if (each.second == value.dtype) type = each.first;
        return made<OrtValue>(api_->ReleaseValue, [&](auto out) {
            return api_->CreateTensorWithDataAsOrtValue(
                host_.get(), const_cast<void*>(value.data.get()), value.size() * bytes_of(value.dtype),
                value.shape.data(), value.shape.size(), type, out
            );
        });
    }

    // Over ONNX Runtime's memory, which lives as long as the tensor.
    Tensor unwrapped(std::shared_ptr<OrtValue> value) const {
        const auto info = made<OrtTensorTypeAndShapeInfo>(api_->ReleaseTensorTypeAndShapeInfo, [&](auto out) {
            return api_->GetTensorTypeAndShape(value.get(), out);
        });
        auto [type, shape] = read_shape(info.get());
        void* data = nullptr;
        check(api_->GetTensorMutableData(value.get(), &data));
        const Dtype* dtype = known(type);
        if (!dtype) fail(ErrorKind::engine, path_.string(), ": an output has ONNX type ", int(type));
        return {*dtype, std::move(shape), {std::move(value), data}};
    }

    std::filesystem::path path_;
    std::string refusal_;  // how the message of an error begins
    const OrtApi* api_ = OrtGetApiBase()->GetApi(api_version);
    Owned<OrtEnv> env_{nullptr, nullptr};
    Owned<OrtSession> session_{nullptr, nullptr};
    Owned<OrtMemoryInfo> host_{nullptr, nullptr};
    std::vector<const char*> input_names_, output_names_;
};

}  // namespace

std::unique_ptr<Engine> open_onnx_engine(const std::filesystem::path& path, const Options& options) {
    return std::make_unique<OnnxEngine>(path, options);
}

}  // namespace dcompile
