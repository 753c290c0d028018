"""Engines that share quantised chunks over a real service: the error keeps its bound, and engines
whose chunks are exact never see them (I2).

The device is the simulated one, in all processes.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvtier.chunks import Prefix
from kvtier.client import Client, KeyState, PagedEngine, connect
from kvtier.encodings import EXACT, QUANTISED_DTYPES, Scheme
from kvtier.errors import InvalidRequest
from kvtier.kernels import quantised_reference as reference
from kvtier.kernels.device import Urgency
from kvtier.kernels.host import HostDevice
from kvtier.kernels.paged import PagedCache
from kvtier.spaces import Layout, Space
from tests.kernels.quantised_bound import bound
from tests.sidecar import HANG_S, Sidecar, until

Elements = NDArray[Any]
AXES = "layer,plane,block,head,token,dim"
CHUNKS = 3
STAGED, DIRECT = 1, 1 << 40  # least bytes of what is copied before it is dequantised
INT8 = Layout("float16", 2, 2, 16, tokens=16, encoding=Scheme.INT8.value)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    settings = ("gpu.device=host", "gpu.capacity=1MiB", "limits.spaces=4096")
    with Sidecar(tmp_path_factory.mktemp("quantised"), *settings) as running:
        yield running


class Engine:
    """An engine of its own device, client and blocks, which hold numbers of several sizes."""

    def __init__(
        self, sidecar: Sidecar, space: Space, block_tokens: int, seed: int, least_copy_bytes: int
    ) -> None:
        self.layout = layout = space.layout
        self.device = HostDevice()
        self.client: Client = connect(sidecar.target, space, deadline_s=HANG_S, device=self.device)
        assert self.client.wait_ready(HANG_S)
        self.stream = self.device.stream(Urgency.LOADS)
        each = -(-layout.tokens // block_tokens)
        blocks = CHUNKS * each + 2
        shape = (layout.layers, 2, blocks, layout.heads, block_tokens, layout.head_dim)
        memory = self.device.allocate(int(np.prod(shape)) * layout.itemsize)
        raw = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
        stored = np.uint16 if layout.dtype == "bfloat16" else layout.dtype
        self.blocks: Elements = np.ctypeslib.as_array(raw).view(stored).reshape(shape)
        rng = np.random.default_rng(seed)
        channels = np.exp2(rng.uniform(-8, 8, shape[-1:])) * rng.choice([-1, 1], shape[-1:])
        numbers = rng.standard_normal(shape) * channels + channels
        self.blocks[...] = reference.narrow(numbers.astype(np.float32), layout.dtype)
        ids = rng.permutation(blocks)[: CHUNKS * each]
        self.tables: list[list[int]] = ids.reshape(CHUNKS, each).tolist()
        self.paged = PagedEngine(
            self.client,
            self.device,
            PagedCache.of([self.blocks], AXES),
            staging_bytes=5 * (layout.nbytes + 256),
            least_copy_bytes=least_copy_bytes,
        )

    @property
    def chunks(self) -> list[Elements]:
        """What the blocks of the tables hold, as the elements of chunks."""
        layout = self.layout
        found = []
        for table in self.tables:
            tokens = self.blocks[:, :, table].transpose(0, 1, 3, 2, 4, 5)
            whole = tokens.reshape(layout.layers, 2, layout.heads, -1, layout.head_dim)
            found.append(whole[..., : layout.tokens, :].copy())
        return found

    def offload(self, prefix: Prefix) -> list[int]:
        return self.paged.offload(
            prefix, self.tables[: len(prefix)], after=self.stream.record()
        ).stored

    def load(self, prefix: Prefix, *, by_layer: bool = False, first_token: int = 0) -> int:
        """How many chunks are right in the blocks, which are wiped before."""
        self.blocks[...] = 0
        with self.paged.load(
            prefix,
            self.tables,
            after=self.stream.record(),
            by_layer=by_layer,
            first_token=first_token,
        ) as load:
            return load.finish()

    def close(self) -> None:
        self.paged.close()
        self.client.close()
        self.device.close()


@contextmanager
def engines(
    sidecar: Sidecar, space: Space, block_tokens: int = 5, seed: int = 1, least: int = STAGED
) -> Iterator[tuple[Engine, Engine]]:
    """Two of one space, with different numbers in their blocks."""
    made = [Engine(sidecar, space, block_tokens, seed + n, least) for n in range(2)]
    try:
        yield made[0], made[1]
    finally:
        for engine in made:
            engine.close()


def tokens_of(layout: Layout) -> list[int]:
    return list(range(CHUNKS * layout.tokens))


def keeps_the_bound(layout: Layout, before: Elements, after: Elements) -> bool:
    wide = [reference.widen(each, layout.dtype).astype(np.float64) for each in (before, after)]
    allowed = bound(layout, wide[0], reference.encode(before, layout))
    return bool((abs(wide[0] - wide[1]) <= allowed).all())


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    return Layout(
        dtype=draw(st.sampled_from(QUANTISED_DTYPES)),
        layers=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 20)),
        tokens=draw(st.integers(1, 70)),
        encoding=draw(st.sampled_from(Scheme)).value,
    )


@settings(max_examples=25, deadline=None)
@given(
    layout=layouts(),
    block_tokens=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    how=st.tuples(st.booleans(), st.sampled_from([STAGED, DIRECT]), st.integers(0, 69)),
)
def test_what_one_engine_stores_another_loads_within_the_bound(
    sidecar: Sidecar,
    layout: Layout,
    block_tokens: int,
    seed: int,
    how: tuple[bool, int, int],
) -> None:
    by_layer, least, first = how
    space = Space(f"property {seed}", layout)
    first_token = first % layout.tokens
    with engines(sidecar, space, block_tokens, seed, least) as (one, other):
        prefix = one.client.prefix(tokens_of(layout))
        before = one.chunks
        one.offload(prefix)
        assert other.load(prefix, by_layer=by_layer, first_token=first_token) == CHUNKS
        first_chunk, *rest = other.chunks
        assert not first_chunk[..., :first_token, :].any()  # it is left alone
        first_chunk[..., :first_token, :] = 0
        decoded = [reference.decode(reference.encode(chunk, layout), layout) for chunk in before]
        decoded[0][..., :first_token, :] = 0
        for found, expected in zip([first_chunk, *rest], decoded, strict=True):
            assert np.array_equal(found, expected)
        for chunk, found in zip(before[1:], rest, strict=True):
            assert keeps_the_bound(layout, chunk, found)
        one.client.evict(None)


@pytest.mark.parametrize("encoding", [scheme.value for scheme in Scheme])
def test_from_ram_and_from_vram(sidecar: Sidecar, encoding: str) -> None:
    layout = replace(INT8, encoding=encoding)
    with engines(sidecar, Space(f"vram {encoding}", layout)) as (one, other):
        prefix = one.client.prefix(tokens_of(layout))
        before = one.chunks
        assert one.offload(prefix) == [0, 1, 2]
        raised = sidecar.stats().counters["raised_chunks"]
        assert other.load(prefix) == CHUNKS
        from_ram = other.chunks
        assert all(keeps_the_bound(layout, *pair) for pair in zip(before, from_ram, strict=True))
        until(
            lambda: sidecar.stats().counters["raised_chunks"] >= raised + CHUNKS,
            "chunks are raised",
        )
        hits = sidecar.stats().counters["load_vram_hits"]
        for by_layer in (False, True):
            assert other.load(prefix, by_layer=by_layer) == CHUNKS
            assert [each.tobytes() for each in other.chunks] == [
                each.tobytes() for each in from_ram
            ]
        assert sidecar.stats().counters["load_vram_hits"] == hits + 2 * CHUNKS


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
def test_a_client_without_a_device_moves_encoded_bytes(sidecar: Sidecar, dtype: str) -> None:
    layout = replace(INT8, dtype=dtype)
    space = Space(f"plain {dtype}", layout)
    plain = sidecar.client(space, path="inline")
    with engines(sidecar, space) as (one, other):
        prefix = plain.prefix(tokens_of(layout))
        before = one.chunks
        # What one has quantised comes as it was encoded,
        one.offload(prefix[:1])
        with plain.load(prefix) as loaded:
            [back] = [reference.decode(chunk.data, layout) for chunk in loaded]
        assert keeps_the_bound(layout, before[0], back)
        # and what a plain client has encoded is dequantised.
        with plain.offload(prefix) as wanted:
            for slot in wanted:
                slot.write(reference.encode(before[slot.index], layout).data)
        assert wanted.outcome.stored == [1, 2]
        assert other.load(prefix) == CHUNKS
        assert all(
            keeps_the_bound(layout, *pair) for pair in zip(before, other.chunks, strict=True)
        )


def test_an_exact_engine_never_sees_quantised_chunks(sidecar: Sidecar) -> None:
    encodings = (EXACT, *(scheme.value for scheme in Scheme))
    for holder in encodings:
        spaces = {
            encoding: Space(f"held {holder}", replace(INT8, encoding=encoding))
            for encoding in encodings
        }
        held = spaces.pop(holder)
        with engines(sidecar, held) as (one, _):
            tokens = tokens_of(held.layout)
            assert one.offload(one.client.prefix(tokens)) == [0, 1, 2]
            for space in spaces.values():
                with engines(sidecar, space) as (other, _):
                    prefix = other.client.prefix(tokens)
                    assert other.client.lookup(prefix) == other.load(prefix) == 0
                    assert not other.blocks.any()
                    # Not even by the others' own keys.
                    theirs = one.client.prefix(tokens)
                    assert other.client.lookup(theirs) == other.load(theirs) == 0
                    explained = other.client.explain(prefix, tokens)
                    assert {each.state for each in explained} == {KeyState.OTHER_SPACE}
                    assert {each.fields for each in explained} == {("layout.encoding",)}


def test_quantised_chunks_are_found_on_disk(tmp_path: Path) -> None:
    space = Space("disk", INT8)
    with Sidecar(tmp_path) as sidecar:
        with engines(sidecar, space) as (one, _):
            prefix, before = one.client.prefix(tokens_of(INT8)), one.chunks
            assert one.offload(prefix) == [0, 1, 2]
            sidecar.until_idle()
        assert sidecar.terminate() == 0
        sidecar.start()
        with engines(sidecar, space) as (one, _):
            assert one.load(prefix) == CHUNKS
            assert all(
                keeps_the_bound(INT8, *pair) for pair in zip(before, one.chunks, strict=True)
            )


def test_a_cache_of_another_element_size_is_refused(sidecar: Sidecar) -> None:
    space = Space("sizes", INT8)
    with engines(sidecar, space) as (one, _):
        cache = replace(PagedCache.of([one.blocks], AXES), row_bytes=31)
        with pytest.raises(InvalidRequest, match=r"layout\.head_dim, in bytes: 32 given"):
            PagedEngine(one.client, one.device, cache, staging_bytes=1 << 20)
