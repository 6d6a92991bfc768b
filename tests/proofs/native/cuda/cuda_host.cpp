// The scheduler behind cuda_host.h: one block at a time, its threads as fibers.
#include "cuda_host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace internvit::cuda::host {

Settings settings;

namespace {

constexpr size_t kStackBytes = 256 << 10;
enum class State { kReady, kAtBarrier, kAtShuffle, kEnded };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* sanitizer_stack = nullptr;
  State state = State::kReady;
  dim3 index;
  uint32_t mask = 0;
  int offset = 0;
  float given = 0, taken = 0;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
void* scheduler_sanitizer_stack = nullptr;
const void* scheduler_stack_bottom = nullptr;
size_t scheduler_stack_size = 0;
const std::function<void()>* body = nullptr;
int current = -1, threads = 0;
uint64_t epoch = 0, block_number = 0;  // never reset: a cell of an earlier launch is never taken for one of this
std::string failure;

std::string thread_name(int thread) {
  const dim3& i = fibers[size_t(thread)].index;
  return "thread (" + std::to_string(i.x) + ", " + std::to_string(i.y) + ")";
}

void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#endif
}
void finish_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** bottom, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, bottom, size);
#endif
}

void to_scheduler(bool ended) {
  Fiber& self = fibers[size_t(current)];
  start_switch(ended ? nullptr : &self.sanitizer_stack, scheduler_stack_bottom, scheduler_stack_size);
  swapcontext(&self.context, &scheduler);
  finish_switch(self.sanitizer_stack, &scheduler_stack_bottom, &scheduler_stack_size);
}

void fiber_main() {
  finish_switch(nullptr, &scheduler_stack_bottom, &scheduler_stack_size);
  (*body)();
  fibers[size_t(current)].state = State::kEnded;
  to_scheduler(true);
}

void resume(int thread) {
  Fiber& fiber = fibers[size_t(thread)];
  current = thread;
  threadIdx = fiber.index;
  start_switch(&scheduler_sanitizer_stack, fiber.stack, kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  finish_switch(scheduler_sanitizer_stack, nullptr, nullptr);
}

void fail(const std::string& what) {
  if (failure.empty()) failure = what;
}

// Leaves a fiber that broke a rule where it is: the launch ends without it.
void fail_here(const std::string& what) {
  fail(thread_name(current) + " of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
       "): " + what);
  to_scheduler(false);
}

// Serves the shuffle that `thread` waits at, once all lanes of its mask do.
bool serve_shuffle(int thread) {
  const Fiber& first = fibers[size_t(thread)];
  const int warp = thread / 32 * 32;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(first.mask >> lane & 1)) continue;
    if (warp + lane >= threads) return fail("a shuffle's mask names lanes beyond the block"), false;
    const Fiber& other = fibers[size_t(warp + lane)];
    if (other.state == State::kEnded) return fail("a shuffle's mask names a thread that has ended"), false;
    if (other.state != State::kAtShuffle) return false;
    if (other.mask != first.mask || other.offset != first.offset)
      return fail("lanes of one warp meet at shuffles of different masks or offsets"), false;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(first.mask >> lane & 1)) continue;
    Fiber& fiber = fibers[size_t(warp + lane)];
    const int source = lane ^ fiber.offset;
    if (source > 31 || !(first.mask >> source & 1)) return fail("a shuffle takes from a lane outside its mask"), false;
    fiber.taken = fibers[size_t(warp + source)].given;
  }
  const uint32_t mask = first.mask;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) fibers[size_t(warp + lane)].state = State::kReady;
  return true;
}

void release_barrier() {
  ++epoch;
  for (int t = 0; t < threads; ++t)
    if (fibers[size_t(t)].state == State::kAtBarrier) fibers[size_t(t)].state = State::kReady;
}

std::vector<int64_t> order_of(int64_t n, std::mt19937_64& random) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[size_t(i)] = settings.order == Order::kDescending ? n - 1 - i : i;
  if (settings.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

void prepare(Fiber& fiber, dim3 index) {
  fiber.state = State::kReady;
  fiber.sanitizer_stack = nullptr;
  fiber.index = index;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, fiber_main, 0);
}

void run_block(std::mt19937_64& random) {
  ++epoch;
  ++block_number;
  for (int t = 0; t < threads; ++t)
    prepare(fibers[size_t(t)], dim3(unsigned(t) % blockDim.x, unsigned(t) / blockDim.x));
  for (;;) {
    int ended = 0, at_barrier = 0;
    bool moved = false;
    for (const int64_t t : order_of(threads, random)) {
      Fiber& fiber = fibers[size_t(t)];
      if (fiber.state == State::kAtShuffle) serve_shuffle(int(t));
      if (fiber.state == State::kReady) {
        resume(int(t));
        moved = true;
      }
      if (!failure.empty()) return;
    }
    for (int t = 0; t < threads; ++t) {
      ended += fibers[size_t(t)].state == State::kEnded;
      at_barrier += fibers[size_t(t)].state == State::kAtBarrier;
    }
    if (ended == threads) return;
    if (ended + at_barrier == threads) {
      release_barrier();
    } else if (!moved) {
      return fail("threads wait at different places: a barrier or a shuffle that not all of them reach");
    }
  }
}

}  // namespace

void barrier() {
  fibers[size_t(current)].state = State::kAtBarrier;
  to_scheduler(false);
}

float shuffle_xor(uint32_t mask, float x, int offset) {
  Fiber& self = fibers[size_t(current)];
  if (!(mask >> current % 32 & 1)) fail_here("is not in the mask of its own shuffle");
  self.mask = mask;
  self.offset = offset;
  self.given = x;
  self.state = State::kAtShuffle;
  to_scheduler(false);
  return self.taken;
}

constexpr int kSeveral = -2;

void read_cell(Cell& cell) {
  if (cell.block != block_number) fail_here("reads shared memory that no thread of its block has written");
  if (cell.written_in == epoch && cell.writer != current)
    fail_here("reads shared memory that " + thread_name(cell.writer) + " wrote since the last barrier");
  cell.reader = cell.read_in == epoch && cell.reader != current ? kSeveral : current;
  cell.read_in = epoch;
}

void write_cell(Cell& cell) {
  if (cell.block == block_number) {
    if (cell.written_in == epoch && cell.writer != current)
      fail_here("writes shared memory that " + thread_name(cell.writer) + " wrote since the last barrier");
    if (cell.read_in == epoch && cell.reader != current)
      fail_here("writes shared memory that another thread read since the last barrier");
  }
  cell.block = block_number;
  cell.writer = current;
  cell.written_in = epoch;
}

const char* run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  threads = int(block.x * block.y * block.z);
  if (threads < 1 || threads > 1024 || block.z != 1 || !grid.x || !grid.y || grid.y > 65535 || grid.z > 65535)
    return "invalid configuration argument";
  while (fibers.size() < size_t(threads)) {
    Fiber fiber = {};
    void* memory = mmap(nullptr, kStackBytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(memory, 4096, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + 4096;
    fibers.push_back(fiber);
  }
  body = &kernel;
  blockDim = block;
  gridDim = grid;
  failure.clear();
  std::mt19937_64 random(settings.seed);
  for (const int64_t b : order_of(int64_t(grid.x) * grid.y * grid.z, random)) {
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    run_block(random);
    if (!failure.empty()) return failure.c_str();
  }
  return nullptr;
}

int resident_blocks(const void* kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  static std::map<const void*, int> blocks;
  return blocks.emplace(kernel, 2 + int(blocks.size() % 3)).first->second;
}

}  // namespace internvit::cuda::host
