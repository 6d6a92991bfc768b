// Features of an image by a model that `internvit export MODEL model.pt2 --to aoti --backend cpu` wrote, without
// Python; or with `--backend cuda` and internvit_cuda.so, on the GPU.
//
//   internvit_features model.pt2 internvit_cpu.so HEIGHT WIDTH pixels.f32 features.f32
//
// pixels.f32 has float32 pixels [B, 3, HEIGHT, WIDTH], normalised as model.pt2.json says; features.f32 gets the
// model's first output. internvit_cpu.so lies in the installed package, in internvit/lib.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void run(const std::string& model, const std::string& library, int64_t height, int64_t width, const std::string& in,
         const std::string& out) {
  // The package calls the library's ops by name: the library registers them when it is loaded.
  if (!dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader loader(model);
  const auto metadata = loader.get_metadata();
  for (const auto& [key, value] : metadata) std::printf("%s: %s\n", key.c_str(), value.c_str());
  const int64_t multiple = std::stoll(metadata.at("internvit.multiple"));
  if (height % multiple || width % multiple)  // which the package does not see: it leaves out the rest
    throw std::runtime_error("HEIGHT and WIDTH must be multiples of " + std::to_string(multiple));
  const c10::Device device(metadata.at("AOTI_DEVICE_KEY"));

  std::vector<char> bytes = read(in);
  const size_t image = sizeof(float) * 3 * size_t(height) * size_t(width);
  if (height < 1 || width < 1 || bytes.empty() || bytes.size() % image)
    throw std::runtime_error(in + " does not hold images of this size");
  const auto pixels = at::from_blob(bytes.data(), {int64_t(bytes.size() / image), 3, height, width});
  const c10::InferenceMode inference;
  const at::Tensor features = loader.run({pixels.to(device)})[0].cpu().contiguous();
  std::ofstream(out, std::ios::binary).write(static_cast<const char*>(features.data_ptr()), features.nbytes());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 internvit_cpu.so HEIGHT WIDTH PIXELS.f32 FEATURES.f32\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], argv[2], std::stoll(argv[3]), std::stoll(argv[4]), argv[5], argv[6]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
