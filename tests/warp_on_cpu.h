// engine/cuda/warp.cuh for a CPU: a block's threads take turns, and wait for each other where a warp acts as one.
// What a matrix's elements are in which lane's registers is as the PTX manual has it (mma.m16n8k16, ldmatrix).

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __align__(bytes)

typedef uint32_t u32;
struct Index {
    int x = 0, y = 0, z = 0;
};
struct uint2 {
    u32 x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
using std::min;

static Index threadIdx, blockIdx, gridDim;
alignas(128) char ring[1 << 18];
static size_t ring_bytes;

struct Meeting {
    int arrived = 0, turn = 0;
};
struct Warp {
    Meeting meeting;
    int turn[32] = {};
    const char* row[2][32];
    u32 a[2][32][4], b[2][32][2];
    float number[2][32];
};
static Meeting block_meeting;
static std::vector<Warp> warps;
static std::vector<ucontext_t> fibres;
static ucontext_t scheduler;

static void refuse(const char* what) {
    std::fprintf(stderr, "warp_on_cpu: %s\n", what);
    std::abort();
}

static void meet(Meeting& meeting, int members) {
    const int turn = meeting.turn;
    if (++meeting.arrived == members) {
        meeting.arrived = 0;
        ++meeting.turn;
        return;
    }
    const int self = threadIdx.x;
    while (meeting.turn == turn) swapcontext(&fibres[self], &scheduler);
}

inline void __syncthreads() { meet(block_meeting, (int)fibres.size()); }

// Each lane's part goes into one of two places in turn, so that nobody overwrites what another has still to read.
static int lane() { return threadIdx.x % 32; }
static Warp& warp() { return warps[threadIdx.x / 32]; }
static int next_turn() { return ++warp().turn[lane()] % 2; }

inline void check_shared(const char* at, int bytes) {
    if (at < ring || at + bytes > ring + ring_bytes || (at - ring) % 16) refuse("shared memory out of bounds");
}

inline void copy_16_bytes(char* shared, const void* global, bool there) {
    check_shared(shared, 16);
    if (there) {
        std::memcpy(shared, global, 16);
    } else {
        std::memset(shared, 0, 16);
    }
}
inline void wait_for_copies() {}

inline void load_matrices(u32 (&a)[4], const char* row, int count) {
    const int turn = next_turn();
    warp().row[turn][lane()] = row;
    meet(warp().meeting, 32);
    for (int i = 0; i < count; ++i) {
        const char* from = warp().row[turn][8 * i + lane() / 4];
        check_shared(from, 16);
        std::memcpy(&a[i], from + 4 * (lane() % 4), 4);
    }
}
inline void load_matrix(u32 (&a)[4], const char* row) { load_matrices(a, row, 4); }
inline void load_half_matrix(u32 (&a)[4], const char* row) { load_matrices(a, row, 2); }

inline void floats_of(u32 both, float& low, float& high) {
    _Float16 halves[2];
    std::memcpy(halves, &both, 4);
    low = halves[0];
    high = halves[1];
}
inline u32 halves_of(float low, float high) {
    const _Float16 halves[2] = {(_Float16)low, (_Float16)high};
    u32 both;
    std::memcpy(&both, halves, 4);
    return both;
}
inline float half_of(u32 both, int which) {
    float value[2];
    floats_of(both, value[0], value[1]);
    return value[which];
}

inline void multiply_widths(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2], int width) {
    const int turn = next_turn();
    std::memcpy(warp().a[turn][lane()], a, width);
    std::memcpy(warp().b[turn][lane()], b, width / 2);
    meet(warp().meeting, 32);
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4 + 8 * (i / 2), column = 2 * (lane() % 4) + i % 2;
        for (int k = 0; k < width; ++k) {
            const int of_row = 4 * (row % 8) + k % 8 / 2, of_column = 4 * column + k % 8 / 2;
            sum[i] += half_of(warp().a[turn][of_row][row / 8 + 2 * (k / 8)], k % 2) *
                      half_of(warp().b[turn][of_column][k / 8], k % 2);
        }
    }
}
inline void multiply_add(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) { multiply_widths(sum, a, b, 16); }
inline void multiply_add_half(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) { multiply_widths(sum, a, b, 8); }

inline float sum_with_lane(float value, int distance) {
    const int turn = next_turn();
    warp().number[turn][lane()] = value;
    meet(warp().meeting, 32);
    return value + warp().number[turn][lane() ^ distance];
}

// Runs a kernel's blocks one after another; `thread` is what each of its threads does.
static void (*thread_of_kernel)();
static std::vector<char> done;
static void fibre() {
    thread_of_kernel();
    done[threadIdx.x] = 1;
}

static void run_blocks(Index grid, int threads, size_t shared_bytes, void (*thread)()) {
    constexpr size_t STACK = 1 << 16;
    if (shared_bytes > sizeof ring) refuse("more shared memory than a multiprocessor has");
    thread_of_kernel = thread;
    gridDim = grid;
    ring_bytes = shared_bytes;
    std::vector<char> stacks(threads * STACK);
    for (int i = 0; i < grid.x * grid.y * grid.z; ++i) {
        blockIdx.x = i % grid.x, blockIdx.y = i / grid.x % grid.y, blockIdx.z = i / grid.x / grid.y;
        std::memset(ring, 0xff, shared_bytes);  // not numbers, if anyone reads what nobody wrote
        block_meeting = {};
        warps.assign(threads / 32, {});
        fibres.assign(threads, {});
        done.assign(threads, 0);
        for (int j = 0; j < threads; ++j) {
            getcontext(&fibres[j]);
            fibres[j].uc_stack.ss_sp = stacks.data() + j * STACK;
            fibres[j].uc_stack.ss_size = STACK;
            fibres[j].uc_link = &scheduler;
            makecontext(&fibres[j], fibre, 0);
        }
        for (bool all = false; !all;) {
            all = true;
            for (int j = 0; j < threads; ++j) {
                if (done[j]) continue;
                all = false;
                threadIdx.x = j;
                swapcontext(&scheduler, &fibres[j]);
            }
        }
    }
}
