// What a bundle on disk cannot show: known answers, engines that are plain arithmetic, damaged bytes.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <dcompile/program.h>
#include <doctest/doctest.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "images.h"
#include "manifest.h"
#include "messages.h"
#include "random.h"
#include "request.h"
#include "safetensors.h"
#include "script.h"
#include "sha256.h"

using namespace dcompile;

namespace {

template <class Work>
std::string message_of(Work work) {
    try {
        work();
    } catch (const Failure& failure) {
        return failure.error.message;
    }
    return "";
}

bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != text.npos;
}

// A file of its own, gone with the object.
struct Scratch {
    std::filesystem::path path;

    explicit Scratch(const std::string& content) {
        std::string name = (std::filesystem::temp_directory_path() / "dcompile-XXXXXX").string();
        const int handle = mkstemp(name.data());
        REQUIRE(handle >= 0);
        close(handle);
        path = name;
        std::ofstream(path, std::ios::binary) << content;
    }
    ~Scratch() { std::filesystem::remove(path); }
};

}  // namespace

// --- random ---

TEST_CASE("philox gives the known answers of Random123") {
    using Words = std::array<std::uint32_t, 4>;
    CHECK(philox({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
    const std::uint32_t ones = 0xffffffff;
    CHECK(philox({ones, ones, ones, ones}, {ones, ones}) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
    CHECK(
        philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}
    );
}

TEST_CASE("a sample's noise depends on its seed and draw alone") {
    const Tensor both = normal({7, 1ULL << 40}, 3, {5});
    const Tensor alone = normal({1ULL << 40}, 3, {5});
    REQUIRE(both.shape == Shape{2, 5});
    for (int i = 0; i < 5; ++i) CHECK(both.values<float>()[5 + i] == alone.values<float>()[i]);
    CHECK(normal({7}, 4, {5}).values<float>()[0] != both.values<float>()[0]);
    CHECK(normal({7}, 3, {5}, 0.5F).values<float>()[1] == 0.5F * both.values<float>()[1]);
    CHECK(normal({7}, 3, {}).size() == 1);
}

// --- script ---

namespace {

// x -> x + step, half. Counts what it is given.
struct Arithmetic final : Engine {
    Arithmetic() {
        inputs = {{"x", {"float32", {1}}}, {"step", {"float32", {}}}};
        outputs = {{"y", {"float32", {1}}}, {"half", {"float32", {}}}};
    }
    std::vector<Tensor> run(const std::vector<Tensor>& values) override {
        const float x = *values[0].values<float>() + *values[1].values<float>();
        return {Tensor::of<float>({1}, {x}), Tensor::of<float>({}, {x / 2})};
    }
};

const EngineSpec add{
    "add",
    {{"step", {Source::table, "steps"}}, {"x", {Source::slot, "sample"}}},
    {{"half", {Source::slot, "half"}}, {"y", {Source::slot, "sample"}}}};
const EngineSpec lost{
    "lost",
    {{"x", {Source::slot, "nowhere"}}, {"step", {Source::table, "steps"}}},
    {{"y", {Source::slot, "sample"}}, {"half", {Source::slot, "half"}}}};

struct Ran {
    float sample;
    Spent spent;
    std::vector<std::int64_t> before, after;
    Slots slots;
};

Ran ran(const std::vector<Row>& rows) {
    Ran out{};
    Named<Stage> stages;
    stages.emplace_back("add", Stage(std::make_unique<Arithmetic>(), add));
    stages.emplace_back("lost", Stage(std::make_unique<Arithmetic>(), lost));
    const Named<Tensor> tables{{"steps", Tensor::of<float>({3}, {1, 10, 100})}};
    out.slots = {{"sample", Tensor::of<float>({1}, {0})}};
    const Listeners listeners{
        [&](std::int64_t step) { out.before.push_back(step); }, [&](std::int64_t step) { out.after.push_back(step); }};
    out.spent = run_script(Script(rows, {{"add", add}, {"lost", lost}}), stages, tables, out.slots, listeners);
    out.sample = *out.slots.at("sample").values<float>();
    return out;
}

}  // namespace

TEST_CASE("calls take their rows, and listeners hear every step") {
    const auto out = ran({Call{"add", 2}, Call{"add", 0}, Call{"add", 1}});
    CHECK(out.sample == 111.0F);
    CHECK(out.spent.calls == 3);
    CHECK(out.before == std::vector<std::int64_t>{0, 1, 2});
    CHECK(out.after == std::vector<std::int64_t>{1, 2, 3});
}

TEST_CASE("a jump is taken where the float is less, and not where it is equal") {
    CHECK(ran({Call{"add", 1}, Jump{3, "half", 5.5}, Call{"add", 2}, Call{"add", 0}}).sample == 11.0F);
    CHECK(ran({Call{"add", 1}, Jump{3, "half", 5.0}, Call{"add", 2}, Call{"add", 0}}).sample == 111.0F);
    CHECK(ran({Call{"add", 1}, Jump{2, "half", 9.0}}).sample == 10.0F);  // to the end
    CHECK(ran({Call{"add", 0}, Jump{0, "half", 2.0}}).sample == 4.0F);   // and back
}

TEST_CASE("a slot goes when no row that can follow reads it") {
    CHECK(ran({Call{"add", 0}}).slots.count("half") == 0);
    const Script script({Call{"add", 0}, Call{"add", 1}, Jump{0, "half", 0.0}}, {{"add", add}});
    CHECK(script.dead[0] == std::vector<std::string>{"half"});
    CHECK(script.dead[1].empty());
}

TEST_CASE("an endless loop, an unwritten slot and a jump on many values are refused") {
    CHECK(contains(
        message_of([] {
            ran({Call{"add", 0}, Jump{0, "half", 1e30}});
        }),
        "21 rows run of a script of 2: its jumps loop"
    ));
    CHECK(contains(
        message_of([] {
            ran({Call{"lost", 0}});
        }),
        "slot 'nowhere' is read before any engine has written it"
    ));
    Slots slots{{"sample", Tensor::of<float>({2}, {1, 2})}};
    const auto jump = [&] { run_script(Script({Jump{1, "sample", 0.0}}, {}), {}, {}, slots); };
    CHECK(contains(message_of(jump), "a jump needs one float in slot 'sample', found shape [2]"));
    slots["sample"] = Tensor::of<std::int64_t>({}, {1});
    CHECK(contains(message_of(jump), "found dtype int64"));
}

// --- files ---

TEST_CASE("sha256") {
    CHECK(sha256_of(Scratch("abc").path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(sha256_of(Scratch("").path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

namespace {

std::string safetensors(const std::string& header, const std::string& block) {
    std::string out;
    for (int i = 0; i < 8; ++i) out += char(header.size() >> (8 * i) & 255);
    return out + header + block;
}

std::string why_not(const std::string& content) {
    const Scratch file(content);
    return message_of([&] { read_safetensors(file.path); });
}

}  // namespace

TEST_CASE("safetensors are read, and damaged ones refused with the reason") {
    const std::string entry = R"({"__metadata__":{"a":"b"},"x":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}})";
    const Scratch file(safetensors(entry, std::string("\1\0\0\0\2\0\0\0", 8)));
    const auto tensors = read_safetensors(file.path);
    REQUIRE(tensors.size() == 1);
    CHECK(tensors[0].first == "x");
    CHECK(tensors[0].second.shape == Shape{2});
    CHECK(tensors[0].second.values<std::int32_t>()[1] == 2);
    CHECK(contains(why_not("nothing"), "bytes in a file of 7"));
    CHECK(contains(why_not(""), "a header of 0 bytes in a file of 0"));
    CHECK(contains(why_not(std::string(8, '\xff') + "x"), "a header of 18446744073709551615 bytes in a file of 9"));
    CHECK(contains(why_not(safetensors("[]", "")), "the header is no object"));
    CHECK(contains(why_not(safetensors("{", "")), "cannot be read ("));
    CHECK(contains(why_not(safetensors(entry, "1234")), "x: [2] I32 at bytes 0 to 8 of 4"));
    CHECK(contains(
        why_not(safetensors(R"({"x":{"dtype":"Q4","shape":[],"data_offsets":[0,0]}})", "")), "x: dtype 'Q4'; known: F32"
    ));
    const std::string huge = R"({"x":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}})";
    CHECK(contains(why_not(safetensors(huge, "")), "x: [4294967296, 4294967296] F64 at bytes 0 to 0 of 0"));
    CHECK(contains(message_of([] { read_safetensors("nowhere.safetensors"); }), "nowhere.safetensors: cannot be read (")
    );
}

// Damaged bytes are refused with one line, whatever they are; the sanitizers watch.
TEST_CASE("no damage to a manifest or a table crashes the readers") {
    const char* given = std::getenv("DCOMPILE_TEST_BUNDLE");
    REQUIRE_MESSAGE(given, "DCOMPILE_TEST_BUNDLE names a bundle");
    const auto read = [](const std::filesystem::path& path) {
        std::ifstream file(path, std::ios::binary);
        return std::string(std::istreambuf_iterator<char>(file), {});
    };
    const auto manifest = read(std::filesystem::path(given) / "manifest.json");
    const auto tables = read(std::filesystem::path(given) / "tables.safetensors");
    REQUIRE(message_of([&] { parse_manifest(manifest, "m"); }) == "");
    std::minstd_rand random(0);
    const std::string tokens[] = {"-1", "0",    "1e400", "9223372036854775807", "18446744073709551615", "null", "[]",
                                  "{}", "\"\"", "true"};
    int refused = 0;
    for (int i = 0; i < 2000; ++i) {
        const bool is_manifest = i % 3 != 0;
        std::string content = is_manifest ? manifest : tables;
        const std::size_t at = random() % (is_manifest ? content.size() : std::min<std::size_t>(content.size(), 120));
        const auto how = random() % 4;
        if (how == 0) content[at] = char(random() % 256);
        if (how == 1) content.resize(at);
        if (how == 2) content.insert(at, std::string(1 + random() % 4, char(random() % 128)));
        if (how == 3 && is_manifest) {  // a number becomes another value
            const auto digit = content.find_first_of("0123456789", at);
            if (digit != content.npos) {
                const auto end = content.find_first_not_of("0123456789", digit);
                content.replace(digit, end - digit, tokens[random() % std::size(tokens)]);
            }
        }
        const auto message = is_manifest ? message_of([&] { parse_manifest(content, "m"); }) : why_not(content);
        CHECK(message.find('\n') == message.npos);
        refused += !message.empty();
    }
    CHECK(refused > 1000);
}

// --- requests, words, pixels ---

TEST_CASE("seeds go up by one, and end where 64 bits end") {
    Contract contract{};
    contract.batch = {1, 4};
    Request request;
    request.seed = ~std::uint64_t(0);
    CHECK(read_seeds(contract, request, {}) == std::vector<std::uint64_t>{request.seed});
    const Named<Tensor> two{{"label", Tensor::of<std::int64_t>({2}, {0, 0})}};
    CHECK(contains(
        message_of([&] { read_seeds(contract, request, two); }), "seed 18446744073709551616 is outside 0..2**64 - 1"
    ));
    request.seeds = {5, 3};
    CHECK(read_seeds(contract, request, two) == request.seeds);
}

TEST_CASE("unknown names get the closest known one, as difflib finds it") {
    CHECK(did_you_mean("float33", {"float32", "float16"}) == "did you mean 'float32'?");
    CHECK(did_you_mean("metrik", {"sample", "metric"}) == "did you mean 'metric'?");
    CHECK(did_you_mean("raw", {"sample", "cached"}) == "known: sample, cached");
    CHECK(did_you_mean("x", {}) == "known: none");
    CHECK(did_you_mean("?", std::vector<std::string>(41, "a")).size() == 7 + 40 * 3 - 2 + 5);
    CHECK(repr("it's \"so\"\n") == "'it\\'s \"so\"\\n'");
}

TEST_CASE("a result holds a value or an error") {
    Result<std::string> good(std::string("value"));
    REQUIRE(good);
    CHECK(good->size() == 5);
    CHECK(std::string(*std::move(good)) == "value");
    const Result<std::string> bad(Error{ErrorKind::request, "why"});
    REQUIRE(!bad);
    CHECK(bad.error().message == "why");
}

TEST_CASE("values that are no number have a pixel too") {
    const auto pixels = to_pixels(Tensor::of<float>({1, 1, 1, 3}, {NAN, INFINITY, -INFINITY}), std::pair(-1.0, 1.0));
    CHECK(pixels.values == std::vector<std::uint8_t>{0, 255, 0});
    CHECK(to_pixels(Tensor::of<float>({0, 3, 2, 2}, {}), std::nullopt).values.empty());
}
