// What sm_90a offers beyond CUDA C++, an instruction per function: barriers in shared memory, the copy
// engine, matrix products of a warp group. Names and layouts are those of the PTX ISA (mbarrier,
// cp.async.bulk.tensor, wgmma, setmaxnreg). Included by *_cuda.cu only.
//
// tests/cuda/emulated_hopper.h stands in for the instructions where kernels run on a CPU: the same
// declarations, so a change of one is a change of both.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#define MOCO_FAST_PTX static __device__ __forceinline__

#if defined(MOCO_FAST_EMULATED)
#include "emulated_hopper.h"
#else

namespace moco_fast::hopper {

MOCO_FAST_PTX uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// The shared memory that the launch asked for.
MOCO_FAST_PTX char* dynamic_shared() {
    extern __shared__ __align__(1024) char bytes[];
    return bytes;
}

// --- barriers: a phase ends with the last of the arrivals and of the bytes that are expected ---

using Barrier = uint64_t;

MOCO_FAST_PTX void init(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// What this thread wrote to shared memory, before products or the copy engine read it.
MOCO_FAST_PTX void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// After init(), before a barrier is used by another thread of the cluster or by the copy engine.
MOCO_FAST_PTX void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish_writes();
}

MOCO_FAST_PTX void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

MOCO_FAST_PTX void arrive_expecting(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Until the phase of this parity has ended; the one before the first counts as ended.
MOCO_FAST_PTX void wait(Barrier* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@ended bra done;\n"
        "bra again;\n"
        "done:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Barriers 1 to 15 of a block, for some of its warps; barrier 0 is __syncthreads().
MOCO_FAST_PTX void sync_warps(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

MOCO_FAST_PTX void arrive_warps(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- clusters ---

// All threads of a cluster: what was written before arriving can be read after waiting.
MOCO_FAST_PTX void arrive_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
MOCO_FAST_PTX void wait_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address of a block's shared memory as another block of the cluster sees it.
template <class T>
MOCO_FAST_PTX const T* shared_of(int block, const T* own) {
    const T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(block));
    return there;
}

// --- the copy engine ---

// A box of a matrix, beginning at this row and column, to shared memory; zeros beyond the matrix.
MOCO_FAST_PTX void copy_box(void* to, const CUtensorMap* matrix, int row, int column, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(matrix), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}

MOCO_FAST_PTX void prefetch(const CUtensorMap* matrix) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(matrix) : "memory");
}

// --- registers: all warps of a warp group together ---

template <int Registers>
MOCO_FAST_PTX void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
MOCO_FAST_PTX void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// --- products of a warp group, asynchronous ---

// Before the first product after registers that it reads or adds to were written.
MOCO_FAST_PTX void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

MOCO_FAST_PTX void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most so many groups committed by this warp group are unfinished.
template <int Groups>
MOCO_FAST_PTX void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}

// Tells the compiler that products may have written these registers: no use of them moves above this.
MOCO_FAST_PTX void written_by_products(float (&registers)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

struct F16 {
    // Two values in a register, the first in the low half.
    MOCO_FAST_PTX uint32_t pair(float low, float high) {
        uint32_t both;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        return both;
    }
};

struct Bf16 {
    MOCO_FAST_PTX uint32_t pair(float low, float high) {
        uint32_t both;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        return both;
    }
};

#define MOCO_FAST_OUT8(d, i)                                                                    \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOCO_FAST_OUT64(d)                                                                    \
    MOCO_FAST_OUT8(d, 0), MOCO_FAST_OUT8(d, 8), MOCO_FAST_OUT8(d, 16), MOCO_FAST_OUT8(d, 24), \
        MOCO_FAST_OUT8(d, 32), MOCO_FAST_OUT8(d, 40), MOCO_FAST_OUT8(d, 48), MOCO_FAST_OUT8(d, 56)
#define MOCO_FAST_NAMES64                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "  \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "  \
    "%59, %60, %61, %62, %63}"

// d (64, 128) <- or += a (64, 16) b (128, 16)^T: rows of both in shared memory, summed over their columns.
#define MOCO_FAST_ROWS_BY_ROWS(Type, type)                                                     \
    MOCO_FAST_PTX void rows_by_rows(Type, float (&d)[64], uint64_t a, uint64_t b, bool add) {  \
        asm volatile(                                                                          \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                   \
            "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " MOCO_FAST_NAMES64 \
            ", %64, %65, add, 1, 1, 0, 0;\n}"                                                  \
            : MOCO_FAST_OUT64(d)                                                               \
            : "l"(a), "l"(b), "r"(int(add)));                                                  \
    }

// d (64, 128) += a (64, 16) b (16, 128): a in registers, rows of b in shared memory, summed over them.
#define MOCO_FAST_REGISTERS_BY_COLUMNS(Type, type)                                                      \
    MOCO_FAST_PTX void registers_by_columns(Type, float (&d)[64], const uint32_t* a, uint64_t b) {      \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " MOCO_FAST_NAMES64 \
                     ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                         \
                     : MOCO_FAST_OUT64(d)                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
    }

MOCO_FAST_ROWS_BY_ROWS(F16, "f16")
MOCO_FAST_ROWS_BY_ROWS(Bf16, "bf16")
MOCO_FAST_REGISTERS_BY_COLUMNS(F16, "f16")
MOCO_FAST_REGISTERS_BY_COLUMNS(Bf16, "bf16")

#undef MOCO_FAST_REGISTERS_BY_COLUMNS
#undef MOCO_FAST_ROWS_BY_ROWS
#undef MOCO_FAST_NAMES64
#undef MOCO_FAST_OUT64
#undef MOCO_FAST_OUT8

MOCO_FAST_PTX float root_fast(float x) {
    float y;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

MOCO_FAST_PTX float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// exp2 to 2 ulp.
MOCO_FAST_PTX float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace moco_fast::hopper

#endif

namespace moco_fast::hopper {

MOCO_FAST_PTX void sync_cluster() {
    arrive_cluster();
    wait_cluster();
}

// Where a matrix of 16-bit values lies in shared memory, for the matrix units: rows of 128 bytes, whose eight
// 16-byte pieces are permuted by the row's number modulo 8 (the copy engine's 128-byte swizzle). Eight rows
// are 1024 bytes; `blocks` is the distance in bytes between blocks of 64 columns, where columns are the
// dimension that is not summed over.
MOCO_FAST_PTX uint64_t matrix_at(const void* rows, int blocks) {
    const uint64_t swizzle128 = uint64_t(1) << 62, eight_rows = uint64_t(1024 >> 4) << 32;
    return swizzle128 | eight_rows | uint64_t(blocks >> 4) << 16 | (shared_address(rows) & 0x3ffff) >> 4;
}

// `bytes` further, a multiple of 16.
MOCO_FAST_PTX uint64_t further(uint64_t matrix, int bytes) { return matrix + uint64_t(bytes >> 4); }

}  // namespace moco_fast::hopper

#undef MOCO_FAST_PTX
