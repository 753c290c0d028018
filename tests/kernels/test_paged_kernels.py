"""Gather and scatter, compiled for the CPU, against their NumPy reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvtier.errors import InvalidRequest
from kvtier.kernels import paged_reference as reference
from kvtier.kernels.arrays import Array
from kvtier.kernels.compiled import HostKernels
from kvtier.kernels.device import Place, Region, Span
from kvtier.kernels.paged import Job, PagedCache, gather, scatter
from kvtier.spaces import Layout

# Chunks are moved as bytes: one type for each width.
TYPES = {"float64": np.uint64, "float32": np.uint32, "float16": np.uint16, "uint8": np.uint8}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def run(kernels: HostKernels, job: Job) -> None:
    words = np.frombuffer(job.job, np.int64).copy()
    kernels.run(job.kernel, job.threads, words.ctypes.data)


@dataclass
class Memory:
    """Bytes of which an array is a part: what is around it must not change."""

    everything: NDArray[np.uint8]
    offset: int
    dtype: np.dtype[Any]
    full: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def make(
        cls, rng: np.random.Generator, dtype: Any, full: tuple[int, ...], shape: tuple[int, ...]
    ) -> "Memory":
        offset = int(rng.choice([0, 0, 16, 8, 4, 2, 1]))
        size = math.prod(full) * np.dtype(dtype).itemsize
        aligned = np.zeros(size + 64 + 15, np.uint8)
        start = -aligned.ctypes.data % 16
        everything = aligned[start : start + size + 64]
        everything[...] = rng.integers(0, 256, everything.size, np.uint8)
        return cls(everything, offset, np.dtype(dtype), full, shape)

    @property
    def array(self) -> NDArray[Any]:
        size = math.prod(self.full) * self.dtype.itemsize
        elements = self.everything[self.offset : self.offset + size].view(self.dtype)
        return elements.reshape(self.full)[tuple(slice(n) for n in self.shape)]

    @property
    def span(self) -> Span:
        array = self.array
        return Region(Place.DEVICE, array.ctypes.data, array.nbytes).span(0, array.nbytes)

    def copy(self) -> "Memory":
        return replace(self, everything=self.everything.copy())


@dataclass
class Case:
    layout: Layout
    axes: str
    layers: list[tuple[Memory, ...]]
    chunks: list[Memory]
    tables: list[list[int]]
    chosen: range
    first: list[int]

    @property
    def arrays(self) -> list[tuple[NDArray[Any], ...]]:
        return [tuple(memory.array for memory in planes) for planes in self.layers]

    @property
    def cache(self) -> PagedCache:
        return PagedCache.of(self.arrays, self.axes)

    @property
    def arguments(self) -> tuple[Any, ...]:
        spans = [chunk.span for chunk in self.chunks]
        return self.cache, self.layout, spans, self.tables, self.chosen, self.first

    def copy(self) -> "Case":
        layers = [tuple(memory.copy() for memory in planes) for planes in self.layers]
        return replace(self, layers=layers, chunks=[chunk.copy() for chunk in self.chunks])

    def refer(self, way: Callable[..., None]) -> None:
        planes = reference.planes_of(self.arrays, self.axes)
        for chunk, table, first in zip(self.chunks, self.tables, self.first, strict=True):
            way(planes, self.layout, chunk.array, table, self.chosen, first)

    def everything(self) -> list[bytes]:
        every = [*self.chunks, *(memory for planes in self.layers for memory in planes)]
        return [memory.everything.tobytes() for memory in every]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = st.integers(1, 3)
    axes = draw(st.permutations(["layer", "plane", "head", "token"]))
    layout = Layout(
        dtype=draw(st.sampled_from(sorted(TYPES))),
        layers=draw(st.integers(1, 5)),
        heads=draw(count),
        head_dim=draw(st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 64, 128]))),
        tokens=draw(st.integers(1, 20)),
        planes=draw(st.integers(1, 2)),
        axes=",".join([*axes, "dim"]),
    )
    chunks = draw(count)
    block_tokens = draw(st.integers(1, 8))
    each = -(-layout.tokens // block_tokens)
    sizes = {
        "layer": layout.layers,
        "plane": layout.planes,
        "head": layout.heads,
        "token": block_tokens,
        "block": each * chunks + draw(st.integers(0, 3)),
    }
    optional = [name for name in ("layer", "plane") if draw(st.booleans())]
    if layout.heads > 1 or draw(st.booleans()):
        optional.append("head")
    names = [*draw(st.permutations(["block", "token", *optional])), "dim"]
    shape = tuple({**sizes, "dim": layout.head_dim}[name] for name in names)
    pads = st.sampled_from([0, 0, 1, 8])
    full = tuple(n + draw(pads) for n in shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = TYPES[layout.dtype]
    planes = range(1 if "plane" in names else layout.planes)
    layers = [
        tuple(Memory.make(rng, dtype, full, shape) for _ in planes)
        for _ in range(1 if "layer" in names else layout.layers)
    ]
    ids = rng.permutation(sizes["block"])[: each * chunks].reshape(chunks, each)
    start = draw(st.integers(0, layout.layers - 1))
    return Case(
        layout,
        ",".join(names),
        layers,
        [Memory.make(rng, dtype, layout.shape, layout.shape) for _ in range(chunks)],
        ids.tolist(),
        range(start, draw(st.integers(start + 1, layout.layers)), draw(count)),
        [draw(st.integers(0, layout.tokens - 1)) for _ in range(chunks)],
    )


WAYS = [(gather, reference.gather), (scatter, reference.scatter)]


@pytest.mark.parametrize(("way", "meaning"), WAYS)
@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_a_kernel_does_what_the_reference_does_and_nothing_else(
    kernels: HostKernels, way: Callable[..., Job], meaning: Callable[..., None], case: Case
) -> None:
    expected = case.copy()
    expected.refer(meaning)
    run(kernels, way(*case.arguments))
    assert case.everything() == expected.everything()


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_scattering_what_was_gathered_gives_the_cache_back(
    kernels: HostKernels, case: Case
) -> None:
    before = case.copy()
    run(kernels, gather(*case.arguments))
    wiped = replace(case, chunks=[chunk.copy() for chunk in case.chunks])
    for chunk in wiped.chunks:
        chunk.array[...] = 0
    wiped.refer(reference.scatter)  # the cache is still the case's
    run(kernels, scatter(*case.arguments))
    assert case.everything()[len(case.chunks) :] == before.everything()[len(case.chunks) :]


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_accesses_are_as_wide_as_every_address_allows_and_no_wider(case: Case) -> None:
    job = gather(*case.arguments)
    width = int(job.kernel.rsplit("_", 1)[1])
    words = np.frombuffer(job.job, np.int64)  # as csrc/paged.cu numbers them
    row, inner, outer = (int(count) for count in words[[2, 5, 8]])
    pieces = words[20 : words[19]].reshape(-1, 4)
    planes = words[words[19] :]
    steps = [*(words[15:17] if inner > 1 else []), *(words[17:19] if outer > 1 else [])]
    numbers = [row * width, *steps, *pieces[:, :2].ravel(), *planes]
    assert math.gcd(16, *(int(number) for number in numbers)) == width


@dataclass(frozen=True)
class Engine:
    """One of the layouts that engines use, at full size: 2 layers, 2 heads of 64 halves."""

    name: str
    axes: str
    shape: tuple[int, ...]
    pairs: bool = False
    planes: int = 2
    heads: int = 2
    chunk_axes: str = "layer,plane,head,token,dim"
    words_in_a_row: int = 8


BLOCKS, TOKENS = 9, 16
ENGINES = [
    Engine("K and V, NHD", "block,token,head,dim", (BLOCKS, TOKENS, 2, 64), pairs=True),
    Engine("K and V, HND", "block,head,token,dim", (BLOCKS, 2, TOKENS, 64), pairs=True),
    Engine("stacked", "plane,block,token,head,dim", (2, BLOCKS, TOKENS, 2, 64)),
    Engine("by block", "block,plane,token,head,dim", (BLOCKS, 2, TOKENS, 2, 64)),
    Engine("latent", "block,token,dim", (BLOCKS, TOKENS, 72), planes=1, heads=1, words_in_a_row=9),
    Engine("cross-layer", "block,layer,plane,head,token,dim", (BLOCKS, 2, 2, 2, TOKENS, 64)),
    Engine(
        "side by side",
        "block,head,token,plane,dim",
        (BLOCKS, 2, TOKENS, 2, 64),
        chunk_axes="layer,head,token,plane,dim",
        words_in_a_row=16,
    ),
    Engine(
        "heads merge",
        "block,token,head,dim",
        (BLOCKS, TOKENS, 2, 64),
        pairs=True,
        chunk_axes="layer,plane,token,head,dim",
        words_in_a_row=16,
    ),
]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_engines_caches_are_moved_in_the_widest_words(kernels: HostKernels, engine: Engine) -> None:
    layout = Layout(
        "bfloat16", 2, engine.heads, engine.shape[-1], 64, engine.planes, engine.chunk_axes
    )
    rng = np.random.default_rng(1)
    arrays = 1 if "layer" in engine.axes else 2
    memories = [
        tuple(
            replace(Memory.make(rng, np.uint16, engine.shape, engine.shape), offset=16)
            for _ in range(2 if engine.pairs else 1)
        )
        for _ in range(arrays)
    ]
    chunks = [
        replace(Memory.make(rng, np.uint16, layout.shape, layout.shape), offset=0) for _ in range(2)
    ]
    tables = [[7, 0, 3, 8], [1, 6, 2, 5]]
    case = Case(layout, engine.axes, memories, chunks, tables, range(2), [0, 0])
    for way, meaning in WAYS:
        job = way(*case.arguments)
        assert job.kernel.endswith("_16")
        assert np.frombuffer(job.job, np.int64)[2] == engine.words_in_a_row
        expected = case.copy()
        expected.refer(meaning)
        run(kernels, job)
        assert case.everything() == expected.everything()
        for memory in chunks:
            memory.everything[...] = rng.integers(0, 256, memory.everything.size, np.uint8)


def test_side_by_side_planes_are_split_off_an_axis() -> None:
    array = np.zeros((3, 2, 4, 10), np.uint16)
    split = Array.of(array).split(3, 2)
    cache = PagedCache.of([split], "block,head,token,plane,dim")
    assert cache == PagedCache.of([array.reshape(3, 2, 4, 2, 5)], "block,head,token,plane,dim")
    assert cache.bases[0][1] - cache.bases[0][0] == 10
    with pytest.raises(InvalidRequest, match="10 cannot be split into 3"):
        Array.of(array).split(3, 3)


LAYOUT = Layout("float16", layers=2, heads=2, head_dim=8, tokens=10)
HALVES = np.zeros((2, 6, 4, 2, 8), np.float16)  # plane, block, token, head, dim
STACKED = "plane,block,token,head,dim"
CACHE = PagedCache.of([HALVES, HALVES], STACKED)
CHUNK = Region(Place.DEVICE, 4096, LAYOUT.nbytes).span(0, LAYOUT.nbytes)
SMALL = Region(Place.DEVICE, 4096, LAYOUT.nbytes).span(1, LAYOUT.nbytes - 1)


@pytest.mark.parametrize("way", [gather, scatter])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunks": []}, "chunks: 0 given with 1 tables"),
        ({"chunks": [CHUNK, CHUNK]}, "chunks: 2 given with 1 tables"),
        ({"chunks": [SMALL]}, r"chunks\[0\]: 1279 bytes given, a chunk of this layout has 1280"),
        ({"tables": [[0, 1]]}, r"tables\[0\]: 2 blocks given, 10 tokens take 3 of 4"),
        ({"tables": [[0, 1, 2, 3]]}, r"tables\[0\]: 4 blocks given"),
        ({"tables": [[0, 6, 1]]}, r"tables\[0\]\[1\]: block 6 given, the cache has 6"),
        ({"tables": [[0, 1, -1]]}, r"tables\[0\]\[2\]: block -1 given"),
        ({"layers": range(0)}, "layers: range.0, 0. given"),
        ({"layers": range(1, 3)}, "layers: range.1, 3. given"),
        ({"layers": range(-1, 1)}, "layers: range.-1, 1. given"),
        ({"first_token": 10}, "first_token: 10 given for 1 chunks"),
        ({"first_token": -1}, "first_token: -1 given"),
        ({"first_token": [0, 0]}, r"first_token: \[0, 0\] given"),
        ({"layout": replace(LAYOUT, layers=3)}, "layout.layers: 3 given, the cache has 2"),
        ({"layout": replace(LAYOUT, planes=1)}, "layout.planes: 1 given, the cache has 2"),
        ({"layout": replace(LAYOUT, heads=1)}, "layout.heads: 1 given, the cache has 2"),
        ({"layout": replace(LAYOUT, head_dim=4)}, "layout.head_dim, in bytes: 8 given"),
        ({"layout": replace(LAYOUT, dtype="float32")}, "layout.head_dim, in bytes: 32 given"),
        (
            {"layout": replace(LAYOUT, axes="layer,plane,head,dim,token")},
            "layout.axes: .* does not end with dim",
        ),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_launched(
    way: Callable[..., Job], given: dict[str, Any], message: str
) -> None:
    good = {"cache": CACHE, "layout": LAYOUT, "chunks": [CHUNK], "tables": [[5, 0, 1]]}
    way(**good)
    with pytest.raises(InvalidRequest, match=message):
        way(**{**good, **given})


def test_a_block_is_written_once_but_read_as_often_as_one_likes() -> None:
    tables = [[0, 1, 2], [3, 4, 1]]
    gather(CACHE, LAYOUT, [CHUNK, CHUNK], tables)
    with pytest.raises(InvalidRequest, match="a block is named twice"):
        scatter(CACHE, LAYOUT, [CHUNK, CHUNK], tables)


def test_blocks_that_are_skipped_may_be_any() -> None:
    scatter(CACHE, LAYOUT, [CHUNK, CHUNK], [[-1, 99, 2], [3, 2, 4]], first_token=8)
    with pytest.raises(InvalidRequest, match="block 99 given"):
        scatter(CACHE, LAYOUT, [CHUNK], [[-1, 99, 2]], first_token=7)


def test_more_work_than_a_kernel_can_count_is_refused() -> None:
    layout = Layout("uint8", layers=1, heads=1, head_dim=65_535, tokens=16_384, planes=1)
    cache = PagedCache(((1,),), 1, 16_384, 1, 65_535, 1 << 30, 65_535, 0)
    chunk = Region(Place.DEVICE, 0, layout.nbytes).span(0, layout.nbytes)
    gather(cache, layout, [chunk], [[0]])
    with pytest.raises(InvalidRequest, match="give fewer chunks"):
        gather(cache, layout, [chunk] * 3, [[0]] * 3)


@pytest.mark.parametrize(
    ("layers", "axes", "message"),
    [
        ([HALVES], "plane,block,token,dim,head", "cache.axes: .* must name block, token and"),
        ([HALVES], "plane,block,block,head,dim", "cache.axes"),
        ([HALVES], "plane,block,token,page,dim", "cache.axes"),
        ([HALVES[0]], STACKED, "cache.axes: 5 axes named, the arrays have 4"),
        ([HALVES, HALVES[:, :5]], STACKED, "2 arrays of different shape"),
        ([HALVES, HALVES.astype(np.float32)], STACKED, "element size"),
        ([], "block,token,dim", "cache.layers: 0 arrays"),
        ([(HALVES, HALVES)], STACKED, "2 arrays given along plane"),
        ([HALVES, HALVES], "layer,block,token,head,dim", "2 arrays given along layer"),
        ([(HALVES[0],), (HALVES[0],) * 2], "block,token,head,dim", "as many planes for every"),
        ([HALVES[..., ::2]], STACKED, "dim has a stride of 4 bytes"),
        ([HALVES[:, :0]], STACKED, "cache.blocks: 0 given"),
        ([np.broadcast_to(HALVES[:, :, :1], HALVES.shape)], STACKED, "token_stride: 0 bytes given"),
    ],
)
def test_a_cache_that_cannot_be_right_is_refused(
    layers: list[Any], axes: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        PagedCache.of(layers, axes)
