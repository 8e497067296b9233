#include "random.h"

#include <cmath>

#include "manifest.h"

namespace dcompile {
namespace {

constexpr double pi = 3.14159265358979323846;

double uniform(std::uint32_t word) {
    return (double(word >> 8) + 1.0) * 0x1p-24;  // in (0, 1], exact in float32
}

// Two normals: float64 throughout, rounded to float32 once at the end.
void box_muller(std::uint32_t a, std::uint32_t b, float* out) {
    const double radius = std::sqrt(-2.0 * std::log(uniform(a))), angle = 2.0 * pi * uniform(b);
    out[0] = float(radius * std::cos(angle));
    out[1] = float(radius * std::sin(angle));
}

}  // namespace

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const auto p0 = std::uint64_t(counter[0]) * 0xD2511F53U, p1 = std::uint64_t(counter[2]) * 0xCD9E8D57U;
        counter = {
            std::uint32_t(p1 >> 32) ^ counter[1] ^ key[0], std::uint32_t(p1),
            std::uint32_t(p0 >> 32) ^ counter[3] ^ key[1], std::uint32_t(p0)};
        key = {key[0] + 0x9E3779B9U, key[1] + 0xBB67AE85U};
    }
    return counter;
}

Tensor normal(const std::vector<std::uint64_t>& seeds, std::uint32_t draw, const Shape& shape, float scale) {
    const std::size_t size = count(shape);
    std::vector<float> noise(seeds.size() * size);
    float* out = noise.data();
    for (auto seed : seeds)
        for (std::size_t block = 0; 4 * block < size; ++block) {
            const std::array<std::uint32_t, 2> key{std::uint32_t(seed), std::uint32_t(seed >> 32)};
            const auto words = philox({std::uint32_t(block), std::uint32_t(std::uint64_t(block) >> 32), draw, 0}, key);
            float four[4];
            box_muller(words[0], words[1], four);
            box_muller(words[2], words[3], four + 2);
            for (std::size_t i = 0; i < 4 && 4 * block + i < size; ++i) *out++ = four[i] * scale;
        }
    Shape whole{std::int64_t(seeds.size())};
    whole.insert(whole.end(), shape.begin(), shape.end());
    return Tensor::of(std::move(whole), std::move(noise));
}

}  // namespace dcompile
