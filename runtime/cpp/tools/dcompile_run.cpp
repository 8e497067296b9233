// dcompile-run: samples of a bundle as raw float32, for scripts and tests.
#include <dcompile/program.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr const char* usage = R"(dcompile-run BUNDLE [options]: samples of a bundle as raw float32 [B, *sample shape]

  --labels A,B,...       names or numbers for the condition that has classes
  --condition NAME=FILE  raw values [B, ...] of a condition; may be given several times
  --seed N               of the first sample; the next ones take N + 1, ... (default 0)
  --seeds N,M,...        one for each sample
  --threads N            of one operator; the engine decides if not given
  --option NAME=VALUE    a setting of the engine; may be given several times
  --no-verify            do not compare sizes and sha256 of files with the manifest
  --repeats N            requests after the first, for --measure (default 5)
  --measure              print seconds and bytes as JSON, as `python -m dcompile.runtime.measure` does
  --pixels               write bytes [B, H, W, C] instead of float32
  -o FILE                where to write samples; nothing is written if not given
)";

using Clock = std::chrono::steady_clock;

struct Arguments {
    std::string bundle, output;
    dcompile::Options options;
    dcompile::Request request;
    std::vector<std::pair<std::string, std::string>> files;  // of conditions
    int repeats = 5;
    bool measure = false, pixels = false;
};

int complain(const std::string& message) {
    std::cerr << "error: " << message << "\n";
    return 2;
}

double since(Clock::time_point started) {
    return std::chrono::duration<double>(Clock::now() - started).count();
}

std::vector<std::string> split(const std::string& list) {
    std::vector<std::string> parts;
    std::istringstream stream(list);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

std::pair<std::string, std::string> named(const std::string& option) {
    const auto at = option.find('=');
    return {option.substr(0, at), at == option.npos ? "" : option.substr(at + 1)};
}

struct Misuse {
    std::string message;
};

std::uint64_t number(const std::string& option, const std::string& word) {
    std::uint64_t value = 0;
    const auto end = word.data() + word.size();
    const auto [stop, wrong] = std::from_chars(word.data(), end, value);
    if (wrong != std::errc() || stop != end) throw Misuse{option + ": '" + word + "' is no whole number"};
    return value;
}

bool is_number(const std::string& word) {
    return !word.empty() && word.size() < 18 && word.find_first_not_of("0123456789") == word.npos;
}

// A label is a name if the bundle has one like it, else a number: classes may be called "0".
std::vector<dcompile::Label> labels_of(const dcompile::Contract& contract, const std::vector<std::string>& words) {
    const auto is_name = [&](const std::string& word) {
        return std::any_of(contract.conditions.begin(), contract.conditions.end(), [&](const auto& each) {
            return each.labels && std::count(each.labels->begin(), each.labels->end(), word) > 0;
        });
    };
    std::vector<dcompile::Label> labels;
    for (const auto& word : words) {
        if (is_number(word) && !is_name(word)) labels.emplace_back(std::int64_t(std::stoll(word)));
        else labels.emplace_back(word);
    }
    return labels;
}

template <class T>
dcompile::Tensor read_values(const std::string& path, const dcompile::Shape& shape) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes(std::istreambuf_iterator<char>(file), {});
    std::vector<T> values(bytes.size() / sizeof(T));
    std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
    std::int64_t each = 1;
    for (auto dim : shape) each *= dim;
    dcompile::Shape whole{std::int64_t(values.size()) / std::max<std::int64_t>(each, 1)};
    whole.insert(whole.end(), shape.begin(), shape.end());
    return dcompile::Tensor::of(whole, std::move(values));
}

bool read_condition(
    const dcompile::Contract& contract, const std::string& name, const std::string& path, dcompile::Request& request
) {
    for (const auto& each : contract.conditions) {
        if (each.name != name) continue;
        if (each.dtype == "float32") request.conditions[name] = read_values<float>(path, each.shape);
        else if (each.dtype == "int64") request.conditions[name] = read_values<std::int64_t>(path, each.shape);
        else return false;
        return true;
    }
    return false;
}

long proc_bytes(const char* path, const std::string& field) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);)
        if (line.compare(0, field.size(), field) == 0) return std::stol(line.substr(field.size())) * 1024;
    return -1;
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const auto middle = values.size() / 2;
    return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// The figures of dcompile.runtime.measure, by its names.
bool print_figures(dcompile::Program& program, const Arguments& given, double load_s, double first_s) {
    std::vector<double> generate_s, step_s, overhead_frac;
    std::uint64_t copied_bytes = 0;
    for (int i = 0; i < std::max(1, given.repeats); ++i) {
        if (!program.generate(given.request)) return false;
        const auto timing = *program.last_timing();
        generate_s.push_back(timing.total_s);
        step_s.push_back(timing.total_s / double(std::max<std::int64_t>(timing.steps, 1)));
        overhead_frac.push_back(1.0 - timing.engines_s / timing.total_s);
        copied_bytes = timing.copied_bytes;
    }
    std::cout << "{\"load_s\": " << load_s << ", \"first_s\": " << first_s << ", \"generate_s\": " << median(generate_s)
              << ", \"step_s\": " << median(step_s) << ", \"overhead_frac\": " << median(overhead_frac)
              << ", \"copied_bytes\": " << copied_bytes
              << ", \"peak_rss_bytes\": " << proc_bytes("/proc/self/status", "VmHWM:")
              << ", \"pss_bytes\": " << proc_bytes("/proc/self/smaps_rollup", "Pss:") << "}" << std::endl;
    return true;
}

int run(Arguments given, const std::vector<std::string>& labels) {
    const auto started = Clock::now();
    auto program = dcompile::Program::open(given.bundle, given.options);
    if (!program) return complain(program.error().message);
    const double load_s = since(started);
    given.request.labels = labels_of(program->contract(), labels);
    for (const auto& [name, path] : given.files)
        if (!read_condition(program->contract(), name, path, given.request))
            return complain("condition '" + name + "' is not in the bundle, or neither float32 nor int64");
    const auto first = Clock::now();
    auto samples = program->generate(given.request);
    if (!samples) return complain(samples.error().message);
    const double first_s = since(first);
    if (given.measure && !print_figures(*program, given, load_s, first_s)) return complain("a later request failed");
    if (given.output.empty()) return 0;
    std::ofstream file(given.output, std::ios::binary);
    if (given.pixels) {
        auto pixels = program->images(*samples);
        if (!pixels) return complain(pixels.error().message);
        file.write(reinterpret_cast<const char*>(pixels->values.data()), std::streamsize(pixels->values.size()));
    } else {
        file.write(static_cast<const char*>(samples->data.get()), std::streamsize(samples->size() * sizeof(float)));
    }
    return file.flush() ? 0 : complain(given.output + ": cannot be written");
}

}  // namespace

int main(int count, char** words) {
    Arguments given;
    std::vector<std::string> labels;
    try {
        for (int i = 1; i < count; ++i) {
            const std::string word = words[i];
            const auto next = [&] {
                if (i + 1 == count) throw Misuse{word + " needs a value"};
                return std::string(words[++i]);
            };
            if (word == "--help") return std::cout << usage, 0;
            else if (word == "--labels") labels = split(next());
            else if (word == "--condition") given.files.push_back(named(next()));
            else if (word == "--seed") given.request.seed = number(word, next());
            else if (word == "--seeds")
                for (const auto& each : split(next())) given.request.seeds.push_back(number(word, each));
            else if (word == "--threads") given.options.threads = int(number(word, next()));
            else if (word == "--option") given.options.engine.insert(named(next()));
            else if (word == "--no-verify") given.options.verify = false;
            else if (word == "--repeats") given.repeats = int(number(word, next()));
            else if (word == "--measure") given.measure = true;
            else if (word == "--pixels") given.pixels = true;
            else if (word == "-o") given.output = next();
            else if (given.bundle.empty() && word[0] != '-') given.bundle = word;
            else throw Misuse{word + " is unknown"};
        }
        if (given.bundle.empty()) throw Misuse{"BUNDLE is missing"};
    } catch (const Misuse& misuse) {
        return complain(misuse.message + "; see dcompile-run --help");
    }
    return run(given, labels);
}
