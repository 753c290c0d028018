"""Jobs that quantise chunks on the way out of an engine's paged cache, and undo it on the way in.

The schemes are KIVI's (Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
2024, section 3): keys have a few channels of large magnitude, so they are quantised by channel over
a group of tokens; values have none, so they are quantised by token over the channels of a head.

`kvtier/encodings.py` has the schemes, their groups and where the bytes of a chunk lie.

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

The kernels are in `csrc/quantise.cu`, and `quantised_reference.py` does the same in NumPy, to the
bit.
"""

import math
from collections.abc import Sequence

import numpy as np

from kvtier.encodings import RECORD_ALIGNMENT, Record, Scheme
from kvtier.errors import InvalidRequest
from kvtier.kernels.device import Span
from kvtier.kernels.paged import (
    Int64s,
    Job,
    PagedCache,
    Places,
    check_chunks,
    extent,
)
from kvtier.spaces import Layout

_CHANNELS_QUANTISED = 2  # by one thread, as in quantise.cu
_CHANNELS_DEQUANTISED = 8


def scheme_and_record(layout: Layout) -> tuple[Scheme, Record]:
    """How chunks of a layout are quantised, and where the arrays of one layer and head lie.

    Raises InvalidRequest when they are exact.
    """
    scheme = layout.scheme
    if scheme is None:
        raise InvalidRequest(
            f"layout.encoding: {layout.encoding!r} given; name what to quantise to, one of "
            f"{[each.value for each in Scheme]}"
        )
    record = Record.of(
        scheme, tokens=layout.tokens, head_dim=layout.head_dim, itemsize=layout.itemsize
    )
    return scheme, record


def quantise(
    cache: PagedCache,
    layout: Layout,
    chunks: Sequence[Span],
    tables: Sequence[Sequence[int]],
) -> Job:
    """Quantise whole chunks out of an engine's blocks.

    `chunks` are device memory of at least `layout.nbytes` each, at multiples of 16 bytes; `tables`
    is as for `paged.gather`. Raises InvalidRequest for an exact layout, and for whatever
    `paged.gather` refuses.
    """
    return quantise_at(cache, layout, chunks, Places.of(cache, layout, tables))


def quantise_at(cache: PagedCache, layout: Layout, chunks: Sequence[Span], places: Places) -> Job:
    """As `quantise`, of tables that were checked, with no first tokens."""
    scheme, record = scheme_and_record(layout)
    addresses = _checked(cache, layout, chunks, places)
    steps = -(-layout.head_dim // _CHANNELS_QUANTISED)
    rows = len(chunks) * layout.layers * layout.heads
    key_items = rows * scheme.groups(layout.tokens) * steps
    items = (key_items + rows * layout.tokens, key_items)
    words = _words(cache, layout, scheme, record, (*items, steps))
    name = f"kvtier_quantise_int{scheme.bits}_{layout.dtype}"
    return _job(name, words, cache, addresses, places)


def dequantise(
    cache: PagedCache,
    layout: Layout,
    chunks: Sequence[Span],
    tables: Sequence[Sequence[int]],
    first_token: int | Sequence[int] = 0,
) -> Job:
    """Put quantised chunks into an engine's blocks; arguments and errors are `quantise`'s, and
    `first_token` is as for `paged.scatter`.

    Raises InvalidRequest also when a block is written twice.
    """
    places = Places.of(cache, layout, tables, first_token, written=True)
    return dequantise_at(cache, layout, chunks, places)


def dequantise_at(cache: PagedCache, layout: Layout, chunks: Sequence[Span], places: Places) -> Job:
    """As `dequantise`, of tables that were checked, as `written`."""
    scheme, record = scheme_and_record(layout)
    addresses = _checked(cache, layout, chunks, places)
    steps = -(-layout.head_dim // _CHANNELS_DEQUANTISED)
    items = (len(chunks) * layout.layers * layout.heads * layout.tokens * steps, 0)
    words = _words(cache, layout, scheme, record, (*items, steps))
    name = f"kvtier_dequantise_int{scheme.bits}_{layout.dtype}"
    return _job(name, words, cache, addresses, places)


def _checked(cache: PagedCache, layout: Layout, chunks: Sequence[Span], places: Places) -> Int64s:
    """The chunks' addresses."""
    cache.check_geometry(layout)
    check_chunks(chunks, len(places), layout.nbytes)
    addresses = np.asarray([chunk.address for chunk in chunks], np.int64)
    if (addresses % RECORD_ALIGNMENT).any():
        raise InvalidRequest(
            f"chunks: an address is no multiple of {RECORD_ALIGNMENT} bytes; quantised chunks need "
            "it"
        )
    if _alignment(cache) % layout.itemsize:
        raise InvalidRequest(
            f"cache: an address or stride is no multiple of {layout.itemsize} bytes, an element of "
            f"{layout.dtype}"
        )
    return addresses


def _alignment(cache: PagedCache) -> int:
    """The power of two, at most 16, that divides every address of a row."""
    steps = [cache.block_stride, cache.token_stride, cache.head_stride]
    return math.gcd(RECORD_ALIGNMENT, *steps, *(base for planes in cache.bases for base in planes))


def _words(
    cache: PagedCache,
    layout: Layout,
    scheme: Scheme,
    record: Record,
    items: tuple[int, int, int],
) -> list[int]:
    """The words of quantise.cu up to the offsets; `items` is all, keys', steps of channels."""
    count, key_items, steps = items
    wide = layout.head_dim % 8 == 0 and _alignment(cache) == RECORD_ALIGNMENT
    return [
        *(count, key_items),
        *extent(layout.heads),
        *extent(layout.layers),
        *extent(layout.tokens),
        *extent(cache.block_tokens),
        *extent(scheme.groups(layout.tokens)),
        *extent(steps),
        *(layout.head_dim, scheme.group_tokens(layout.tokens), int(wide)),
        *(cache.token_stride, cache.head_stride),
        *(record.nbytes, record.value_codes, record.key_minima, record.value_minima),
        *(record.key_scales, record.value_scales),
    ]


def _job(
    kernel: str,
    words: list[int],
    cache: PagedCache,
    addresses: Int64s,
    places: Places,
) -> Job:
    bases = np.asarray(cache.bases, np.int64).ravel()
    chunks_at = len(words) + 3 + bases.size
    first_at = chunks_at + addresses.size
    blocks_at = first_at + places.first.size
    head = np.asarray([*words, chunks_at, first_at, blocks_at], np.int64)
    return Job.of(kernel, words[0], head, bases, addresses, places.first, places.offsets.ravel())
