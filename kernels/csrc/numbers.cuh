// The element types of a cache, read as and written from float32.
//
// Written with integers and single float32 operations, each rounded to nearest even, and never
// contracted: so device, host and NumPy agree in every bit. Must not be built with fast math, which
// drops subnormal numbers.
#pragma once

#include "grid.cuh"

struct Float32 {
    using Bits = unsigned;
    static constexpr unsigned LARGEST = 0x7F7FFFFFu;  // largest finite value, as float32 bits

    static __device__ __forceinline__ float widen(Bits bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ Bits narrow(float value) { return __float_as_uint(value); }
};

struct BFloat16 {
    using Bits = unsigned short;
    static constexpr unsigned LARGEST = 0x7F7F0000u;

    static __device__ __forceinline__ float widen(Bits bits) {
        return __uint_as_float(static_cast<unsigned>(bits) << 16);
    }

    // Nearest even, of a finite value.
    static __device__ __forceinline__ Bits narrow(float value) {
        const unsigned bits = __float_as_uint(value);
        return static_cast<Bits>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    }
};

struct Float16 {
    using Bits = unsigned short;
    static constexpr unsigned LARGEST = 0x477FE000u;  // 65504

    static __device__ __forceinline__ float widen(Bits half) {
        const unsigned sign = static_cast<unsigned>(half & 0x8000u) << 16;
        const unsigned magnitude = static_cast<unsigned>(half & 0x7FFFu) << 13;
        if (magnitude >= 0x0F800000u) {  // infinite or not a number
            return __uint_as_float(sign | 0x7F800000u | (magnitude & 0x007FE000u));
        }
        const float shifted = __uint_as_float(magnitude);  // too small by 2^112, subnormals too
        return __uint_as_float(sign | __float_as_uint(__fmul_rn(shifted, 0x1p112f)));
    }

    // Nearest even, of a value of at most 65504.
    static __device__ __forceinline__ Bits narrow(float value) {
        const unsigned bits = __float_as_uint(value);
        const unsigned sign = (bits >> 16) & 0x8000u;
        const unsigned magnitude = bits & 0x7FFFFFFFu;
        if (magnitude < 0x38800000u) {  // subnormal in half: adding 0.5 rounds at its last place
            const float sum = __fadd_rn(__uint_as_float(magnitude), 0.5f);
            return static_cast<Bits>(sign | (__float_as_uint(sum) - 0x3F000000u));
        }
        const unsigned rounded = magnitude + 0x0FFFu + ((magnitude >> 13) & 1u);
        return static_cast<Bits>(sign | ((rounded - 0x38000000u) >> 13));
    }
};

static __device__ __forceinline__ bool is_finite(float value) {
    return (__float_as_uint(value) & 0x7F800000u) != 0x7F800000u;
}

static constexpr unsigned EIGHT = 8;

// Eight elements, of which `count` are there; `wide` where all are and the address allows 16 bytes.
template <typename Number>
static __device__ __forceinline__ void load8(long long address, unsigned count, bool wide,
                                             float (&values)[EIGHT]) {
    using Bits = typename Number::Bits;
    constexpr unsigned PER_WORD = 16 / sizeof(Bits);
    if (wide) {
#pragma unroll
        for (unsigned w = 0; w < EIGHT / PER_WORD; ++w) {
            const uint4 word = at<const uint4>(address)[w];
            const unsigned parts[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
            for (unsigned k = 0; k < PER_WORD; ++k) {
                const unsigned part = parts[k * sizeof(Bits) / 4];
                const unsigned shift = k * sizeof(Bits) % 4 * 8;
                values[w * PER_WORD + k] = Number::widen(static_cast<Bits>(part >> shift));
            }
        }
        return;
    }
#pragma unroll
    for (unsigned k = 0; k < EIGHT; ++k) {
        values[k] = k < count ? Number::widen(at<const Bits>(address)[k]) : 0.0f;
    }
}

template <typename Number>
static __device__ __forceinline__ void store8(long long address, unsigned count, bool wide,
                                              const float (&values)[EIGHT]) {
    using Bits = typename Number::Bits;
    constexpr unsigned PER_WORD = 16 / sizeof(Bits);
    if (wide) {
#pragma unroll
        for (unsigned w = 0; w < EIGHT / PER_WORD; ++w) {
            unsigned parts[4] = {0, 0, 0, 0};
#pragma unroll
            for (unsigned k = 0; k < PER_WORD; ++k) {
                const unsigned bits = Number::narrow(values[w * PER_WORD + k]);
                parts[k * sizeof(Bits) / 4] |= bits << (k * sizeof(Bits) % 4 * 8);
            }
            at<uint4>(address)[w] = uint4{parts[0], parts[1], parts[2], parts[3]};
        }
        return;
    }
#pragma unroll
    for (unsigned k = 0; k < EIGHT; ++k) {
        if (k < count) at<Bits>(address)[k] = Number::narrow(values[k]);
    }
}

// Codes of 8 bits, or of 4 with the even channel's in a byte's low half.
template <unsigned bits>
static __device__ __forceinline__ void load_codes(long long address, unsigned count, bool wide,
                                                  unsigned (&codes)[EIGHT]) {
    constexpr unsigned MASK = (1u << bits) - 1;
    unsigned words[2] = {0, 0};
    if (wide) {
        words[0] = at<const unsigned>(address)[0];
        if (bits == 8) words[1] = at<const unsigned>(address)[1];
    } else {
#pragma unroll
        for (unsigned k = 0; k < bits; ++k) {
            if (k * 8 >= count * bits) continue;
            const unsigned byte = at<const unsigned char>(address)[k];
            words[k / 4] |= byte << (k % 4 * 8);
        }
    }
#pragma unroll
    for (unsigned k = 0; k < EIGHT; ++k) {
        codes[k] = words[k * bits / 32] >> (k * bits % 32) & MASK;
    }
}

template <unsigned bits>
static __device__ __forceinline__ void store_codes(long long address, unsigned count, bool wide,
                                                   const unsigned (&codes)[EIGHT]) {
    unsigned words[2] = {0, 0};
#pragma unroll
    for (unsigned k = 0; k < EIGHT; ++k) words[k * bits / 32] |= codes[k] << (k * bits % 32);
    if (wide) {
        at<unsigned>(address)[0] = words[0];
        if (bits == 8) at<unsigned>(address)[1] = words[1];
        return;
    }
#pragma unroll
    for (unsigned k = 0; k < bits; ++k) {
        if (k * 8 >= count * bits) continue;
        at<unsigned char>(address)[k] = static_cast<unsigned char>(words[k / 4] >> (k % 4 * 8));
    }
}
