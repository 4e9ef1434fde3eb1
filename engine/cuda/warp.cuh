// What a warp of an NVIDIA GPU since Ampere (compute capability 8.0) does as one, in PTX. The tests have a header of
// the same functions for a CPU.

typedef unsigned int u32;

// Sixteen bytes, or as many zeros, on their way from global to shared memory; wait_for_copies awaits a thread's own.
__device__ __forceinline__ void copy_16_bytes(char* shared, const void* global, bool there) {
    const u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The factor A of a product of 16 x 16, whose rows of 16 bytes begin where the lanes say: rows 0 to 7 and 8 to 15 of
// its left half, then of its right half.
__device__ __forceinline__ void load_matrix(u32 (&a)[4], const char* row) {
    const u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(from)
                 : "memory");
}

// The same of 16 x 8: lanes 0 to 15 say where rows begin.
__device__ __forceinline__ void load_half_matrix(u32 (&a)[4], const char* row) {
    const u32 from = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(a[0]), "=r"(a[1])
                 : "r"(from)
                 : "memory");
}

// sum += A (16 x 16) x B (16 x 8), FP16 in, FP32 out.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sum += A (16 x 8) x B (8 x 8).
__device__ __forceinline__ void multiply_add_half(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// Two numbers as one word of FP16, the first in its lower half; and back.
__device__ __forceinline__ u32 halves_of(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ void floats_of(u32 both, float& low, float& high) {
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(both));
}

__device__ __forceinline__ float sum_with_lane(float value, int distance) {
    return value + __shfl_xor_sync(0xffffffffu, value, distance);
}
