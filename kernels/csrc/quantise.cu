// Quantise while gathering, dequantise while scattering: an engine's paged cache of float32,
// float16 or bfloat16 against chunks of 8- or 4-bit codes.
//
// kvtier_quantise_S_D and kvtier_dequantise_S_D, for a scheme S and a type D. What the codes mean,
// where they are in a chunk, and how far a value can be off: kernels/quantised.py. The schemes are
// KIVI's (Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024): keys
// by channel, over a group of tokens; values by token, over the channels of a head.
//
// One thread quantises two adjacent channels of a group of keys, or one token of values: it reads
// them twice, for the range and for the codes. One thread dequantises eight channels of a token,
// keys and values.
//
// The job, in 64-bit words:
//    0      items
//    1      of which key items, which come first (0 to dequantise)
//    2..4   heads: extent, multiplier, shift (grid.cuh)
//    5..7   layers, likewise
//    8..10  tokens of a chunk, likewise
//   11..13  tokens of a block, likewise
//   14..16  groups of tokens, likewise
//   17..19  channels of a head in steps: of 2 to quantise, of 8 to dequantise, likewise
//   20      channels of a head
//   21      tokens of a group
//   22      1 where eight channels can be moved in words of 16 bytes
//   23, 24  bytes from one token of a block to the next in the cache, and from one head to the next
//   25      bytes of a chunk's record of one layer and head
//   26..30  where in a record these begin: codes of values, minima of keys, minima of values,
//           scales of keys, scales of values; codes of keys are at 0
//   31..33  number of the word at which the chunks begin, their first tokens, and the blocks
//   34...   addresses in the cache of each layer's keys and values
//   then    addresses of the chunks
//   then    of each chunk, the first token to dequantise
//   then    of each chunk, for each block, bytes from a plane's address to it
#include "numbers.cuh"

enum QuantisedJob {
    QUANTISED_ITEMS = 0,
    QUANTISED_KEY_ITEMS = 1,
    QUANTISED_HEADS = 2,
    QUANTISED_LAYERS = 5,
    QUANTISED_TOKENS = 8,
    QUANTISED_BLOCK = 11,
    QUANTISED_GROUPS = 14,
    QUANTISED_STEPS = 17,
    QUANTISED_CHANNELS = 20,
    QUANTISED_GROUP_TOKENS = 21,
    QUANTISED_WIDE = 22,
    QUANTISED_TOKEN_BYTES = 23,
    QUANTISED_HEAD_BYTES = 24,
    QUANTISED_RECORD_BYTES = 25,
    QUANTISED_VALUE_CODES = 26,
    QUANTISED_KEY_MINIMA = 27,
    QUANTISED_VALUE_MINIMA = 28,
    QUANTISED_KEY_SCALES = 29,
    QUANTISED_VALUE_SCALES = 30,
    QUANTISED_CHUNKS_AT = 31,
    QUANTISED_FIRST_AT = 32,
    QUANTISED_BLOCKS_AT = 33,
    QUANTISED_BASES_AT = 34,
};

// One layer and head of one chunk: where its record is, and where its tokens are in the cache.
struct Place {
    const long long* __restrict__ job;
    const long long* __restrict__ offsets;  // of the chunk's blocks
    Extent block;
    long long record;
    long long first_token;  // to dequantise
    long long base[2];  // of keys, of values; with the head

    __device__ __forceinline__ Place(const long long* __restrict__ words, unsigned rest)
        : job(words), offsets(words), block(words + QUANTISED_BLOCK) {
        const Extent heads(job + QUANTISED_HEADS), layers(job + QUANTISED_LAYERS);
        const long long head = heads.take(rest);
        const long long layer = layers.take(rest);
        const long long chunk = rest;
        const long long tokens = job[QUANTISED_TOKENS];
        const long long blocks = (tokens + block.count - 1) / block.count;
        offsets += job[QUANTISED_BLOCKS_AT] + chunk * blocks;
        first_token = job[job[QUANTISED_FIRST_AT] + chunk];
        record = job[job[QUANTISED_CHUNKS_AT] + chunk] +
                 (layer * heads.count + head) * job[QUANTISED_RECORD_BYTES];
        for (int plane = 0; plane < 2; ++plane) {
            base[plane] = job[QUANTISED_BASES_AT + 2 * layer + plane] +
                          head * job[QUANTISED_HEAD_BYTES];
        }
    }

    // Bytes from a plane's base to a token.
    __device__ __forceinline__ long long token(unsigned token) const {
        unsigned rest = token;
        const long long within = block.take(rest);
        return offsets[rest] + within * job[QUANTISED_TOKEN_BYTES];
    }
};

// The finite numbers' range, and from it what turns a number into a code.
struct Range {
    float least = __uint_as_float(0x7F800000u);  // infinite
    float most = __uint_as_float(0xFF800000u);

    __device__ __forceinline__ void add(float value) {
        if (!is_finite(value)) return;
        least = value < least ? value : least;
        most = value > most ? value : most;
    }
};

// A code is nearest((x - minimum) / scale). All is done on halves, so that no difference of two
// finite numbers overflows.
template <unsigned levels>
struct Coder {
    float minimum;  // of the range; 0 where nothing is finite
    unsigned scale; // as the bits of a bfloat16
    float half_minimum;
    float inverse;  // of half the scale; 0 where the scale is

    __device__ __forceinline__ explicit Coder(const Range& range) {
        const bool any = range.least <= range.most;
        minimum = any ? __fadd_rn(range.least, 0.0f) : 0.0f;  // -0 becomes 0
        half_minimum = __fmul_rn(minimum, 0.5f);
        scale = 0;
        inverse = 0.0f;
        if (!any || range.least == range.most) return;
        const float half = __fsub_rn(__fmul_rn(range.most, 0.5f), half_minimum);
        const float exact = __fdiv_rn(half, static_cast<float>(levels) * 0.5f);
        const float bounded = exact > 0x1p-125f ? exact : 0x1p-125f;  // its inverse is finite
        scale = (__float_as_uint(bounded) + 0xFFFFu) >> 16;           // up to a bfloat16
        inverse = __fdiv_rn(1.0f, __fmul_rn(__uint_as_float(scale << 16), 0.5f));
    }

    // What is not a number, or lies below, gets 0.
    __device__ __forceinline__ unsigned code(float value) const {
        const float difference = __fsub_rn(__fmul_rn(value, 0.5f), half_minimum);
        const float steps = __fmul_rn(difference, inverse);
        if (!(steps > 0.0f)) return 0;
        return steps < static_cast<float>(levels) ? static_cast<unsigned>(nearest(steps)) : levels;
    }

    // To the nearest integer, even where two are, of 0 to 255.
    static __device__ __forceinline__ float nearest(float steps) {
        return __fsub_rn(__fadd_rn(steps, 0x1p23f), 0x1p23f);
    }
};

template <typename Number>
static __device__ __forceinline__ float decoded(unsigned code, float minimum, float scale) {
    const float offset = __fmul_rn(static_cast<float>(code), __fmul_rn(scale, 0.5f));
    const float half = __fadd_rn(__fmul_rn(minimum, 0.5f), offset);
    const float most = __fmul_rn(__uint_as_float(Number::LARGEST), 0.5f);
    // Rounding the scale up may have led beyond what the type can hold.
    return __fmul_rn(half > most ? most : half, 2.0f);
}

template <unsigned bits>
static __device__ __forceinline__ long long code_bytes(long long channels) {
    return bits == 8 ? channels : (channels + 1) / 2;
}

template <typename Number, unsigned bits>
static __device__ __forceinline__ void quantise_keys(const long long* __restrict__ job,
                                                     unsigned item) {
    constexpr unsigned LOADS = 8;  // tokens in flight
    using Bits = typename Number::Bits;
    const Extent groups(job + QUANTISED_GROUPS), pairs(job + QUANTISED_STEPS);
    const unsigned channels = static_cast<unsigned>(job[QUANTISED_CHANNELS]);
    unsigned rest = item;
    const unsigned channel = 2 * pairs.take(rest);
    const unsigned group = groups.take(rest);
    const Place place(job, rest);
    const bool both = channel + 1 < channels;
    const unsigned size = static_cast<unsigned>(job[QUANTISED_GROUP_TOKENS]);
    const unsigned tokens = static_cast<unsigned>(job[QUANTISED_TOKENS]);
    const unsigned begin = group * size;
    const unsigned end = begin + size < tokens ? begin + size : tokens;
    const long long column = place.base[0] + channel * static_cast<long long>(sizeof(Bits));

    Range range[2];
    for (unsigned first = begin; first < end; first += LOADS) {
        float held[LOADS][2];
#pragma unroll
        for (unsigned k = 0; k < LOADS; ++k) {
            const unsigned token = first + k < end ? first + k : end - 1;  // the last one again
            const Bits* from = at<const Bits>(column + place.token(token));
            held[k][0] = Number::widen(from[0]);
            held[k][1] = both ? Number::widen(from[1]) : 0.0f;
        }
#pragma unroll
        for (unsigned k = 0; k < LOADS; ++k) {
            range[0].add(held[k][0]);
            range[1].add(held[k][1]);
        }
    }

    const Coder<(1u << bits) - 1> coders[2] = {Coder<(1u << bits) - 1>(range[0]),
                                               Coder<(1u << bits) - 1>(range[1])};
    const long long in_group = static_cast<long long>(group) * channels + channel;
    Bits* minima = at<Bits>(place.record + job[QUANTISED_KEY_MINIMA]) + in_group;
    unsigned short* scales =
        at<unsigned short>(place.record + job[QUANTISED_KEY_SCALES]) + in_group;
    for (unsigned k = 0; k < 2; ++k) {
        if (channel + k >= channels) continue;
        minima[k] = Number::narrow(coders[k].minimum);
        scales[k] = static_cast<unsigned short>(coders[k].scale);
    }

    const long long row = code_bytes<bits>(channels);
    for (unsigned first = begin; first < end; first += LOADS) {
        unsigned codes[LOADS][2];
#pragma unroll
        for (unsigned k = 0; k < LOADS; ++k) {
            const unsigned token = first + k < end ? first + k : end - 1;
            const Bits* from = at<const Bits>(column + place.token(token));
            codes[k][0] = coders[0].code(Number::widen(from[0]));
            codes[k][1] = both ? coders[1].code(Number::widen(from[1])) : 0;
        }
#pragma unroll
        for (unsigned k = 0; k < LOADS; ++k) {
            if (first + k >= end) continue;
            unsigned char* to = at<unsigned char>(place.record + (first + k) * row);
            if (bits == 4) {
                to[channel / 2] = static_cast<unsigned char>(codes[k][0] | codes[k][1] << 4);
            } else {
                to[channel] = static_cast<unsigned char>(codes[k][0]);
                if (both) to[channel + 1] = static_cast<unsigned char>(codes[k][1]);
            }
        }
    }
}

template <typename Number, unsigned bits>
static __device__ __forceinline__ void quantise_values(const long long* __restrict__ job,
                                                       unsigned item) {
    using Bits = typename Number::Bits;
    const Extent tokens(job + QUANTISED_TOKENS);
    const unsigned channels = static_cast<unsigned>(job[QUANTISED_CHANNELS]);
    const bool wide = job[QUANTISED_WIDE] != 0;
    unsigned rest = item;
    const unsigned token = tokens.take(rest);
    const Place place(job, rest);
    const long long from = place.base[1] + place.token(token);

    Range range;
    for (unsigned first = 0; first < channels; first += EIGHT) {
        float held[EIGHT];
        load8<Number>(from + first * sizeof(Bits), channels - first, wide, held);
#pragma unroll
        for (unsigned k = 0; k < EIGHT; ++k) {
            if (k < channels - first) range.add(held[k]);
        }
    }

    const Coder<(1u << bits) - 1> coder(range);
    at<Bits>(place.record + job[QUANTISED_VALUE_MINIMA])[token] = Number::narrow(coder.minimum);
    at<unsigned short>(place.record + job[QUANTISED_VALUE_SCALES])[token] =
        static_cast<unsigned short>(coder.scale);

    const long long to =
        place.record + job[QUANTISED_VALUE_CODES] + token * code_bytes<bits>(channels);
    for (unsigned first = 0; first < channels; first += EIGHT) {
        float held[EIGHT];
        unsigned codes[EIGHT];
        load8<Number>(from + first * sizeof(Bits), channels - first, wide, held);
#pragma unroll
        for (unsigned k = 0; k < EIGHT; ++k) {
            codes[k] = k < channels - first ? coder.code(held[k]) : 0;
        }
        store_codes<bits>(to + first * bits / 8, channels - first, wide, codes);
    }
}

template <typename Number, unsigned bits>
static __device__ __forceinline__ void quantise(const long long* __restrict__ job) {
    const unsigned items = static_cast<unsigned>(job[QUANTISED_ITEMS]);
    const unsigned key_items = static_cast<unsigned>(job[QUANTISED_KEY_ITEMS]);
    for (unsigned item = this_thread(); item < items; item += all_threads()) {
        if (item < key_items) {
            quantise_keys<Number, bits>(job, item);
        } else {
            quantise_values<Number, bits>(job, item - key_items);
        }
    }
}

template <typename Number, unsigned bits>
static __device__ __forceinline__ void dequantise(const long long* __restrict__ job) {
    using Bits = typename Number::Bits;
    const Extent steps(job + QUANTISED_STEPS), tokens(job + QUANTISED_TOKENS);
    const unsigned items = static_cast<unsigned>(job[QUANTISED_ITEMS]);
    const unsigned channels = static_cast<unsigned>(job[QUANTISED_CHANNELS]);
    const unsigned group_tokens = static_cast<unsigned>(job[QUANTISED_GROUP_TOKENS]);
    const bool wide = job[QUANTISED_WIDE] != 0;

    for (unsigned item = this_thread(); item < items; item += all_threads()) {
        unsigned rest = item;
        const unsigned first = EIGHT * steps.take(rest);
        const unsigned token = tokens.take(rest);
        const Place place(job, rest);
        if (token < place.first_token) continue;
        const unsigned count = channels - first;
        const long long codes_at = token * code_bytes<bits>(channels) + first * bits / 8;
        const long long to = place.token(token) + first * static_cast<long long>(sizeof(Bits));
        const long long in_group =
            static_cast<long long>(token / group_tokens) * channels + first;

        unsigned key_codes[EIGHT], value_codes[EIGHT];
        float minima[EIGHT], scales[EIGHT], keys[EIGHT], values[EIGHT];
        load_codes<bits>(place.record + codes_at, count, wide, key_codes);
        load_codes<bits>(place.record + job[QUANTISED_VALUE_CODES] + codes_at, count, wide,
                         value_codes);
        const long long elements = in_group * static_cast<long long>(sizeof(Bits));
        load8<Number>(place.record + job[QUANTISED_KEY_MINIMA] + elements, count, wide, minima);
        load8<BFloat16>(place.record + job[QUANTISED_KEY_SCALES] + 2 * in_group, count, wide,
                        scales);
        const float minimum =
            Number::widen(at<const Bits>(place.record + job[QUANTISED_VALUE_MINIMA])[token]);
        const float scale = BFloat16::widen(
            at<const unsigned short>(place.record + job[QUANTISED_VALUE_SCALES])[token]);
#pragma unroll
        for (unsigned k = 0; k < EIGHT; ++k) {
            keys[k] = decoded<Number>(key_codes[k], minima[k], scales[k]);
            values[k] = decoded<Number>(value_codes[k], minimum, scale);
        }
        store8<Number>(place.base[0] + to, count, wide, keys);
        store8<Number>(place.base[1] + to, count, wide, values);
    }
}

#define KVTIER_QUANTISED(bits, dtype, Number)                                              \
    extern "C" __global__ void kvtier_quantise_int##bits##_##dtype(const long long* job) {  \
        quantise<Number, bits>(job);                                                        \
    }                                                                                       \
    extern "C" __global__ void kvtier_dequantise_int##bits##_##dtype(const long long* job) { \
        dequantise<Number, bits>(job);                                                      \
    }

KVTIER_QUANTISED(8, float32, Float32)
KVTIER_QUANTISED(8, float16, Float16)
KVTIER_QUANTISED(8, bfloat16, BFloat16)
KVTIER_QUANTISED(4, float32, Float32)
KVTIER_QUANTISED(4, float16, Float16)
KVTIER_QUANTISED(4, bfloat16, BFloat16)
