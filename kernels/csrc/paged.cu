// Gather and scatter: between an engine's paged cache and contiguous chunks, byte for byte.
//
// kvtier_gather_N copies from the cache to chunks, kvtier_scatter_N back, in words of N bytes: the
// widest that divides every address, stride and row of the job.
//
// A row is what is contiguous on both sides. A piece is what one block holds of one chunk. Words
// that differ in their plane only (a layer's keys, say) have the same offsets on both sides, so
// one thread finds a word's place once and moves it for PLANES_PER_ITEM planes, all loads before
// the first store. Consecutive threads take consecutive words.
//
// The job, in 64-bit words:
//    0      items: plane groups * pieces * outer * inner * words of a row
//    1      planes
//    2..4   words of a row: extent, multiplier, shift (grid.cuh)
//    5..7   inner: the one of token and head that is nearer in the chunk, likewise
//    8..10  outer: the other one, likewise
//   11..13  pieces, likewise
//   14      1 where inner is the token, 0 where it is the head
//   15, 16  bytes from one inner index to the next, in the chunk and in the cache
//   17, 18  the same for the outer index
//   19      number of the word at which the planes begin
//   20...   pieces, of 4 words: address in the chunk and bytes from the plane's address in the
//           cache, both of the block's first token; first token to move, and first not to move
//           any more, counted from the block's first
//   then    planes, of 2 words: address in the cache, bytes from the chunk's start
#include "grid.cuh"

enum PagedJob {
    PAGED_ITEMS = 0,
    PAGED_PLANES = 1,
    PAGED_ROW = 2,
    PAGED_INNER = 5,
    PAGED_OUTER = 8,
    PAGED_PIECES = 11,
    PAGED_INNER_IS_TOKEN = 14,
    PAGED_INNER_BYTES = 15,
    PAGED_OUTER_BYTES = 17,
    PAGED_PLANES_AT = 19,
    PAGED_PIECES_AT = 20,
};

static constexpr unsigned PLANES_PER_ITEM = 4;

template <typename Word, bool to_chunk>
static __device__ __forceinline__ void move_words(const long long* __restrict__ job) {
    const Extent row(job + PAGED_ROW), inner(job + PAGED_INNER), outer(job + PAGED_OUTER);
    const Extent pieces(job + PAGED_PIECES);
    const unsigned items = static_cast<unsigned>(job[PAGED_ITEMS]);
    const unsigned planes = static_cast<unsigned>(job[PAGED_PLANES]);
    const bool inner_is_token = job[PAGED_INNER_IS_TOKEN] != 0;

    for (unsigned item = this_thread(); item < items; item += all_threads()) {
        unsigned rest = item;
        const long long word = row.take(rest);
        const long long i = inner.take(rest);
        const long long o = outer.take(rest);
        const long long* piece = job + PAGED_PIECES_AT + 4 * pieces.take(rest);
        const unsigned first = rest * PLANES_PER_ITEM;
        const long long token = inner_is_token ? i : o;
        if (token < piece[2] || token >= piece[3]) continue;

        const long long bytes = word * static_cast<long long>(sizeof(Word));
        const long long in_chunk =
            piece[0] + i * job[PAGED_INNER_BYTES] + o * job[PAGED_OUTER_BYTES] + bytes;
        const long long in_cache =
            piece[1] + i * job[PAGED_INNER_BYTES + 1] + o * job[PAGED_OUTER_BYTES + 1] + bytes;
        const long long* plane = job + job[PAGED_PLANES_AT] + 2 * first;
        const unsigned count = planes - first;

        Word held[PLANES_PER_ITEM];
        long long target[PLANES_PER_ITEM];
#pragma unroll
        for (unsigned k = 0; k < PLANES_PER_ITEM; ++k) {
            if (k >= count) continue;
            const long long cache = plane[2 * k] + in_cache;
            const long long chunk = plane[2 * k + 1] + in_chunk;
            held[k] = *at<const Word>(to_chunk ? cache : chunk);
            target[k] = to_chunk ? chunk : cache;
        }
#pragma unroll
        for (unsigned k = 0; k < PLANES_PER_ITEM; ++k) {
            if (k < count) *at<Word>(target[k]) = held[k];
        }
    }
}

#define KVTIER_PAGED(bytes, Word)                                                  \
    extern "C" __global__ void kvtier_gather_##bytes(const long long* job) {       \
        move_words<Word, true>(job);                                               \
    }                                                                              \
    extern "C" __global__ void kvtier_scatter_##bytes(const long long* job) {      \
        move_words<Word, false>(job);                                              \
    }

KVTIER_PAGED(16, uint4)
KVTIER_PAGED(8, unsigned long long)
KVTIER_PAGED(4, unsigned)
KVTIER_PAGED(2, unsigned short)
KVTIER_PAGED(1, unsigned char)
