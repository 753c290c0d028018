"""An engine with paged blocks on the simulated device, and a stand-in for client and service."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from kvtier.chunks import Prefix, chain, pack_tokens
from kvtier.client import Client, LoadedChunk, Offloaded, PagedEngine, PagedLoad, WriteSlot
from kvtier.encodings import EXACT, Scheme
from kvtier.kernels import paged_reference as reference
from kvtier.kernels import quantised_reference
from kvtier.kernels.compiled import HostKernels
from kvtier.kernels.copying import Copier
from kvtier.kernels.device import Device, DeviceError, Place, Region, Urgency
from kvtier.kernels.host import Chaos, HostDevice
from kvtier.kernels.paged import PagedCache
from kvtier.spaces import Layout, Space
from tests.contracts.device import buffer
from tests.kernels.forgetful import Forgetful

Bytes = NDArray[np.uint8]
COPIER = Copier()
ALWAYS, NEVER = 1, 1 << 40  # least bytes of what is staged
LAYERS = 3


class CountedKernels:
    """The kernels, and how many were run."""

    def __init__(self, kernels: HostKernels) -> None:
        self._kernels = kernels
        self.runs = 0
        self.fail = False

    def run(self, kernel: str, threads: int, job_address: int) -> None:
        if self.fail:
            raise DeviceError("a kernel is on fire")
        self.runs += 1
        self._kernels.run(kernel, threads, job_address)


def bytes_of(region: Region) -> Bytes:
    """A region's bytes, as the simulated device's memory allows."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * region.nbytes).from_address(region.address))


# ── the other side ────────────────────────────────────────────────────────────────────────────────


class Shelf:
    """Stands for client and service: a slot for each chunk, in RAM or in VRAM.

    Slots are another's as soon as the lease is released: they are overwritten then. What is
    offloaded is taken out of its slot as soon as it has arrived, once the loop has ended.
    """

    def __init__(self, device: Device, space: Space, places: Sequence[Place]) -> None:
        self.space = space
        self.alive = True
        self.reaches_device = True
        self.asked = 0
        self.keys: list[bytes] = []  # of the slots, in order
        self.stored: dict[int, bytes] = {}
        self.wanted: Sequence[int] = range(len(places))
        nbytes = space.layout.nbytes
        self.regions = {
            Place.HOST: device.register(buffer(bytes(nbytes * (len(places) + 1)))),
            Place.DEVICE: device.allocate(nbytes * (len(places) + 1)),
        }
        self.slots = [
            self.regions[place].span(n * nbytes, nbytes) for n, place in enumerate(places)
        ]

    def content(self, index: int) -> Bytes:
        slot = self.slots[index]
        return bytes_of(slot.region)[slot.offset : slot.offset + slot.nbytes]

    def load(self, prefix: Prefix, deadline_s: float | None, *, in_vram: bool) -> "Lent":
        assert in_vram
        self.asked += 1
        first = self.keys.index(prefix[0]) if len(prefix) else 0
        return Lent(self, range(first, first + len(prefix)))

    def offload(self, prefix: Prefix, deadline_s: float | None) -> "Taken":
        self.asked += 1
        return Taken(self)


@dataclass
class Lent:
    """A load of some slots."""

    shelf: Shelf
    slots: range
    released: bool = False

    def __enter__(self) -> Self:
        return self

    def __iter__(self) -> Iterator[LoadedChunk]:
        for index, slot in enumerate(self.shelf.slots[self.slots.start : self.slots.stop]):
            span = slot if self.shelf.reaches_device else None
            yield LoadedChunk(index, memoryview(b""), self.shelf.space.layout.tokens, COPIER, span)

    def release(self) -> bool:
        self.released = True
        for index in self.slots:
            self.shelf.content(index)[:] ^= 0x5A
        return self.shelf.alive

    def __exit__(self, *_: object) -> None:
        if not self.released:
            self.release()


@dataclass
class Taken:
    """An offload of what is wanted."""

    shelf: Shelf
    outcome: Offloaded = field(default_factory=Offloaded)
    coming: list[WriteSlot] = field(default_factory=list)

    def __iter__(self) -> Iterator[WriteSlot]:
        for index in self.shelf.wanted:
            span = self.shelf.slots[index] if self.shelf.reaches_device else None
            slot = WriteSlot(index, memoryview(b""), COPIER, span)
            yield slot
            self.coming.append(slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self.coming:
            assert slot.arrival is not None
            slot.arrival.synchronize()
            self.shelf.stored[slot.index] = self.shelf.content(slot.index).tobytes()
            self.outcome.stored.append(slot.index)


# ── the engine ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Style:
    """How an engine lays out its cache, and how chunks are laid out for it."""

    axes: str
    pairs: bool = False  # an array for keys and one for values
    planes: int = 2
    heads: int = 2
    chunk_axes: str = "layer,plane,head,token,dim"
    encoding: str = EXACT


STYLES = [
    Style("block,token,head,dim", pairs=True),
    Style("block,head,token,dim", pairs=True),
    Style("plane,block,token,head,dim"),
    Style("block,plane,token,head,dim"),
    Style("block,token,dim", planes=1, heads=1, chunk_axes="plane,layer,head,token,dim"),
    Style("block,layer,plane,head,token,dim"),
    Style("block,head,token,plane,dim", chunk_axes="layer,head,token,plane,dim"),
    Style("block,token,head,dim", pairs=True, chunk_axes="plane,layer,token,head,dim"),
    Style("block,token,head,dim", pairs=True, encoding=Scheme.INT8.value),
    Style("block,layer,plane,head,token,dim", encoding=Scheme.INT4.value),
]

MIXED = (Place.HOST, Place.HOST, Place.DEVICE, Place.HOST, Place.HOST, Place.HOST)


@dataclass(frozen=True)
class Case:
    """What is loaded or offloaded, and how."""

    style: Style = STYLES[0]
    places: tuple[Place, ...] = (Place.HOST,) * 5
    tokens: int = 8
    block_tokens: int = 4
    spare_blocks: int = 2
    first_token: int = 0
    by_layer: bool = False
    least_copy_bytes: int = ALWAYS
    buffers: int = 4
    seed: int = 0


class World:
    """An engine with blocks on a device, a shelf full of chunks, and what should come of it."""

    def __init__(self, case: Case, device: Device) -> None:
        style = case.style
        self.case = case
        self.device = device
        self.layout = Layout(
            "float16", LAYERS, style.heads, 6, case.tokens, style.planes, style.chunk_axes,
            encoding=style.encoding,
        )  # fmt: skip
        space = Space("m", self.layout)
        self.shelf = Shelf(device, space, case.places)
        chunks = len(case.places)
        self.prefix = chain(space.digest, pack_tokens(range(chunks * case.tokens)), case.tokens)
        self.shelf.keys = list(self.prefix)
        each = -(-case.tokens // case.block_tokens)
        blocks = each * chunks + case.spare_blocks
        rng = np.random.default_rng(case.seed)
        ids = rng.permutation(blocks)[: each * chunks]
        self.tables: list[list[int]] = ids.reshape(chunks, each).tolist()
        sizes = {"block": blocks, "token": case.block_tokens, "head": style.heads, "dim": 6}
        sizes |= {"layer": LAYERS, "plane": style.planes}
        self.shape = tuple(sizes[name] for name in style.axes.split(","))
        self.arrays = (1 if "layer" in style.axes else LAYERS) * (
            style.planes if style.pairs else 1
        )
        nbytes = int(np.prod(self.shape)) * 2 * self.arrays
        self.blocks = device.allocate(nbytes)
        self.cache = PagedCache.of(self.layers(bytes_of(self.blocks)), style.axes)
        self.stream = device.stream(Urgency.LOADS)
        self.before: Bytes = rng.integers(0, 256, nbytes, np.uint8)
        self._ram = device.register(buffer(self.before.tobytes()))
        for index in range(chunks):
            bits = rng.integers(0, 1 << 16, self.layout.shape, np.uint16)
            self.shelf.content(index)[:] = self.encoded(bits)
        self.chunks = [self.shelf.content(index).copy() for index in range(chunks)]
        self.paged = PagedEngine(
            cast(Client, self.shelf),
            device,
            self.cache,
            staging_bytes=case.buffers * -(-self.layout.nbytes // 256) * 256,
            least_copy_bytes=case.least_copy_bytes,
        )

    def layers(self, everything: Bytes) -> list[tuple[NDArray[np.uint16], ...]]:
        """The engine's arrays in all bytes of its cache."""
        each = everything.view(np.uint16).reshape(self.arrays, *self.shape)
        step = self.case.style.planes if self.case.style.pairs else 1
        return [tuple(each[n : n + step]) for n in range(0, self.arrays, step)]

    def expected(self, chunks: int, layers: range = range(LAYERS)) -> Bytes:
        """The bytes of the blocks once so many chunks and those layers are there."""
        after = self.before.copy()
        planes = reference.planes_of(self.layers(after), self.case.style.axes)
        for index in range(chunks):
            chunk = self.decoded(self.chunks[index])
            first = self.case.first_token if index == 0 else 0
            reference.scatter(planes, self.layout, chunk, self.tables[index], layers, first)
        return after

    def gathered(self, index: int) -> bytes:
        """The bytes of a chunk that holds what the blocks held before."""
        chunk = np.zeros(self.layout.shape, np.uint16)
        planes = reference.planes_of(self.layers(self.before), self.case.style.axes)
        reference.gather(planes, self.layout, chunk, self.tables[index], range(LAYERS))
        return self.encoded(chunk).tobytes()

    def encoded(self, bits: NDArray[np.uint16]) -> Bytes:
        """A chunk's bytes, of the bits of its elements."""
        if self.layout.encoding == EXACT:
            return bits.ravel().view(np.uint8)
        return quantised_reference.encode(bits.view(np.float16), self.layout)

    def decoded(self, chunk: Bytes) -> NDArray[np.uint16]:
        """The bits of a chunk's elements, of its bytes."""
        if self.layout.encoding == EXACT:
            return chunk.view(np.uint16).reshape(self.layout.shape)
        return quantised_reference.decode(chunk, self.layout).view(np.uint16)

    def work(self) -> None:
        """Queue the engine's own work, which leaves its blocks as `before` says."""
        nbytes = self.before.size
        pairs = [(self.blocks.span(0, nbytes), self._ram.span(0, nbytes))]
        self.device.copy(self.stream, pairs)

    def load(self, first: int = 0, stop: int | None = None) -> PagedLoad:
        """Load the chunks from `first` up to `stop`, after the engine's work."""
        if not first:
            self.work()
        return self.paged.load(
            self.prefix[first:stop],
            self.tables[first:stop],
            after=self.stream.record(),
            first_token=0 if first else self.case.first_token,
            by_layer=self.case.by_layer,
        )

    def offload(self) -> Offloaded:
        self.work()
        return self.paged.offload(self.prefix, self.tables, after=self.stream.record())

    def see(self) -> Region:
        """Queue a copy of all blocks, as the engine's next work would read them."""
        seen = self.device.allocate(self.before.size)
        whole = self.blocks.span(0, seen.nbytes)
        self.device.copy(self.stream, [(seen.span(0, seen.nbytes), whole)])
        return seen

    def has_layers(self, everything: Bytes, upto: int) -> bool:
        """Whether layers before `upto` are as they should be once all chunks are there."""
        planes = [
            reference.planes_of(self.layers(each), self.case.style.axes)[:upto]
            for each in (everything, self.expected(len(self.chunks)))
        ]
        flat = [[plane for layer in each for plane in layer] for each in planes]
        return all(np.array_equal(one, other) for one, other in zip(*flat, strict=True))


@contextmanager
def device_of(kernels: Any, chaos: int | None, forget: int | None = None) -> Iterator[Any]:
    """A simulated device: threads or chaos, and perhaps one that forgets a wait."""
    device = HostDevice(None if chaos is None else Chaos(chaos), kernels)
    try:
        yield device if forget is None else Forgetful(device, forget)
    finally:
        device.close()


def nothing_comes_later(world: World) -> bool:
    """Whether what loads and offloads may read and write stays as it is, once all is done."""
    memory = [world.blocks, world.paged._staging, *world.shelf.regions.values()]
    now = [bytes_of(region).tobytes() for region in memory]
    loads, offloads = world.paged._loads, world.paged._offloads
    for stream in (loads._copies, loads._scatters, offloads._gathers, offloads._copies):
        with suppress(DeviceError):
            stream.synchronize()
    return now == [bytes_of(region).tobytes() for region in memory]
