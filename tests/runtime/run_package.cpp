// Runs a package once, as a C++ program does it: run_package PACKAGE BATCH INPUT... OUTPUT..., files of raw numbers in the
// order of the package's ports. What the metadata says is at the top of runtime/aoti_engine.py.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

using Numbers = std::vector<int64_t>;

const std::unordered_map<std::string, at::ScalarType> kTypes = {
    {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"int64", at::kLong}, {"int32", at::kInt},
    {"int8", at::kChar},     {"uint8", at::kByte},        {"bool", at::kBool}};

std::vector<std::string> split(std::string line, const std::string& marks = " ") {
  for (char& each : line)
    if (marks.find(each) != std::string::npos) each = ' ';
  std::istringstream words(line);
  return {std::istream_iterator<std::string>(words), {}};
}

at::Tensor call(const char* name, c10::Stack stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
  return stack.at(0).toTensor();
}

at::Tensor pack(const at::Tensor& weight, const std::string& packing) {
  if (packing == "linear") return call("mkldnn::_reorder_linear_weight", {weight, c10::IValue()});
  if (packing == "qlinear") return call("onednn::qlinear_prepack", {weight, c10::IValue()});
  if (packing == "-") return weight;
  Numbers n;  // of qconv: stride, padding, dilation, groups
  for (const auto& word : split(packing.substr(6), ":,")) n.push_back(std::stoll(word));
  return call("onednn::qconv_prepack", {weight, at::ones(weight.size(0)), 1.0, 0, Numbers{n[0], n[1]},
                                        Numbers{n[2], n[3]}, Numbers{n[4], n[5]}, n[6], c10::IValue()});
}

int main(int count, char** words) {
  torch::inductor::AOTIModelPackageLoader loader(words[1]);
  auto about = loader.get_metadata();
  auto file = std::filesystem::path(words[1]).replace_filename(about.at("dcompile.weights"));
  auto bytes = at::from_file(file.string(), false, std::filesystem::file_size(file), at::kByte);  // mapped, not read

  std::unordered_map<std::string, at::Tensor> constants;
  std::istringstream lines(about.at("dcompile.constants"));
  for (std::string line; std::getline(lines, line);) {
    auto word = split(line);
    Numbers shape;
    for (size_t i = 4; i < word.size(); i++) shape.push_back(std::stoll(word[i]));
    auto weight = at::from_blob(bytes.data_ptr<uint8_t>() + std::stoll(word[2]), shape, kTypes.at(word[1]));
    constants[word[0]] = pack(weight, word[3]);
  }
  loader.load_constants(constants, false, true, /*user_managed=*/true);

  int next = 3;
  std::vector<at::Tensor> inputs;
  std::istringstream ports(about.at("dcompile.inputs"));
  for (std::string line; std::getline(ports, line); next++) {
    auto word = split(line);
    Numbers shape;
    for (size_t i = 2; i < word.size(); i++)
      shape.push_back(std::stoll(word[i]) * (word[i].find('*') == std::string::npos ? 1 : std::stoll(words[2])));
    inputs.push_back(at::empty(shape, kTypes.at(word[1])));
    std::ifstream(words[next], std::ios::binary).read((char*)inputs.back().data_ptr(), inputs.back().nbytes());
  }
  for (auto& output : loader.run(inputs)) {
    output = output.contiguous();
    std::ofstream(words[next++], std::ios::binary).write((char*)output.data_ptr(), output.nbytes());
  }
  return next == count ? 0 : 1;
}
