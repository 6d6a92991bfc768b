// The raw ops torch.ops.internvit_cpu.*, on torch's stable ABI: one binary for every Python and every torch >= 2.10.
// Here the library, its instruction set, threads and memory; the ops are in the files beside this one. No other folder
// of csrc/cpu knows torch. Schemas come from internvit/ops (setup.py writes schemas.h).
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "common/checks.h"
#include "cpu/torch/bindings.h"
#include "schemas.h"

namespace internvit {
namespace {

// The instruction set in use: the best one, unless a test or a benchmark chose another.
std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels = [] {
    const Kernels* const* list = supported_kernels();
    while (list[1]) ++list;
    return list[0];
  }();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const Kernels& int8_kernels() {
  const Kernels *in_use = &kernels(), *best = in_use;
  for (const Kernels* const* k = supported_kernels(); *k != in_use; ++k)
    if ((*k)->linear_int8) best = *k;
  return in_use->linear_int8 ? *in_use : *best;
}

namespace {

std::string instruction_sets() {
  std::string names;
  for (const Kernels* const* k = supported_kernels(); *k; ++k)
    names += (names.empty() ? "" : " ") + std::string((*k)->name);
  return names;
}

std::string use_instruction_set(const std::string& name) {
  const std::string previous = kernels().name;
  for (const Kernels* const* k = supported_kernels(); *k; ++k) {
    if (name == (*k)->name) {
      current().store(*k, std::memory_order_relaxed);
      return previous;
    }
  }
  STD_TORCH_CHECK(false, "use_instruction_set: name: this machine has ", instruction_sets(), ", got '", name, "'");
  return previous;
}

// Each thread keeps its working memory: allocating it anew costs a page fault for every 4 KiB of every call.
struct Workspace {
  void* memory = nullptr;
  int64_t size = 0;
  ~Workspace() { std::free(memory); }

  void* at_least(int64_t bytes) {
    if (size < bytes) {
      std::free(memory);
      size = 0;
      const int64_t pages = (bytes + 4095) / 4096 * 4096;
      memory = std::aligned_alloc(4096, size_t(pages));
      STD_TORCH_CHECK(memory, "internvit_cpu: no memory for ", pages, " bytes of working space");
      size = pages;
    }
    return memory;
  }
};

void* thread_scratch(int64_t bytes) {
  thread_local Workspace workspace;
  return workspace.at_least(bytes);
}

void* shared_scratch(int64_t bytes) {
  thread_local Workspace workspace;
  return workspace.at_least(bytes);
}

void torch_parallel_for(int64_t n, int64_t grain, void (*task)(void*, int64_t, int64_t), void* state) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { task(state, begin, end); });
}

}  // namespace

const Executor kExecutor = {torch_parallel_for, thread_scratch, shared_scratch};

namespace {

// Multiplies from registers and L1 on so many threads; returns the flops done, for the caller's clock.
int64_t peak(ScalarType dtype, int64_t rounds, int64_t threads) {
  const bool int8 = dtype == ScalarType::Char && int8_kernels().linear_int8;
  STD_TORCH_CHECK(is_storage_type(dtype) || int8,
                  "peak: dtype must be float32, bfloat16, float16, or int8 where the machine multiplies it, got ",
                  dtype);
  STD_TORCH_CHECK(rounds >= 0, "peak: rounds must be >= 0, got ", rounds);
  STD_TORCH_CHECK(threads >= 1 && threads <= 4096, "peak: threads must be 1 to 4096, got ", threads);
  std::vector<int64_t> flops(size_t(threads), 0);
  const DType of = int8 ? kInt8 : dtype == ScalarType::BFloat16 ? kBFloat16 : kFloat32;
  (int8 ? int8_kernels() : kernels()).peak({of, rounds, threads, flops.data()}, kExecutor);
  return std::accumulate(flops.begin(), flops.end(), int64_t{0});
}

}  // namespace
}  // namespace internvit

STABLE_TORCH_LIBRARY(internvit_cpu, m) {
  for (const char* schema : internvit::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(internvit_cpu, CompositeExplicitAutograd, m) {
  m.impl("peak", TORCH_BOX(&internvit::peak));
  m.impl("instruction_sets", TORCH_BOX(&internvit::instruction_sets));
  m.impl("use_instruction_set", TORCH_BOX(&internvit::use_instruction_set));
}
