// glyph BUNDLE LABEL SEED FILE.png: draws one sample of a bundle, such as the one that `make demo` builds.
#include <dcompile/program.h>

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb_image_write.h>

#include <cstdio>
#include <cstdlib>

int fail(const dcompile::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.message.c_str());
    return 1;
}

int main(int count, char** words) {
    if (count != 5) {
        std::fprintf(stderr, "usage: glyph BUNDLE LABEL SEED FILE.png\n");
        return 2;
    }
    auto program = dcompile::Program::open(words[1]);
    if (!program) return fail(program.error());

    dcompile::Request request;
    request.labels = {std::string(words[2])};
    request.seed = std::strtoull(words[3], nullptr, 10);
    const auto watch = [](std::int64_t step, std::int64_t steps, const dcompile::Tensor&) {
        std::fprintf(stderr, "\rstep %lld of %lld", static_cast<long long>(step), static_cast<long long>(steps));
    };
    auto samples = program->generate(request, watch);
    std::fprintf(stderr, "\n");
    if (!samples) return fail(samples.error());

    auto pixels = program->images(*samples);
    if (!pixels) return fail(pixels.error());
    const int width = static_cast<int>(pixels->width), height = static_cast<int>(pixels->height);
    const int channels = static_cast<int>(pixels->channels);
    if (!stbi_write_png(words[4], width, height, channels, pixels->values.data(), width * channels)) {
        std::fprintf(stderr, "error: %s cannot be written\n", words[4]);
        return 1;
    }
    std::printf("%s: %d x %d, %.1f ms\n", words[4], width, height, 1e3 * program->last_timing()->total_s);
}
