// Runs the CUDA sources of the kernel packages on a CPU, one thread block at a time, to check their logic without a GPU.
//
// Every CUDA thread is a fiber with its own stack. __syncthreads and the warp operations hand control to the next fiber
// until all that must arrive have arrived, so a missing or divergent barrier is an error and not luck. The order in
// which the fibers of a block take their turns is an argument: a result that depends on it betrays a race. Shared memory
// is filled with NaN before each block, and its arrays are fenced, so reads of what nobody wrote and writes past the end
// show. What this does not check: the hardware's own arithmetic (exp2 and division are the CPU's here), alignment faults,
// memory ordering between barriers, and speed.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// Under AddressSanitizer the fences between shared arrays are out of bounds for reads as well.
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#endif

#if !defined(__FLT16_MANT_DIG__)
#error "the CUDA emulator needs a compiler with _Float16"
#endif

#define DEVICE inline
#define KERNEL(name, Params, threads, ...) extern "C" void name(const Params &p)
#define SHARED_ARRAY(type, name, size) type *const name = emulated::shared_array<type>(size)
#define SHARED_BYTES(name) unsigned char *const name = emulated::dynamic_shared()

struct Index3 {
    int x, y, z;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr size_t STACK = 128 << 10, ARENA = 256 << 10;
constexpr int WARP = 32;
constexpr size_t FENCE = 64;
constexpr char FENCE_BYTE = 0x5a;

enum class Turn { RUN, WARP_WAIT, BLOCK_WAIT, DONE };

struct Fiber {
    ucontext_t context;
    Turn turn;
    int warp_operations;      // how many it has taken part in; all lanes of a warp must agree
    size_t shared_used;       // of the arena, by this fiber's SHARED_ARRAYs, which every fiber declares alike
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<char> stacks, arena;
    std::vector<uint32_t> exchanged;  // [warp operation parity][thread]
    std::vector<size_t> fences;
    size_t dynamic_bytes = 0;
    ucontext_t scheduler;
    void (*kernel)(const void *) = nullptr;
    const void *params = nullptr;
    int current = 0;
    const char *error = nullptr;
    sigjmp_buf trap;          // where a fault in a fiber leads
};
inline Block block;

inline Fiber &self() { return block.fibers[block.current]; }

inline void wait(Turn turn) {
    Fiber &fiber = self();
    fiber.turn = turn;
    swapcontext(&fiber.context, &block.scheduler);
}

// What follows a shared array: laid when the first fiber declares it, looked at when the block has ended.
inline void fence(size_t at) {
    for (size_t known : block.fences)
        if (known == at) return;
    block.fences.push_back(at);
    memset(block.arena.data() + at, FENCE_BYTE, FENCE);
    ASAN_POISON_MEMORY_REGION(block.arena.data() + at, FENCE);
}

inline bool fences_stand() {
    ASAN_UNPOISON_MEMORY_REGION(block.arena.data(), block.arena.size());
    for (size_t at : block.fences)
        for (size_t i = 0; i < FENCE; i++)
            if (block.arena[at + i] != FENCE_BYTE) return false;
    return true;
}

template <class T> T *shared_array(size_t count) {
    Fiber &fiber = self();
    const size_t start = fiber.shared_used, bytes = (count * sizeof(T) + 15) / 16 * 16;
    fiber.shared_used = start + bytes + FENCE;
    if (fiber.shared_used > ARENA) {
        fprintf(stderr, "the kernel wants more shared memory than the emulator has\n");
        abort();
    }
    fence(start + bytes);
    return reinterpret_cast<T *>(block.arena.data() + start);
}

inline unsigned char *dynamic_shared() {
    return reinterpret_cast<unsigned char *>(shared_array<char>(block.dynamic_bytes));
}

inline uint32_t exchange(uint32_t value, int other_lane) {
    Fiber &fiber = self();
    const size_t half = fiber.warp_operations++ % 2 * block.fibers.size();
    block.exchanged[half + block.current] = value;
    wait(Turn::WARP_WAIT);
    return block.exchanged[half + block.current / WARP * WARP + other_lane];
}

inline void start() {
    block.kernel(block.params);
    self().turn = Turn::DONE;
    swapcontext(&self().context, &block.scheduler);
}

// Lets waiting fibers go on if all of their warp, or of the block, wait. Returns whether any fiber can run.
inline bool release() {
    const int threads = static_cast<int>(block.fibers.size());
    bool any = false, all_at_barrier = true;
    for (int first = 0; first < threads; first += WARP) {
        bool whole = true;
        for (int i = first; i < first + WARP; i++) {
            const Fiber &fiber = block.fibers[i];
            whole &= fiber.turn == Turn::WARP_WAIT && fiber.warp_operations == block.fibers[first].warp_operations;
            all_at_barrier &= fiber.turn == Turn::BLOCK_WAIT;
        }
        if (whole) {
            for (int i = first; i < first + WARP; i++) block.fibers[i].turn = Turn::RUN;
            any = true;
        }
    }
    if (all_at_barrier) {
        for (Fiber &fiber : block.fibers) fiber.turn = Turn::RUN;
        any = true;
    }
    return any;
}

inline void prepare(Fiber &fiber, char *stack) {
    fiber.turn = Turn::RUN;
    fiber.warp_operations = 0;
    fiber.shared_used = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
}

inline void run_block(int order) {
    const int threads = static_cast<int>(block.fibers.size());
    ASAN_UNPOISON_MEMORY_REGION(block.arena.data(), block.arena.size());
    memset(block.arena.data(), 0xff, block.arena.size());
    block.fences.clear();
    for (int i = 0; i < threads; i++) prepare(block.fibers[i], block.stacks.data() + i * STACK);
    int done = 0;
    while (done < threads && block.error == nullptr) {
        bool ran = false;
        for (int turn = 0; turn < threads; turn++) {
            // 0: in order; 1: backwards; others: scattered, as 61 has no common factor with a power of two.
            const int i = order == 0 ? turn : order == 1 ? threads - 1 - turn : (turn * 61 + order * 17) % threads;
            if (block.fibers[i].turn != Turn::RUN) continue;
            ran = true;
            block.current = i;
            threadIdx = {i, 0, 0};
            swapcontext(&block.scheduler, &block.fibers[i].context);
            done += block.fibers[i].turn == Turn::DONE;
        }
        if (!release() && !ran) block.error = "threads of a block wait at different barriers, or some have left";
    }
    if (block.error == nullptr && !fences_stand()) block.error = "a write past the end of a shared array";
}

inline void run_grid(Index3 grid, int order) {
    for (int z = 0; z < grid.z; z++)
        for (int y = 0; y < grid.y; y++)
            for (int x = 0; x < grid.x && block.error == nullptr; x++) {
                blockIdx = {x, y, z};
                run_block(order);
            }
}

inline void fault(int) { siglongjmp(block.trap, 1); }

// Compiled-in checks (see cuda_emulation.py) end in SIGILL, wild addresses in SIGSEGV or SIGBUS.
inline void run_guarded(Index3 grid, int order) {
    constexpr int SIGNALS[] = {SIGILL, SIGSEGV, SIGBUS, SIGTRAP};
    struct sigaction action = {}, before[4];
    action.sa_handler = fault;
    action.sa_flags = SA_NODEFER;
    for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &action, &before[i]);
    if (sigsetjmp(block.trap, 1) == 0) {
        run_grid(grid, order);
    } else {
        block.error = "a fault: a misaligned or wild address, an index out of range, or an overflow";
    }
    for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &before[i], nullptr);
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::Turn::BLOCK_WAIT); }
inline void __syncwarp() { emulated::exchange(0, 0); }

inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return __uint_as_float(emulated::exchange(__float_as_uint(value), (threadIdx.x % emulated::WARP) ^ mask));
}

// One bit a lane.
inline unsigned __ballot_sync(unsigned, bool mine) {
    using emulated::block;
    const size_t half = emulated::self().warp_operations % 2 * block.fibers.size();
    emulated::exchange(mine, 0);
    const uint32_t *warp = block.exchanged.data() + half + block.current / emulated::WARP * emulated::WARP;
    unsigned bits = 0;
    for (int lane = 0; lane < emulated::WARP; lane++) bits |= warp[lane] << lane;
    return bits;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
// Fibers take turns only where they wait.
inline unsigned long long atomicAdd(unsigned long long *to, unsigned long long value) {
    const unsigned long long before = *to;
    *to += value;
    return before;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline float half_to_float(unsigned short bits) {
    _Float16 x;
    memcpy(&x, &bits, sizeof x);
    return static_cast<float>(x);
}
inline unsigned short float_to_half(float value) {
    const _Float16 x = static_cast<_Float16>(value);
    unsigned short bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float fast_exp2(float x) { return std::exp2(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline long long unhoisted(long long x) { return x; }
inline int unhoisted(int x) { return x; }

// Launch `kernel` with the argument struct at `params`; the answer is null, or what went wrong.
extern "C" const char *emulate(void (*kernel)(const void *), const void *params, int grid_x, int grid_y, int grid_z,
                               int threads, long long dynamic_bytes, int order) {
    using emulated::block;
    block.fibers.resize(threads);
    block.stacks.resize(threads * emulated::STACK);
    block.arena.resize(emulated::ARENA);
    block.exchanged.resize(2 * threads);
    block.dynamic_bytes = dynamic_bytes;
    block.kernel = kernel;
    block.params = params;
    block.error = nullptr;
    gridDim = {grid_x, grid_y, grid_z};
    blockDim = {threads, 1, 1};
    emulated::run_guarded(gridDim, order);
    return block.error;
}
