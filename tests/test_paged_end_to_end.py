"""Engines with paged caches beside a real service: out of one's blocks, into another's.

The device is the simulated one, in all processes: its memory crosses them as a GPU's would.
"""

import ctypes
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvtier.chunks import Prefix
from kvtier.client import Client, PagedEngine, connect
from kvtier.kernels import paged_reference as reference
from kvtier.kernels.device import Urgency
from kvtier.kernels.host import Chaos, HostDevice
from kvtier.kernels.paged import PagedCache
from tests.sidecar import HANG_S, Sidecar, prompt_of, space_of, until

LAYOUT = space_of().layout
GPU = ("gpu.device=host", "gpu.capacity=1MiB")
CHUNKS, BLOCKS, BLOCK_TOKENS = 6, 30, 4
STAGING_BYTES = 5 * LAYOUT.nbytes
SILENT_S = 2.0  # longer than a load takes
AXES = "layer,plane,block,token,head,dim"
SHAPE = (LAYOUT.layers, LAYOUT.planes, BLOCKS, BLOCK_TOKENS, LAYOUT.heads, LAYOUT.head_dim)


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    with Sidecar(tmp_path, *GPU) as running:
        yield running


class Engine:
    """An engine of its own device, client and blocks, which hold noise."""

    def __init__(self, sidecar: Sidecar, seed: int, chaos: int | None, staged: bool) -> None:
        self.device = HostDevice(None if chaos is None else Chaos(chaos))
        self.client: Client = connect(
            sidecar.target, space_of(), deadline_s=HANG_S, device=self.device
        )
        assert self.client.wait_ready(HANG_S)
        self.stream = self.device.stream(Urgency.LOADS)
        memory = self.device.allocate(int(np.prod(SHAPE)) * LAYOUT.itemsize)
        words = (ctypes.c_uint16 * (memory.nbytes // 2)).from_address(memory.address)
        self.blocks: NDArray[np.uint16] = np.ctypeslib.as_array(words).reshape(SHAPE)
        rng = np.random.default_rng(seed)
        self.blocks[...] = rng.integers(0, 1 << 16, SHAPE, np.uint16)
        each = LAYOUT.tokens // BLOCK_TOKENS
        ids = rng.permutation(BLOCKS)[: CHUNKS * each]
        self.tables: list[list[int]] = ids.reshape(CHUNKS, each).tolist()
        self.paged = PagedEngine(
            self.client,
            self.device,
            PagedCache.of([self.blocks], AXES),
            staging_bytes=STAGING_BYTES,
            least_copy_bytes=1 if staged else 1 << 40,
        )

    @property
    def chunks(self) -> list[bytes]:
        """What the blocks of the tables hold, as chunks."""
        planes = reference.planes_of([self.blocks], AXES)
        found = []
        for table in self.tables:
            chunk = np.zeros(LAYOUT.shape, np.uint16)
            reference.gather(planes, LAYOUT, chunk, table, range(LAYOUT.layers))
            found.append(chunk.tobytes())
        return found

    def offload(self, prefix: Prefix) -> int:
        """How many chunks were stored."""
        return len(self.paged.offload(prefix, self.tables, after=self.stream.record()).stored)

    def load(self, prefix: Prefix, *, by_layer: bool) -> int:
        """How many chunks are right in the blocks, which are wiped before."""
        self.blocks[...] = 0
        with self.paged.load(
            prefix, self.tables, after=self.stream.record(), by_layer=by_layer
        ) as under_way:
            return under_way.finish()

    def close(self) -> None:
        self.paged.close()
        self.client.close()
        self.device.close()


@pytest.fixture(params=[(None, True), (1, True), (2, False)], ids=["threads", "chaos", "unstaged"])
def engines(sidecar: Sidecar, request: pytest.FixtureRequest) -> Iterator[list[Engine]]:
    made = [Engine(sidecar, seed, *request.param) for seed in range(2)]
    yield made
    for engine in made:
        engine.close()


def raised(sidecar: Sidecar) -> None:
    until(lambda: sidecar.stats().counters["raised_chunks"] >= CHUNKS, "chunks are raised")


def test_what_one_engine_stores_another_loads_from_ram_and_then_from_vram(
    sidecar: Sidecar, engines: list[Engine]
) -> None:
    one, other = engines
    prefix = one.client.prefix(prompt_of(1, CHUNKS))
    stored = one.chunks
    assert one.offload(prefix) == CHUNKS
    assert one.offload(prefix) == 0  # it is held
    assert other.load(prefix, by_layer=True) == CHUNKS
    assert other.chunks == stored
    raised(sidecar)
    hits = sidecar.stats().counters["load_vram_hits"]
    for by_layer in (False, True):
        assert other.load(prefix, by_layer=by_layer) == CHUNKS
        assert other.chunks == stored
    assert sidecar.stats().counters["load_vram_hits"] == hits + 2 * CHUNKS
    until(lambda: sidecar.stats().leases == 0, "the leases ended")


def test_a_longer_prompt_stores_only_what_is_new(sidecar: Sidecar, engines: list[Engine]) -> None:
    one, other = engines
    prefix = one.client.prefix(prompt_of(1, CHUNKS))
    stored = one.chunks
    tables = one.tables[:2]
    outcome = one.paged.offload(prefix[:2], tables, after=one.stream.record())
    assert outcome.stored == [0, 1]
    assert one.offload(prefix) == CHUNKS - 2
    assert other.load(prefix, by_layer=False) == CHUNKS
    assert other.chunks == stored


@pytest.mark.parametrize("by_layer", [False, True])
def test_what_was_in_the_vram_of_a_service_that_died_is_a_miss(
    sidecar: Sidecar, engines: list[Engine], by_layer: bool
) -> None:
    one, other = engines
    prefix = one.client.prefix(prompt_of(1, CHUNKS))
    stored = one.chunks
    assert one.offload(prefix) == CHUNKS
    assert other.load(prefix, by_layer=by_layer) == CHUNKS
    raised(sidecar)
    under_way = other.paged.load(
        prefix, other.tables, after=other.stream.record(), by_layer=by_layer
    )
    assert under_way.chunks == CHUNKS
    sidecar.kill()
    assert under_way.finish() == 0
    assert other.load(prefix, by_layer=by_layer) == 0
    assert one.offload(prefix) == 0
    sidecar.start()
    assert one.client.wait_ready(HANG_S)
    until(lambda: other.client.connected, "the other is connected")
    one.paged.load(prefix, one.tables, after=one.stream.record()).finish()
    assert one.chunks == stored
    one.offload(prefix)
    assert other.load(prefix, by_layer=by_layer) == CHUNKS
    assert other.chunks == stored


def test_what_was_in_the_ram_of_a_service_that_died_is_right(
    sidecar: Sidecar, engines: list[Engine]
) -> None:
    one, other = engines
    prefix = one.client.prefix(prompt_of(1, CHUNKS))
    stored = one.chunks
    assert one.offload(prefix) == CHUNKS
    under_way = other.paged.load(prefix, other.tables, after=other.stream.record())
    sidecar.kill()
    assert under_way.finish() == CHUNKS
    assert other.chunks == stored


def test_what_a_silent_service_had_in_vram_is_a_miss(
    sidecar: Sidecar, engines: list[Engine]
) -> None:
    one, other = engines
    prefix = one.client.prefix(prompt_of(1, CHUNKS))
    assert one.offload(prefix) == CHUNKS
    assert other.load(prefix, by_layer=False) == CHUNKS
    raised(sidecar)
    under_way = other.paged.load(
        prefix, other.tables, after=other.stream.record(), deadline_s=SILENT_S
    )
    assert under_way.chunks == CHUNKS
    sidecar.signal(signal.SIGSTOP)
    try:
        assert other.client.connected  # for all that is known
        assert under_way.finish() == 0
    finally:
        sidecar.signal(signal.SIGCONT)
    assert one.load(prefix, by_layer=False) == CHUNKS
