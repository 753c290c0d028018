// What every kernel starts from: its place in the grid, and the words of its job.
//
// A kernel's only argument is the address of its job: 64-bit integers. Each kernel loops over its
// items with the whole grid's stride, so any number of threads does all the work. Threads share
// nothing and never wait for each other: the same source also runs one thread after the other on a
// CPU (host_shim.h). Item numbers fit in 31 bits, which the host has checked; addresses have 64.
#pragma once

static __device__ __forceinline__ unsigned this_thread() {
    return blockIdx.x * blockDim.x + threadIdx.x;
}

static __device__ __forceinline__ unsigned all_threads() { return gridDim.x * blockDim.x; }

// All that a job names is global memory, and the compiler shall know it. A generic address that is
// in no other window is the global address (PTX ISA, "Generic addressing").
template <typename Item>
static __device__ __forceinline__ Item* at(long long address) {
    return static_cast<Item*>(__cvta_global_to_generic(static_cast<unsigned long>(address)));
}

// One extent of the items' index space, as three words of the job: the extent, and the multiplier
// and shift that divide by it. For every n < 2^31, n / extent == (n * multiplier) >> shift
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct Extent {
    unsigned count;
    unsigned multiplier;
    unsigned shift;

    __device__ __forceinline__ explicit Extent(const long long* __restrict__ words)
        : count(static_cast<unsigned>(words[0])),
          multiplier(static_cast<unsigned>(words[1])),
          shift(static_cast<unsigned>(words[2])) {}

    __device__ __forceinline__ unsigned divide(unsigned n) const {
        return static_cast<unsigned>((static_cast<unsigned long long>(n) * multiplier) >> shift);
    }

    // The index along this axis, the innermost left in `rest`, which loses it.
    __device__ __forceinline__ unsigned take(unsigned& rest) const {
        const unsigned quotient = divide(rest);
        const unsigned index = rest - quotient * count;
        rest = quotient;
        return index;
    }
};
