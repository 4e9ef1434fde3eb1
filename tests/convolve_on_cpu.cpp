// engine/cuda/convolve.cu on a CPU, thread by thread: what tests hold against PyTorch.

#include "warp_on_cpu.h"

#include "../src/anatomynet/engine/cuda/convolve.cu"

static Arguments arguments;

extern "C" void run(const Arguments* given, int x, int y, int z, size_t shared_bytes) {
    arguments = *given;
    Index grid;
    grid.x = x, grid.y = y, grid.z = z;
    if (shared_bytes != RING * PLANE_BYTES) refuse("launched with other than its ring of shared memory");
    run_blocks(grid, WARPS * 32, shared_bytes, [] { convolve(arguments); });
}
