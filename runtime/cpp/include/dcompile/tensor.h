#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace dcompile {

enum class Dtype { float32, float16, float64, int64, int32, int8, uint8, boolean };

using Shape = std::vector<std::int64_t>;

namespace detail {
template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
    static constexpr Dtype value = Dtype::float32;
};
template <>
struct DtypeOf<double> {
    static constexpr Dtype value = Dtype::float64;
};
template <>
struct DtypeOf<std::int64_t> {
    static constexpr Dtype value = Dtype::int64;
};
template <>
struct DtypeOf<std::int32_t> {
    static constexpr Dtype value = Dtype::int32;
};
template <>
struct DtypeOf<std::int8_t> {
    static constexpr Dtype value = Dtype::int8;
};
template <>
struct DtypeOf<std::uint8_t> {
    static constexpr Dtype value = Dtype::uint8;
};
}  // namespace detail

// Values in C order that nobody changes. Copies share the memory, which lives as long as one of them.
struct Tensor {
    Dtype dtype = Dtype::float32;
    Shape shape;
    std::shared_ptr<const void> data;

    template <class T>
    static Tensor of(Shape shape, std::vector<T> values) {
        auto owner = std::make_shared<const std::vector<T>>(std::move(values));
        const void* data = owner->data();
        return {detail::DtypeOf<T>::value, std::move(shape), {std::move(owner), data}};
    }

    // The caller says the type: it must be that of `dtype`.
    template <class T>
    const T* values() const noexcept {
        return static_cast<const T*>(data.get());
    }

    std::size_t size() const noexcept {
        std::size_t product = 1;
        for (auto dim : shape) product *= static_cast<std::size_t>(dim);
        return product;
    }
};

}  // namespace dcompile
