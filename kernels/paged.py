"""Jobs that move chunks out of and into an engine's paged cache.

An engine keeps keys and values in blocks of a few tokens each, wherever a block was free, and in an
order of axes of its own. A chunk is one contiguous array (`kvtier.spaces.Layout`). `gather` and
`scatter` check a request on the host and describe it as one `Job` for `Device.launch`; the kernels
are in `csrc/paged.cu`, which documents the job's words, and `paged_reference.py` says in NumPy what
they do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import InvalidRequest
from kvtier.kernels.arrays import Array
from kvtier.kernels.device import Span
from kvtier.spaces import Layout

MOST_ITEMS = (1 << 31) - 1  # the kernels number their items in 31 bits
MOST_THREADS = 1 << 20  # more than any GPU runs at once; threads loop over what is left
_WIDEST = 16  # bytes of the widest access
_PLANES_PER_ITEM = 4  # as in paged.cu
Int64s = NDArray[np.int64]
_OPTIONAL_AXES = {"layer", "plane", "head"}


@dataclass(frozen=True, slots=True)
class PagedCache:
    """An engine's cache of keys and values, for layers of one geometry.

    `bases` has the address of block 0 for each layer and plane. `row_bytes` is what is contiguous:
    one head of one token. Strides are in bytes. Raises InvalidRequest when a number is out of range
    or rows overlap.
    """

    bases: tuple[tuple[int, ...], ...]
    blocks: int
    block_tokens: int
    heads: int
    row_bytes: int
    block_stride: int
    token_stride: int
    head_stride: int

    def __post_init__(self) -> None:
        if len({len(planes) for planes in self.bases}) != 1 or not self.bases[0]:
            raise InvalidRequest("cache.bases: give as many planes for every layer, at least one")
        for name in ("blocks", "block_tokens", "heads", "row_bytes"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"cache.{name}: {getattr(self, name)} given, least is 1")
        counts = {"block": self.blocks, "token": self.block_tokens, "head": self.heads}
        for name, count in counts.items():
            step = getattr(self, f"{name}_stride")
            if count > 1 and abs(step) < self.row_bytes:
                raise InvalidRequest(
                    f"cache.{name}_stride: {step} bytes given, rows of {self.row_bytes} overlap"
                )

    @classmethod
    def of(cls, layers: Sequence[Any], axes: str) -> Self:
        """The cache in an engine's arrays, each taken with `Array.of`.

        `layers` has for each layer one array, or a tuple of one array per plane (keys, values).
        `axes` names their axes, outermost first: "block", "token" and "dim", "head" unless there is
        but one, and "plane" where one array holds several. With "layer" among them, `layers` has
        one item that holds all. Raises InvalidRequest when arrays differ in geometry or dim is not
        contiguous and innermost.
        """
        names = _checked_axes(axes)
        items = [item if isinstance(item, tuple) else (item,) for item in layers]
        arrays = [[Array.of(source) for source in item] for item in items]
        first = _one_geometry(arrays, names)
        count = dict(zip(names, first.shape, strict=True))
        step = dict(zip(names, first.strides_bytes, strict=True))
        if count["dim"] > 1 and step["dim"] != first.itemsize:
            raise InvalidRequest(
                f"cache.axes: dim has a stride of {step['dim']} bytes, elements have "
                f"{first.itemsize}; rows of dim must be contiguous"
            )
        layer_step, plane_step = step.get("layer", 0), step.get("plane", 0)
        inside = [  # where the planes of each layer begin, in an array that holds several
            [layer * layer_step + plane * plane_step for plane in range(count.get("plane", 1))]
            for layer in range(count.get("layer", 1))
        ]
        return cls(
            bases=tuple(
                tuple(array.address + offset for array in planes for offset in offsets)
                for planes in arrays
                for offsets in inside
            ),
            blocks=count["block"],
            block_tokens=count["token"],
            heads=count.get("head", 1),
            row_bytes=count["dim"] * first.itemsize,
            block_stride=step["block"],
            token_stride=step["token"],
            head_stride=step.get("head", 0),
        )

    def check_geometry(self, layout: Layout) -> None:
        """Raise InvalidRequest unless a chunk has the layers, planes, heads and rows of this."""
        for name, wanted, held in (
            ("layers", layout.layers, len(self.bases)),
            ("planes", layout.planes, len(self.bases[0])),
            ("heads", layout.heads, self.heads),
            ("head_dim, in bytes", layout.head_dim * layout.itemsize, self.row_bytes),
        ):
            if wanted != held:
                raise InvalidRequest(f"layout.{name}: {wanted} given, the cache has {held}")


@dataclass(frozen=True, slots=True)
class Places:
    """Where chunks' tokens are in a cache: tables that were checked, once for all layers.

    `offsets` are bytes from a plane's address to each block, [chunks, blocks of a chunk]; blocks of
    nothing but tokens before the chunk's first one, which `first` [chunks] counts, are at 0.
    """

    offsets: Int64s
    first: Int64s

    @classmethod
    def of(
        cls,
        cache: PagedCache,
        layout: Layout,
        tables: Sequence[Sequence[int]],
        first_token: int | Sequence[int] = 0,
        *,
        written: bool = False,
    ) -> Self:
        """Check tables and first tokens as `gather` takes them, for blocks that are to be `written`
        also that each is once. Raises InvalidRequest."""
        first = _first_tokens(layout, first_token, len(tables))
        blocks = -(-layout.tokens // cache.block_tokens)
        for c, table in enumerate(tables):
            if len(table) != blocks:
                raise InvalidRequest(
                    f"tables[{c}]: {len(table)} blocks given, {layout.tokens} tokens take {blocks} "
                    f"of {cache.block_tokens}"
                )
        ids = np.asarray(tables, np.int64).reshape(len(tables), blocks)
        used = np.arange(blocks) >= (first // cache.block_tokens)[:, None]
        wrong = np.argwhere(used & ((ids < 0) | (ids >= cache.blocks)))
        if len(wrong):
            c, b = wrong[0]
            raise InvalidRequest(
                f"tables[{c}][{b}]: block {ids[c, b]} given, the cache has {cache.blocks}"
            )
        if written and len(np.unique(ids[used])) != used.sum():
            raise InvalidRequest("tables: a block is named twice; each block is written once")
        return cls(np.where(used, ids, 0) * cache.block_stride, first)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, chunks: Sequence[int]) -> "Places":
        """Those of some chunks, in that order."""
        return Places(self.offsets[chunks], self.first[chunks])


@dataclass(frozen=True, slots=True)
class Job:
    """What `Device.launch` takes: a kernel's name, how many threads, and its 64-bit words."""

    kernel: str
    threads: int
    job: bytes

    @classmethod
    def of(cls, kernel: str, items: int, *words: Int64s) -> Self:
        """A job of so many items. Raises InvalidRequest when a kernel cannot count them."""
        if items > MOST_ITEMS:
            raise InvalidRequest(
                f"chunks: {items} items of work in one job, at most {MOST_ITEMS}; give fewer chunks"
            )
        return cls(kernel, min(items, MOST_THREADS), np.concatenate(words).tobytes())


def gather(
    cache: PagedCache,
    layout: Layout,
    chunks: Sequence[Span],
    tables: Sequence[Sequence[int]],
    layers: range | None = None,
    first_token: int | Sequence[int] = 0,
) -> Job:
    """Copy tokens out of an engine's blocks into chunks.

    `chunks` are device memory, each of at least `layout.nbytes`. `tables` has for each chunk the
    ids of the blocks that hold its tokens, in order; a chunk's first token is the first of its
    first block. `layers` counts within the cache and the layout alike; none given means all. Tokens
    of a chunk before `first_token` (one for all, or one for each chunk) are left alone, and blocks
    that hold no others are not looked at. Bytes of a chunk that are not named stay as they are.

    Raises InvalidRequest when cache and layout differ in geometry, when a chunk is too small, when
    a table has another number of blocks or an id that the cache has not, or when layers or first
    tokens are out of range.
    """
    return gather_at(cache, layout, chunks, Places.of(cache, layout, tables, first_token), layers)


def scatter(
    cache: PagedCache,
    layout: Layout,
    chunks: Sequence[Span],
    tables: Sequence[Sequence[int]],
    layers: range | None = None,
    first_token: int | Sequence[int] = 0,
) -> Job:
    """Copy tokens out of chunks into an engine's blocks; arguments and errors are `gather`'s.

    Raises InvalidRequest also when a block is written twice.
    """
    places = Places.of(cache, layout, tables, first_token, written=True)
    return scatter_at(cache, layout, chunks, places, layers)


def gather_at(
    cache: PagedCache,
    layout: Layout,
    chunks: Sequence[Span],
    places: Places,
    layers: range | None = None,
) -> Job:
    """As `gather`, of tables that were checked."""
    pieces = _pieces(cache, layout, chunks, places)
    return _encode("gather", cache, layout, _Rows.merged(cache, layout, layers), pieces)


def scatter_at(
    cache: PagedCache,
    layout: Layout,
    chunks: Sequence[Span],
    places: Places,
    layers: range | None = None,
) -> Job:
    """As `scatter`, of tables that were checked, as `written`."""
    pieces = _pieces(cache, layout, chunks, places)
    return _encode("scatter", cache, layout, _Rows.merged(cache, layout, layers), pieces)


def extent(count: int) -> list[int]:
    """The words by which a kernel divides an index below 2**31 (see `csrc/grid.cuh`)."""
    shift = 31 + (count - 1).bit_length()
    return [count, -(-(1 << shift) // count), shift]


def chunk_strides(layout: Layout) -> dict[str, int]:
    """Bytes from one index to the next along each axis of a chunk, by the axis' name."""
    inside = [math.prod(layout.shape[axis + 1 :]) * layout.itemsize for axis in range(5)]
    return dict(zip(layout.axes.split(","), inside, strict=True))


def check_chunks(chunks: Sequence[Span], tables: int, nbytes: int) -> None:
    """Raise InvalidRequest unless there are chunks, each of `nbytes` and with a table."""
    if not chunks or len(chunks) != tables:
        raise InvalidRequest(
            f"chunks: {len(chunks)} given with {tables} tables; give one table for each of "
            "at least one chunk"
        )
    for c, chunk in enumerate(chunks):
        if chunk.nbytes < nbytes:
            raise InvalidRequest(
                f"chunks[{c}]: {chunk.nbytes} bytes given, a chunk of this layout has {nbytes}"
            )


def _checked_axes(axes: str) -> list[str]:
    names = axes.split(",")
    needed = {"block", "token", "dim"}
    wrong = len(set(names)) < len(names) or not needed <= set(names) <= needed | _OPTIONAL_AXES
    if wrong or names[-1] != "dim":
        raise InvalidRequest(
            f"cache.axes: {axes[:200]!r} must name block, token and, innermost, dim; "
            f"it may name {', '.join(sorted(_OPTIONAL_AXES))}; each once"
        )
    return names


def _one_geometry(arrays: list[list[Array]], names: list[str]) -> Array:
    """The first of arrays that agree in all but the address."""
    every = [array for planes in arrays for array in planes]
    if len({(a.shape, a.strides_bytes, a.itemsize) for a in every}) != 1:
        raise InvalidRequest(
            f"cache.layers: {len(every)} arrays of different shape, strides or element size given; "
            "describe each geometry on its own"
        )
    if len(every[0].shape) != len(names):
        raise InvalidRequest(
            f"cache.axes: {len(names)} axes named, the arrays have {len(every[0].shape)}"
        )
    for axis, given in (("layer", len(arrays)), ("plane", max(map(len, arrays)))):
        if axis in names and given > 1:
            raise InvalidRequest(
                f"cache.layers: {given} arrays given along {axis}, which is an axis of each"
            )
    return every[0]


def _first_tokens(layout: Layout, given: int | Sequence[int], count: int) -> Int64s:
    tokens = np.asarray(given, np.int64)
    wrong = (tokens < 0) | (tokens >= layout.tokens)
    if tokens.shape not in {(), (count,)} or wrong.any():
        raise InvalidRequest(
            f"first_token: {given} given for {count} chunks, allowed is one for all or one for "
            f"each, 0 to {layout.tokens - 1}"
        )
    return np.broadcast_to(tokens, count)


def _pieces(cache: PagedCache, layout: Layout, chunks: Sequence[Span], places: Places) -> Int64s:
    """What one block holds of one chunk, for each: the words of paged.cu, [pieces, 4]."""
    if layout.scheme is not None:
        raise InvalidRequest(f"layout.encoding: {layout.encoding!r} given; this moves exact chunks")
    cache.check_geometry(layout)
    check_chunks(chunks, len(places), layout.nbytes)
    first, offsets = places.first, places.offsets
    starts = np.arange(offsets.shape[1], dtype=np.int64) * cache.block_tokens
    addresses = np.asarray([chunk.address for chunk in chunks], np.int64)
    in_chunks = addresses[:, None] + starts * chunk_strides(layout)["token"]
    begins = np.maximum(first[:, None] - starts, 0)
    ends = np.broadcast_to(np.minimum(layout.tokens - starts, cache.block_tokens), offsets.shape)
    pieces = np.stack([in_chunks, offsets, begins, ends], axis=-1).reshape(-1, 4)
    return pieces[pieces[:, 2] < pieces[:, 3]]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of bytes that are contiguous in chunk and cache alike.

    `planes` has the words of paged.cu, [planes, 2].
    """

    nbytes: int
    heads: int
    planes: Int64s

    @classmethod
    def merged(cls, cache: PagedCache, layout: Layout, layers: range | None) -> "_Rows":
        """The longest: planes and heads that follow each other on both sides become one row."""
        chosen = range(layout.layers) if layers is None else layers
        if not chosen or min(chosen) < 0 or max(chosen) >= layout.layers:
            raise InvalidRequest(f"layers: {chosen} given, there are {layout.layers} from 0")
        if not layout.axes.endswith(",dim"):
            raise InvalidRequest(f"layout.axes: {layout.axes!r} does not end with dim, as it must")
        strides = chunk_strides(layout)
        bases = np.asarray(cache.bases, np.int64)[chosen]
        row, heads = cache.row_bytes, cache.heads
        for _ in range(2):  # either may have to go first
            steps = np.diff(bases, axis=1)
            if bases.shape[1] > 1 and strides["plane"] == row and (steps == row).all():
                row *= bases.shape[1]
                bases = bases[:, :1]
            if heads > 1 and strides["head"] == row == cache.head_stride:
                row, heads = row * heads, 1
        of_layers = np.asarray(chosen, np.int64)[:, None] * strides["layer"]
        in_chunk = of_layers + np.arange(bases.shape[1]) * strides["plane"]
        return cls(row, heads, np.stack([bases, in_chunk], axis=-1).reshape(-1, 2))


def _encode(name: str, cache: PagedCache, layout: Layout, rows: _Rows, pieces: Int64s) -> Job:
    strides = chunk_strides(layout)
    tokens = (min(cache.block_tokens, layout.tokens), strides["token"], cache.token_stride)
    heads = (rows.heads, strides["head"], cache.head_stride)
    inner_is_token = rows.heads == 1 or strides["token"] < strides["head"]
    inner, outer = (tokens, heads) if inner_is_token else (heads, tokens)
    steps = [step for axis in (inner, outer) for step in axis[1:] if axis[0] > 1]
    places = [*rows.planes.ravel().tolist(), *pieces[:, :2].ravel().tolist()]
    width = math.gcd(_WIDEST, rows.nbytes, *steps, *places)
    words = rows.nbytes // width
    items = -(-len(rows.planes) // _PLANES_PER_ITEM) * len(pieces) * outer[0] * inner[0] * words
    header = [items, len(rows.planes)]
    header += extent(words) + extent(inner[0]) + extent(outer[0]) + extent(len(pieces))
    header += [int(inner_is_token), *inner[1:], *outer[1:]]
    header.append(len(header) + 1 + pieces.size)
    head = np.asarray(header, np.int64)
    return Job.of(f"kvtier_{name}_{width}", items, head, pieces.ravel(), rows.planes.ravel())
