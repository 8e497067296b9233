// The format: eight bytes with the length of a JSON header (little-endian), the header, then the values in one block;
// the header says each tensor's dtype, shape and [begin, end) in the block. https://github.com/huggingface/safetensors
// Debian has no header library for it; with a JSON parser there is little left to do.
#include "safetensors.h"

#include <cstdint>
#include <fstream>

#include "decode.h"
#include "manifest.h"
#include "messages.h"

namespace dcompile {
namespace {

constexpr std::pair<const char*, Dtype> dtypes[] = {
    {"F32", Dtype::float32}, {"F16", Dtype::float16}, {"F64", Dtype::float64}, {"I64", Dtype::int64},
    {"I32", Dtype::int32},   {"I8", Dtype::int8},     {"U8", Dtype::uint8},    {"BOOL", Dtype::boolean},
};

Dtype read_dtype(const std::string& tensor, const std::string& name) {
    std::vector<std::string> known;
    for (const auto& [each, dtype] : dtypes) {
        if (name == each) return dtype;
        known.emplace_back(each);
    }
    fail(ErrorKind::bundle, tensor, ": dtype ", repr(name), "; ", did_you_mean(name, known));
}

// -1 for a shape that no tensor has.
std::int64_t bytes_if_possible(const Shape& shape, Dtype dtype) {
    std::int64_t bytes = std::int64_t(bytes_of(dtype));
    for (auto dim : shape)
        if (dim < 0 || __builtin_mul_overflow(bytes, dim, &bytes)) return -1;
    return bytes;
}

Tensor read_tensor(const std::string& name, const Field& field, const std::shared_ptr<std::vector<std::byte>>& block) {
    field.object("_Entry", {"dtype", "shape", "data_offsets"});
    const auto spelled_dtype = field["dtype"].string();
    const Dtype dtype = read_dtype(name, spelled_dtype);
    const auto integer = [](const Field& each) { return each.integer(); };
    auto shape = field["shape"].list("tuple[int, ...]", integer);
    const auto offsets = field["data_offsets"].list("tuple[int, int]", integer, 2);
    const auto begin = offsets[0], end = offsets[1], size = std::int64_t(block->size());
    const auto values = bytes_if_possible(shape, dtype);
    if (begin < 0 || begin > end || end > size || end - begin != values || begin % std::int64_t(bytes_of(dtype)) != 0)
        fail(
            ErrorKind::bundle, name, ": ", spelled(shape), " ", spelled_dtype, " at bytes ", begin, " to ", end, " of ",
            size
        );
    return {dtype, std::move(shape), {block, block->data() + begin}};
}

Named<Tensor> read(std::ifstream& stream, std::uint64_t file_bytes) {
    unsigned char prefix[8] = {};
    stream.read(reinterpret_cast<char*>(prefix), sizeof prefix);
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
    if (file_bytes < sizeof prefix || length == 0 || length > file_bytes - sizeof prefix)
        fail(ErrorKind::bundle, "a header of ", length, " bytes in a file of ", file_bytes);
    std::string header(length, '\0');
    stream.read(header.data(), std::streamsize(length));
    const auto block = std::make_shared<std::vector<std::byte>>(file_bytes - sizeof prefix - length);
    stream.read(reinterpret_cast<char*>(block->data()), std::streamsize(block->size()));
    if (!stream) fail(ErrorKind::bundle, "it is shorter than it was");
    const Json abouts = Json::parse(header);
    if (!abouts.is_object()) fail(ErrorKind::bundle, "the header is no object");
    Named<Tensor> tensors;
    for (const auto& [name, about] : abouts.items())
        if (name != "__metadata__") tensors.emplace_back(name, read_tensor(name, Field(about, name), block));
    return tensors;
}

}  // namespace

Named<Tensor> read_safetensors(const std::filesystem::path& file) {
    std::string why;
    try {
        std::ifstream stream(file, std::ios::binary);
        if (!stream) fail(ErrorKind::bundle, "no such file, or no right to read it");
        return read(stream, std::filesystem::file_size(file));
    } catch (const nlohmann::json::exception& error) {
        why = first_line(error.what());
    } catch (const std::filesystem::filesystem_error& error) {
        why = error.code().message();
    } catch (const Failure& failure) {
        why = failure.error.message;
    }
    fail(ErrorKind::bundle, file.string(), ": cannot be read (", why, "); copy the bundle again");
}

}  // namespace dcompile
