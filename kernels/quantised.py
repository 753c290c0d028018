"""Jobs that quantise chunks on the way out of an engine's paged cache, and undo it on the way in.

The schemes are KIVI's (Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
2024, section 3): keys have a few channels of large magnitude, so they are quantised by channel over
a group of tokens; values have none, so they are quantised by token over the channels of a head.

    scheme   code     keys' group        values' group
    int8     8 bits   all tokens         the head_dim channels of a token
    int4     4 bits   32 tokens          the same
    The last group of keys is shorter where the tokens do not fill it.

Each group has a minimum and a scale. The minimum is the least finite element, so the layout's dtype
holds it exactly, whatever the offset. The scale is (greatest - least) / (2^bits - 1), rounded up to
a bfloat16, which has float32's range; at least 2^-125 where the group is not constant, and 0 where
it is. A code is round((x - minimum) / scale), ties to even; a code q means minimum + q * scale.

For finite x and the x' that comes back,

    |x - x'| <= (1/2 + 2^-14) * scale + u * (|x| + scale) + t

where u is 2^-23, 2^-11 + 2^-23 or 2^-8 + 2^-23, and t is 2^-148, 2^-25 or 2^-134, for float32,
float16 and bfloat16. 1/2 is the rounding to a code. A code's real number of steps, at most 255, is
computed by three float32 operations, so it is off by less than 4 * 256 * 2^-24 = 2^-14. Coming
back, code * scale has at most 16 significant bits and is exact, the sum is rounded once to float32
and once to the dtype: u, or t below its normal numbers. The scale is at most (1 + 2^-6) times the
range by the number of levels, or 2^-125.

What is not finite does not spoil its group: it has no part in the range, and comes back as a finite
number, +infinity as the group's greatest and -infinity and NaN as its least; 0 where nothing is
finite. -0 comes back as 0.

A chunk has a record for each layer and head, layers outermost. A record has these arrays in C
order, each beginning at a multiple of 16 bytes, little-endian; what is between them is undefined:

    codes of keys      [tokens, row]       uint8; int8: row = head_dim; int4: row = head_dim / 2,
    codes of values    [tokens, row]       rounded up, the even channel in the low half
    minima of keys     [groups, head_dim]  the layout's dtype
    minima of values   [tokens]            the layout's dtype
    scales of keys     [groups, head_dim]  bfloat16
    scales of values   [tokens]            bfloat16

The layout is the unquantised chunk's; the order of its axes has no meaning here. The kernels are in
`csrc/quantise.cu`, and `quantised_reference.py` says the same in NumPy, to the bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

import numpy as np

from kvtier.errors import InvalidRequest
from kvtier.kernels.device import Span
from kvtier.kernels.paged import (
    Int64s,
    Job,
    PagedCache,
    block_offsets,
    check_blocks_differ,
    check_chunks,
    extent,
)
from kvtier.spaces import Layout

DTYPES = ("float32", "float16", "bfloat16")
INT4_GROUP_TOKENS = 32
_ALIGNMENT = 16
_CHANNELS_QUANTISED = 2  # by one thread, as in quantise.cu
_CHANNELS_DEQUANTISED = 8
_SCALE_BYTES = 2


class Scheme(Enum):
    """How a chunk is quantised."""

    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Of one code."""
        return 8 if self is Scheme.INT8 else 4

    def group_tokens(self, tokens: int) -> int:
        """Tokens over which a channel of the keys has one scale."""
        return tokens if self is Scheme.INT8 else min(tokens, INT4_GROUP_TOKENS)


@dataclass(frozen=True, slots=True)
class Record:
    """Where the arrays of one layer and head begin in its record, in bytes.

    Raises InvalidRequest when the layout has other than two planes or is of no type in `DTYPES`.
    """

    key_codes: int
    value_codes: int
    key_minima: int
    value_minima: int
    key_scales: int
    value_scales: int
    nbytes: int

    @classmethod
    def of(cls, layout: Layout, scheme: Scheme) -> "Record":
        """The record of a scheme for an unquantised layout."""
        if layout.planes != 2:
            raise InvalidRequest(
                f"layout.planes: {layout.planes} given; quantising takes 2, keys and values, and "
                "moves a latent cache only as it is"
            )
        if layout.dtype not in DTYPES:
            raise InvalidRequest(
                f"layout.dtype: {layout.dtype!r} cannot be quantised, allowed are {DTYPES}"
            )
        row = -(-layout.head_dim * scheme.bits // 8)
        groups = -(-layout.tokens // scheme.group_tokens(layout.tokens))
        sizes = (
            *(layout.tokens * row,) * 2,
            groups * layout.head_dim * layout.itemsize,
            layout.tokens * layout.itemsize,
            groups * layout.head_dim * _SCALE_BYTES,
            layout.tokens * _SCALE_BYTES,
        )
        return cls(*accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))


def encoded_bytes(layout: Layout, scheme: Scheme) -> int:
    """Bytes of a quantised chunk of that (unquantised) layout.

    Raises InvalidRequest when the layout cannot be quantised.
    """
    return layout.layers * layout.heads * Record.of(layout, scheme).nbytes


def quantise(
    cache: PagedCache,
    layout: Layout,
    scheme: Scheme,
    chunks: Sequence[Span],
    tables: Sequence[Sequence[int]],
) -> Job:
    """Quantise whole chunks out of an engine's blocks.

    `layout` is what the engine holds, `chunks` are device memory of at least `encoded_bytes` each,
    at multiples of 16 bytes; `tables` is as for `paged.gather`. Raises InvalidRequest for what
    cannot be quantised, and for whatever `paged.gather` refuses.
    """
    record = Record.of(layout, scheme)
    addresses, offsets = _checked(cache, layout, scheme, chunks, tables)
    groups = -(-layout.tokens // scheme.group_tokens(layout.tokens))
    steps = -(-layout.head_dim // _CHANNELS_QUANTISED)
    places = len(chunks) * layout.layers * layout.heads
    key_items = places * groups * steps
    items = (key_items + places * layout.tokens, key_items)
    words = _words(cache, layout, scheme, record, (*items, steps))
    return _job(f"kvtier_quantise_{scheme.value}_{layout.dtype}", words, cache, addresses, offsets)


def dequantise(
    cache: PagedCache,
    layout: Layout,
    scheme: Scheme,
    chunks: Sequence[Span],
    tables: Sequence[Sequence[int]],
) -> Job:
    """Put whole quantised chunks into an engine's blocks; arguments and errors are `quantise`'s.

    Raises InvalidRequest also when a block is written twice.
    """
    record = Record.of(layout, scheme)
    addresses, offsets = _checked(cache, layout, scheme, chunks, tables)
    check_blocks_differ(offsets)
    steps = -(-layout.head_dim // _CHANNELS_DEQUANTISED)
    items = (len(chunks) * layout.layers * layout.heads * layout.tokens * steps, 0)
    words = _words(cache, layout, scheme, record, (*items, steps))
    name = f"kvtier_dequantise_{scheme.value}_{layout.dtype}"
    return _job(name, words, cache, addresses, offsets)


def _checked(
    cache: PagedCache,
    layout: Layout,
    scheme: Scheme,
    chunks: Sequence[Span],
    tables: Sequence[Sequence[int]],
) -> tuple[Int64s, Int64s]:
    """The chunks' addresses and their blocks' offsets."""
    cache.check_geometry(layout)
    check_chunks(chunks, tables, encoded_bytes(layout, scheme))
    offsets = block_offsets(cache, layout, tables, np.zeros(len(chunks), np.int64))
    addresses = np.asarray([chunk.address for chunk in chunks], np.int64)
    if (addresses % _ALIGNMENT).any():
        raise InvalidRequest(
            f"chunks: an address is no multiple of {_ALIGNMENT} bytes; quantised chunks need it"
        )
    if _alignment(cache) % layout.itemsize:
        raise InvalidRequest(
            f"cache: an address or stride is no multiple of {layout.itemsize} bytes, an element of "
            f"{layout.dtype}"
        )
    return addresses, offsets


def _alignment(cache: PagedCache) -> int:
    """The power of two, at most 16, that divides every address of a row."""
    steps = [cache.block_stride, cache.token_stride, cache.head_stride]
    return math.gcd(_ALIGNMENT, *steps, *(base for planes in cache.bases for base in planes))


def _words(
    cache: PagedCache,
    layout: Layout,
    scheme: Scheme,
    record: Record,
    items: tuple[int, int, int],
) -> list[int]:
    """The words of quantise.cu up to the offsets; `items` is all, keys', steps of channels."""
    count, key_items, steps = items
    group_tokens = scheme.group_tokens(layout.tokens)
    wide = layout.head_dim % 8 == 0 and _alignment(cache) == _ALIGNMENT
    return [
        *(count, key_items),
        *extent(layout.heads),
        *extent(layout.layers),
        *extent(layout.tokens),
        *extent(cache.block_tokens),
        *extent(-(-layout.tokens // group_tokens)),
        *extent(steps),
        *(layout.head_dim, group_tokens, int(wide)),
        *(cache.token_stride, cache.head_stride),
        *(record.nbytes, record.value_codes, record.key_minima, record.value_minima),
        *(record.key_scales, record.value_scales),
    ]


def _job(
    kernel: str, words: list[int], cache: PagedCache, addresses: Int64s, offsets: Int64s
) -> Job:
    bases = np.asarray(cache.bases, np.int64).ravel()
    chunks_at = len(words) + 2 + bases.size
    head = np.asarray([*words, chunks_at, chunks_at + addresses.size], np.int64)
    return Job.of(kernel, words[0], head, bases, addresses, offsets.ravel())
