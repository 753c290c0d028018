"""Quantised chunks: the kernels, compiled for the CPU, are their reference; errors have a bound."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvtier.encodings import INT4_GROUP_TOKENS, Scheme
from kvtier.encodings import QUANTISED_DTYPES as DTYPES
from kvtier.errors import InvalidRequest
from kvtier.kernels import quantised_reference as reference
from kvtier.kernels.compiled import HostKernels
from kvtier.kernels.device import Place, Region, Span
from kvtier.kernels.paged import Job, PagedCache, gather, scatter
from kvtier.kernels.quantised import dequantise, quantise, scheme_and_record
from kvtier.spaces import Layout
from tests.kernels.quantised_bound import bound

Elements = NDArray[Any]
STORED = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def run(kernels: HostKernels, job: Job) -> None:
    words = np.frombuffer(job.job, np.int64).copy()
    kernels.run(job.kernel, job.threads, words.ctypes.data)


def elements_of(bits: NDArray[Any], dtype: str) -> Elements:
    """Bits as the reference takes them."""
    return bits if dtype == "bfloat16" else bits.view(dtype)


def aligned(nbytes: int) -> NDArray[np.uint8]:
    memory = np.zeros(nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start : start + nbytes]


def span_of(memory: NDArray[Any]) -> Span:
    return Region(Place.DEVICE, memory.ctypes.data, memory.nbytes).span(0, memory.nbytes)


def wild(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Any bits at all: subnormals, infinities and NaN among them."""
    kind = STORED[dtype]
    return rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)


def tiny(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Numbers whose range has a step that is subnormal, or none at all."""
    mask = {"float32": 0x80FFFFFF, "float16": 0x80FF, "bfloat16": 0x80FF}[dtype]
    small = wild(rng, dtype, shape) & STORED[dtype](mask)
    return small if rng.integers(2) else small >> STORED[dtype](rng.integers(1, 7))


def numbers(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Finite numbers: channels and tokens of very different size and offset."""
    least, most = (-22, 14) if dtype == "float16" else (-120, 120)
    size = np.exp2(rng.uniform(least, most, (*shape[:-2], 1, shape[-1])))
    size = size if rng.integers(2) else size[..., :1]
    offset = np.exp2(rng.uniform(least, most, (*shape[:-2], 1, shape[-1]))) * rng.integers(-1, 2)
    values = rng.standard_normal(shape) * size + offset
    largest = float(reference._LARGEST[dtype])
    wide = np.clip(values, -largest, largest).astype(np.float32)
    return np.asarray(reference.narrow(wide, dtype)).view(STORED[dtype])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    return Layout(
        dtype=draw(st.sampled_from(DTYPES)),
        layers=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.one_of(st.integers(1, 20), st.sampled_from([8, 16, 64]))),
        tokens=draw(st.one_of(st.integers(1, 70), st.sampled_from([31, 32, 33, 64]))),
        encoding=draw(st.sampled_from(Scheme)).value,
    )


makers = st.sampled_from([wild, tiny, numbers])
seeds = st.integers(0, 2**32)


def slots(layout: Layout, block_tokens: int) -> tuple[int, int]:
    blocks = -(-layout.tokens // block_tokens)
    return blocks, blocks * block_tokens


@settings(max_examples=150, deadline=None)
@given(
    layout=layouts(),
    make=makers,
    seed=seeds,
    block=st.tuples(st.integers(1, 20), st.sampled_from([0, 0, 1, 8])),
    first=st.one_of(st.just(0), st.integers(0, 69)),
)
def test_the_kernels_are_the_reference_to_the_bit(
    kernels: HostKernels,
    layout: Layout,
    make: Callable[..., NDArray[Any]],
    seed: int,
    block: tuple[int, int],
    first: int,
) -> None:
    block_tokens, pad = block  # pad: elements between one row and the next
    rng = np.random.default_rng(seed)
    blocks, padded = slots(layout, block_tokens)
    chunks, layers, heads, dim = 2, layout.layers, layout.heads, layout.head_dim
    full = (layers, 2, chunks * blocks, heads, block_tokens, dim + pad)
    bits = aligned(int(np.prod(full)) * layout.itemsize).view(STORED[layout.dtype]).reshape(full)
    table = rng.permutation(chunks * blocks).reshape(chunks, blocks)
    bits[...] = make(rng, layout.dtype, full)
    array = bits[..., :dim]
    cache = PagedCache.of([array], "layer,plane,block,head,token,dim")
    nbytes = layout.nbytes
    encoded = [aligned(nbytes) for _ in range(chunks)]
    spans = [span_of(memory) for memory in encoded]
    tables = table.tolist()

    run(kernels, quantise(cache, layout, spans, tables))

    decoded = wild(rng, layout.dtype, full)
    bits_before = bits.copy()
    for chunk, ids in zip(encoded, table, strict=True):
        paged = array[:, :, ids].transpose(0, 1, 3, 2, 4, 5)
        whole = paged.reshape(layers, 2, heads, padded, dim)[..., : layout.tokens, :]
        ordered = elements_of(np.ascontiguousarray(whole), layout.dtype)
        assert np.array_equal(chunk, reference.encode(ordered, layout))
        back = reference.decode(chunk, layout).view(STORED[layout.dtype])
        expected = np.zeros((layers, 2, heads, padded, dim), back.dtype)
        expected[..., : layout.tokens, :] = back
        paged = expected.reshape(layers, 2, heads, blocks, block_tokens, dim).transpose(
            0, 1, 3, 2, 4, 5
        )
        decoded[:, :, ids, ..., :dim] = paged
    # Tokens before a chunk's first and after its last, and what pads a row, are nobody's.
    first_tokens = [first % layout.tokens, 0]
    nobodys = np.ones(full, bool)
    for ids, begin in zip(table, first_tokens, strict=True):
        mine = np.zeros((layers, 2, blocks, heads, block_tokens, dim + pad), bool)
        tokens = np.arange(padded).reshape(blocks, 1, block_tokens, 1)
        mine[..., :dim] = (begin <= tokens) & (tokens < layout.tokens)
        nobodys[:, :, ids] &= ~mine
    decoded[nobodys] = bits_before[nobodys]

    for skipped in range(first_tokens[0] // block_tokens):
        tables[0][skipped] = -1  # is not looked at
    run(kernels, dequantise(cache, layout, spans, tables, first_tokens))
    assert np.array_equal(bits, decoded)


@settings(max_examples=300, deadline=None)
@given(layout=layouts(), make=makers, seed=seeds)
def test_the_error_has_a_bound(
    layout: Layout, make: Callable[..., NDArray[Any]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (layout.layers, 2, layout.heads, layout.tokens, layout.head_dim)
    elements = elements_of(make(rng, layout.dtype, shape), layout.dtype)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = reference.widen(elements, layout.dtype).astype(np.float64)
    chunk = reference.encode(elements, layout)
    back = reference.decode(chunk, layout)
    result = reference.widen(back, layout.dtype).astype(np.float64)
    assert np.isfinite(result).all()
    finite = np.isfinite(values)
    allowed = bound(layout, np.where(finite, values, 0), chunk)
    assert (abs(result - values)[finite] <= allowed[finite]).all()


@settings(max_examples=100, deadline=None)
@given(layout=layouts(), seed=seeds)
def test_a_scale_is_a_step_of_the_range(layout: Layout, seed: int) -> None:
    shape = (layout.layers, 2, layout.heads, layout.tokens, layout.head_dim)
    elements = numbers(np.random.default_rng(seed), layout.dtype, shape)
    elements = elements_of(elements, layout.dtype)
    chunk = reference.encode(elements, layout)
    scheme, record = scheme_and_record(layout)
    stored = chunk.reshape(layout.layers, layout.heads, -1)[0, 0, record.value_scales :]
    scales = reference.widen(stored[: 2 * layout.tokens].view(np.uint16), "bfloat16")
    tokens = reference.widen(elements, layout.dtype)[0, 1, 0].astype(np.float64)
    step = (tokens.max(axis=1) - tokens.min(axis=1)) / (2**scheme.bits - 1)
    assert (scales >= step * (1 - 2.0**-22)).all()
    assert (scales <= np.where(step > 0, np.maximum(step * (1 + 2.0**-6), 2.0**-125), 0)).all()


def key_channel(dtype: str, scheme: Scheme, values: list[float]) -> list[float]:
    """What comes back of one channel of keys whose other plane is 0."""
    layout = Layout(dtype, layers=1, heads=1, head_dim=1, tokens=len(values), encoding=scheme.value)
    wide = np.zeros((1, 2, 1, len(values), 1), np.float32)
    wide[0, 0, 0, :, 0] = values
    if dtype == "bfloat16":  # of these, all have 8 bits
        elements = (wide.view(np.uint32) >> 16).astype(np.uint16)
    else:
        elements = wide.astype(dtype)
    back = reference.decode(reference.encode(elements, layout), layout)
    channel: list[float] = reference.widen(back, dtype)[0, 0, 0, :, 0].tolist()
    return channel


INFINITY, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", Scheme)
def test_what_is_not_finite_spoils_nobody_else(dtype: str, scheme: Scheme) -> None:
    values = [1.0, NAN, 16.0, INFINITY, -INFINITY, 9.0]
    back = key_channel(dtype, scheme, values)
    assert back[0] == back[1] == back[4] == 1.0
    assert back[2] == back[3] == pytest.approx(16.0, abs=0.6)
    assert back[5] == pytest.approx(9.0, abs=0.6)
    assert key_channel(dtype, scheme, [NAN, INFINITY]) == [0.0, 0.0]


@pytest.mark.parametrize("scheme", Scheme)
def test_extremes_come_back_finite(scheme: Scheme) -> None:
    for dtype, most in (("float16", 65504.0), ("bfloat16", 3.3895313892515355e38)):
        back = key_channel(dtype, scheme, [-most, 0.0, most])
        assert back[0] == -most
        assert back[2] == pytest.approx(most, rel=0.1)
        assert abs(back[1]) < most / 10


def test_a_small_range_far_from_zero_is_kept() -> None:
    values = [1000.0 + k / 16 for k in range(16)]
    assert key_channel("float32", Scheme.INT4, values) == values
    assert key_channel("float32", Scheme.INT8, values) == pytest.approx(values, abs=0.002)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_that_fit_come_back_exactly(dtype: str) -> None:
    assert key_channel(dtype, Scheme.INT8, [*range(256)]) == [*range(256)]
    assert key_channel(dtype, Scheme.INT4, [*range(16)]) == [*range(16)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_channel_comes_back_exactly(dtype: str) -> None:
    assert key_channel(dtype, Scheme.INT4, [-1.5] * 40) == [-1.5] * 40


def test_every_half_is_widened_and_narrowed_as_numpy_does(kernels: HostKernels) -> None:
    # A constant channel comes back as it is, but for -0 and what is not finite.
    every = np.arange(1 << 16, dtype=np.uint16)
    layout = Layout(
        "float16", layers=1, heads=1, head_dim=1 << 15, tokens=1, encoding=Scheme.INT8.value
    )
    bits = aligned(2 << 16).view(np.uint16)
    bits[...] = every
    planes = bits.reshape(2, 1, 1, 1 << 15)  # keys are the positive ones
    cache = PagedCache.of([planes], "plane,block,token,dim")
    chunk = aligned(layout.nbytes)
    run(kernels, quantise(cache, layout, [span_of(chunk)], [[0]]))
    planes[0] = 0
    run(kernels, dequantise(cache, layout, [span_of(chunk)], [[0]]))
    keys = every[: 1 << 15]
    finite = np.isfinite(keys.view(np.float16))
    assert np.array_equal(bits[: 1 << 15], np.where(finite, keys, 0))


def test_a_quantised_chunk_is_smaller() -> None:
    exact = Layout("bfloat16", layers=1, heads=1, head_dim=128, tokens=256)
    keys_and_values = 2 * 256 * 128
    int8 = replace(exact, encoding=Scheme.INT8.value)
    assert int8.nbytes == keys_and_values + 4 * 128 + 4 * 256
    int4 = replace(exact, encoding=Scheme.INT4.value)
    groups = 256 // INT4_GROUP_TOKENS
    assert int4.nbytes == keys_and_values // 2 + groups * 4 * 128 + 4 * 256


LAYOUT = Layout("float16", layers=2, heads=2, head_dim=8, tokens=10, encoding=Scheme.INT8.value)
HALVES = aligned(2 * 6 * 4 * 2 * 9 * 2).view(np.float16).reshape(2, 6, 4, 2, 9)
CACHE = PagedCache.of([HALVES[..., :8]] * 2, "plane,block,token,head,dim")
NBYTES = LAYOUT.nbytes
REGION = Region(Place.DEVICE, 4096, NBYTES + 8)
CHUNK = REGION.span(0, NBYTES)


@pytest.mark.parametrize("way", [quantise, dequantise])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": replace(LAYOUT, encoding="exact")}, "layout.encoding: 'exact' given; name"),
        ({"layout": replace(LAYOUT, heads=1)}, "layout.heads: 1 given, the cache has 2"),
        ({"chunks": [REGION.span(0, NBYTES - 1)]}, r"chunks\[0\]: .* bytes given"),
        ({"chunks": [REGION.span(8, NBYTES)]}, "chunks: an address is no multiple of 16"),
        ({"chunks": []}, "chunks: 0 given with 1 tables"),
        ({"tables": [[0, 1]]}, r"tables\[0\]: 2 blocks given"),
        ({"tables": [[0, 1, 6]]}, r"tables\[0\]\[2\]: block 6 given"),
        ({"cache": replace(CACHE, bases=((1, 2), (3, 4)))}, "cache: an address or stride is no"),
    ],
)
def test_a_bad_request_is_refused(
    way: Callable[..., Job], given: dict[str, Any], message: str
) -> None:
    good = {
        "cache": CACHE,
        "layout": LAYOUT,
        "chunks": [CHUNK],
        "tables": [[5, 0, 1]],
    }
    way(**good)
    with pytest.raises(InvalidRequest, match=message):
        way(**{**good, **given})


def test_a_block_is_written_once() -> None:
    quantise(CACHE, LAYOUT, [CHUNK], [[0, 0, 1]])
    with pytest.raises(InvalidRequest, match="a block is named twice"):
        dequantise(CACHE, LAYOUT, [CHUNK], [[0, 0, 1]])


@pytest.mark.parametrize("first_token", [-1, 10, [1, 2], []])
def test_a_first_token_outside_the_chunk_is_refused(first_token: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"first_token: .* 0 to 9"):
        dequantise(CACHE, LAYOUT, [CHUNK], [[5, 0, 1]], first_token)


def test_exact_jobs_do_not_move_quantised_chunks() -> None:
    for job in (gather, scatter):
        with pytest.raises(InvalidRequest, match=r"layout\.encoding: 'kivi-int8' given"):
            job(CACHE, LAYOUT, [CHUNK], [[5, 0, 1]])


# ── without a device ──────────────────────────────────────────────────────────────────────────────

ELEMENTS = np.zeros(LAYOUT.shape, np.float16)


@pytest.mark.parametrize(
    ("elements", "layout", "message"),
    [
        (ELEMENTS, replace(LAYOUT, encoding="exact"), "layout.encoding: 'exact' given"),
        (ELEMENTS[1:], LAYOUT, r"elements: float16 of shape \(1, 2, 2, 10, 8\) given"),
        (ELEMENTS.view(np.uint16), LAYOUT, "elements: uint16 of .* is float16"),
        (ELEMENTS, replace(LAYOUT, dtype="bfloat16"), "elements: float16 of .* is uint16"),
    ],
)
def test_what_is_no_chunk_is_not_encoded(elements: Elements, layout: Layout, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        reference.encode(elements, layout)


def test_what_is_no_chunk_is_not_decoded() -> None:
    chunk = reference.encode(ELEMENTS, LAYOUT).data
    assert np.array_equal(reference.decode(chunk, LAYOUT), ELEMENTS)
    with pytest.raises(InvalidRequest, match=f"chunk: {NBYTES - 1} bytes given"):
        reference.decode(chunk[1:], LAYOUT)
    with pytest.raises(InvalidRequest, match=r"layout\.encoding"):
        reference.decode(chunk, replace(LAYOUT, encoding="exact"))
