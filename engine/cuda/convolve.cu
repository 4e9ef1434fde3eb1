// A 3 x 3 x 3 convolution of FP16 with sums in FP32, channels last, zeros around the volume, and what follows it.
//
// An implicit matrix product: a matrix A is sixteen voxels along x times sixteen channels. A block has a column of
// 16 x TILE_Y voxels and marches along z, PLANES slices at a step; the slices that it reads, and the next ones on their
// way, are a ring in shared memory, so that nearly every voxel is read once. There eight channels of a voxel (16 bytes)
// lie beside those of the next voxel: any sixteen voxels in a row are read without a conflict of banks, wherever they
// begin, which is what the neighbours in a convolution ask for. A matrix A, once read, is multiplied for all outputs of
// the warp (ROWS x PLANES) that it is a neighbour of, with weights that wait in registers.
//
// Set by who compiles: IN_A, IN_B channels in, of two volumes one after the other (IN_B may be 0), OUT channels out,
// WARPS of a block, ROWS of a warp, PLANES of a step, BLOCKS of a multiprocessor.

constexpr int IN = IN_A + IN_B, CHUNKS = IN / 8, TILES = OUT / 8, LANE_OUT = 2 * TILES;
constexpr int TILE_X = 16, TILE_Y = WARPS * ROWS, SIDE_X = TILE_X + 2, SIDE_Y = TILE_Y + 2;
constexpr int RING = 2 * PLANES + 2;
// A copy of a voxel goes to as many places as it has chunks, that far apart: not in one bank.
constexpr int CHUNK_BYTES = 16 * (SIDE_X * SIDE_Y + (10 - SIDE_X * SIDE_Y % 8) % 8);
constexpr int PLANE_BYTES = CHUNKS * CHUNK_BYTES;
constexpr int PAIRS = IN / 16;  // of chunks; an odd one is multiplied alone
static_assert(IN_A % 8 == 0 && IN_B % 8 == 0 && OUT % 8 == 0, "channels are in eights");

struct Arguments {
    const char *a, *b;      // FP16 (z, y, x, IN_A), (z, y, x, IN_B)
    const uint2* weights;   // as engine.gpu_convolution packs them
    const float* shift;     // (OUT,), or null: none
    const char* others;     // FP16 (z, y, x, OUT), added before LeakyReLU, or null
    char* out;              // FP16 (z, y, x, OUT)
    char* second;           // null, or FP16 (z, y, x, OUT / 2): out has the first half of the channels, this the rest,
                            // which no LeakyReLU has changed
    float* sums;            // (blocks, OUT): of what the convolution alone gives, or null
    int depth, height, width, slices;  // slices: of a block
    float slope;            // of LeakyReLU; 1: none
};

__device__ __forceinline__ void copy_plane(const Arguments& of, char* plane, int z, int y, int x) {
    const bool slice_there = z >= 0 && z < of.depth;
    for (int i = threadIdx.x; i < SIDE_X * SIDE_Y * CHUNKS; i += WARPS * 32) {
        const int voxel = i / CHUNKS, chunk = i % CHUNKS;
        const int at_y = y + voxel / SIDE_X - 1, at_x = x + voxel % SIDE_X - 1;
        const bool there = slice_there && at_y >= 0 && at_y < of.height && at_x >= 0 && at_x < of.width;
        const long long place = there ? ((long long)z * of.height + at_y) * of.width + at_x : 0;
        const char* from = IN_B == 0 || chunk < IN_A / 8 ? of.a + 2 * IN_A * place + 16 * chunk
                                                         : of.b + 2 * IN_B * place + 16 * (chunk - IN_A / 8);
        copy_16_bytes(plane + chunk * CHUNK_BYTES + 16 * voxel, from, there);
    }
}

// One neighbour along x and sixteen channels, or eight: of every slice and row that the warp's outputs reach.
template <bool HALF>
__device__ __forceinline__ void multiply(float (&sum)[PLANES][ROWS][TILES][4], const char* ring, int first, int offset,
                                         const uint2* weights) {
    u32 kernel[9][TILES][2];
#pragma unroll
    for (int i = 0; i < 9 * TILES; ++i) {
        const uint2 both = weights[32 * i];
        kernel[i / TILES][i % TILES][0] = both.x;
        kernel[i / TILES][i % TILES][1] = both.y;
    }
#pragma unroll
    for (int plane = 0; plane < PLANES + 2; ++plane) {
        const int slot = first + plane < RING ? first + plane : first + plane - RING;
        const char* rows = ring + slot * PLANE_BYTES + offset;
#pragma unroll
        for (int row = 0; row < ROWS + 2; ++row) {
            u32 a[4];
            HALF ? load_half_matrix(a, rows + 16 * SIDE_X * row) : load_matrix(a, rows + 16 * SIDE_X * row);
#pragma unroll
            for (int z = 0; z < PLANES; ++z) {
#pragma unroll
                for (int y = 0; y < ROWS; ++y) {
                    const int dz = plane - z, dy = row - y;
                    if (dz < 0 || dz > 2 || dy < 0 || dy > 2) continue;
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile) {
                        HALF ? multiply_add_half(sum[z][y][tile], a, kernel[3 * dz + dy][tile])
                             : multiply_add(sum[z][y][tile], a, kernel[3 * dz + dy][tile]);
                    }
                }
            }
        }
    }
}

// Of one voxel: LANE_OUT channels, one after the other, since the weights are packed for it.
__device__ __forceinline__ void finish(const Arguments& of, float (&value)[LANE_OUT], long long place, int lane_part,
                                       float (&total)[LANE_OUT]) {
    const int channel = lane_part * LANE_OUT;
#pragma unroll
    for (int i = 0; i < LANE_OUT; ++i) total[i] += value[i];
    if (of.shift) {
#pragma unroll
        for (int i = 0; i < LANE_OUT; ++i) value[i] += of.shift[channel + i];
    }
    if (of.others) {
        const u32* words = (const u32*)(of.others + 2 * (OUT * place + channel));
#pragma unroll
        for (int i = 0; i < LANE_OUT; i += 2) {
            float low, high;
            floats_of(words[i / 2], low, high);
            value[i] += low;
            value[i + 1] += high;
        }
    }
    const bool to_second = of.second && lane_part >= 2;
    u32 words[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        float low = value[2 * i], high = value[2 * i + 1];
        if (!to_second) {
            low = low > 0 ? low : low * of.slope;
            high = high > 0 ? high : high * of.slope;
        }
        words[i] = halves_of(low, high);
    }
    char* to = !of.second ? of.out + 2 * (OUT * place + channel)
                          : (to_second ? of.second : of.out) + OUT * place + 2 * (channel % (OUT / 2));
    if constexpr (TILES % 4 == 0) {
#pragma unroll
        for (int i = 0; i < TILES; i += 4) ((uint4*)to)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    } else if constexpr (TILES % 2 == 0) {
#pragma unroll
        for (int i = 0; i < TILES; i += 2) ((uint2*)to)[i / 2] = make_uint2(words[i], words[i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < TILES; ++i) ((u32*)to)[i] = words[i];
    }
}

// The block's sums, added up in a fixed order: the same volume has the same sums every time.
__device__ __forceinline__ void write_sums(const Arguments& of, float (&total)[LANE_OUT], char* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* of_warps = (float*)shared;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LANE_OUT; ++i) {
        for (int distance = 4; distance < 32; distance *= 2) total[i] = sum_with_lane(total[i], distance);
        if (lane < 4) of_warps[warp * OUT + lane * LANE_OUT + i] = total[i];
    }
    __syncthreads();
    const long long block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    for (int channel = threadIdx.x; channel < OUT; channel += WARPS * 32) {
        float sum = 0;
        for (int i = 0; i < WARPS; ++i) sum += of_warps[i * OUT + channel];
        of.sums[block * OUT + channel] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) convolve(const Arguments of) {
    extern __shared__ __align__(128) char ring[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int x = blockIdx.x * TILE_X, y = blockIdx.y * TILE_Y;
    const int from = blockIdx.z * of.slices, to = min(from + of.slices, of.depth);
    // Of matrix A: which of its rows this lane points to, and which half.
    const int own_row = 16 * (lane % 16) + lane / 16 * CHUNK_BYTES + 16 * SIDE_X * ROWS * warp;
    float total[LANE_OUT] = {};
    for (int i = 0; i < PLANES + 2; ++i) copy_plane(of, ring + i * PLANE_BYTES, from + i - 1, y, x);
    int first = 0;  // the ring's slot with slice z - 1
    for (int z = from; z < to; z += PLANES) {
        wait_for_copies();
        __syncthreads();  // all of this step's slices are there, and the last step's are read no more
        if (z + PLANES < to) {
            for (int i = 0; i < PLANES; ++i) {
                const int slot = (first + PLANES + 2 + i) % RING;
                copy_plane(of, ring + slot * PLANE_BYTES, z + PLANES + 1 + i, y, x);
            }
        }
        float sum[PLANES][ROWS][TILES][4] = {};
#pragma unroll 1
        for (int i = 0; i < 3 * PAIRS; ++i) {
            const int pair = i / 3, dx = i % 3;
            multiply<false>(sum, ring, first, own_row + 2 * pair * CHUNK_BYTES + 16 * dx,
                            of.weights + i * 9 * TILES * 32 + lane);
        }
        if constexpr (CHUNKS % 2 == 1) {
#pragma unroll 1
            for (int dx = 0; dx < 3; ++dx) {
                multiply<true>(sum, ring, first, own_row + 2 * PAIRS * CHUNK_BYTES + 16 * dx,
                               of.weights + (3 * PAIRS + dx) * 9 * TILES * 32 + lane);
            }
        }
#pragma unroll
        for (int i = 0; i < PLANES * ROWS * 2; ++i) {
            const int plane = i / (2 * ROWS), row = i / 2 % ROWS, upper = i % 2;
            const int at_x = x + lane / 4 + 8 * upper, at_y = y + warp * ROWS + row, at_z = z + plane;
            if (at_x >= of.width || at_y >= of.height || at_z >= to) continue;
            float value[LANE_OUT];
#pragma unroll
            for (int j = 0; j < LANE_OUT; ++j) value[j] = sum[plane][row][j / 2][2 * upper + j % 2];
            finish(of, value, ((long long)at_z * of.height + at_y) * of.width + at_x, lane % 4, total);
        }
        first = (first + PLANES) % RING;
    }
    if (of.sums) write_sums(of, total, ring);
}
