#include "images.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "manifest.h"
#include "messages.h"

namespace dcompile {
namespace {

// In the order of numpy's operations, all float32, so that the same sample gives the same byte.
std::uint8_t to_byte(float value, float low, float high) {
    const float span = std::max(high - low, std::numeric_limits<float>::min());
    const float unit = std::clamp((value - low) / span, 0.0F, 1.0F);
    return std::isnan(unit) ? 0 : std::uint8_t(std::floor(unit * 255.0F + 0.5F));
}

}  // namespace

Pixels to_pixels(const Tensor& samples, const std::optional<std::pair<double, double>>& value_range) {
    if (samples.shape.size() != 4 || samples.dtype != Dtype::float32)
        fail(ErrorKind::request, "images: samples have shape ", spelled(samples.shape), ", needed [B, C, H, W]");
    const auto batch = samples.shape[0], all = samples.shape[1], height = samples.shape[2], width = samples.shape[3];
    const auto channels = value_range ? all : std::min<std::int64_t>(all, all >= 3 ? 3 : 1);
    Pixels pixels{batch, height, width, channels, std::vector<std::uint8_t>(count({batch, height, width, channels}))};
    const std::int64_t plane = height * width;
    for (std::int64_t b = 0; b < batch; ++b) {
        const float* sample = samples.values<float>() + b * all * plane;
        const auto ends = std::minmax_element(sample, sample + channels * plane);
        const bool empty = channels * plane == 0;
        const float low = value_range ? float(value_range->first) : empty ? 0.0F : *ends.first;
        const float high = value_range ? float(value_range->second) : empty ? 0.0F : *ends.second;
        std::uint8_t* out = pixels.values.data() + b * plane * channels;
        for (std::int64_t i = 0; i < plane; ++i)
            for (std::int64_t c = 0; c < channels; ++c) *out++ = to_byte(sample[c * plane + i], low, high);
    }
    return pixels;
}

}  // namespace dcompile
