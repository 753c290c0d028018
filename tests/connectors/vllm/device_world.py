"""An engine's blocks on the simulated device, chunks in RAM and VRAM, and what the way of the CPU
makes of them."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvtier.connectors.vllm.copies import HostCopies, Landed
from kvtier.connectors.vllm.device_copies import DeviceCopies
from kvtier.connectors.vllm.parts import Shard, parts_of
from kvtier.kernels.compiled import HostKernels
from kvtier.kernels.device import Device, DeviceError, Place, Region, Urgency
from kvtier.kernels.host import Chaos, HostDevice
from tests.connectors.vllm.making import BLOCK, MODEL, layer
from tests.connectors.vllm.paged_engines import Case, Engine, noise
from tests.contracts.device import buffer
from tests.kernels.forgetful import Forgetful

ALWAYS, NEVER = 1, 1 << 40  # least bytes of what is staged, or brought by layer
DEEP = parts_of([layer(f"model.layers.{n}.attn") for n in range(3)], MODEL, Shard(), 2 * BLOCK)
LAYERS = [name for name, _ in DEEP[0].layers]
Blocks = dict[int, list[int]]


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


@contextmanager
def device_of(kernels: Any, chaos: int | None, forget: int | None = None) -> Iterator[Any]:
    """A simulated device: threads or chaos, and perhaps one that forgets a wait."""
    device = HostDevice(None if chaos is None else Chaos(chaos), kernels)
    try:
        yield device if forget is None else Forgetful(device, forget)
    finally:
        device.close()


def bytes_of(region: Region) -> Any:
    return np.ctypeslib.as_array((ctypes.c_uint8 * region.nbytes).from_address(region.address))


@dataclass(frozen=True)
class Load:
    """What is loaded: a chunk for each place; of the first the tokens before `skip` are the
    engine's own, and of each group's table the first `gone` blocks are not kept."""

    case: Case
    places: tuple[Place, ...]
    skip: int = 0
    gone: tuple[int, ...] = (0, 0)
    least_copy_bytes: int = ALWAYS
    seed: int = 0


class World:
    """An engine whose blocks are noise once its own work is done, and copies for it."""

    def __init__(self, load: Load, device: Device) -> None:
        each = [load.case.chunk // tokens for tokens in load.case.block_tokens]
        blocks = max(each) * max(1, len(load.places)) + 3
        self.case = replace(load.case, blocks=blocks)
        self.device = device
        self.engine = Engine(self.case, load.seed)
        self.pages = self.engine.pages
        self.stream = device.stream(Urgency.LOADS)
        self.copies = DeviceCopies(
            device,
            lambda: self.stream,
            [self.pages],
            least_copy_bytes=load.least_copy_bytes,
            least_layer_bytes=ALWAYS,
        )
        self.before = [noise(memory.numel(), load.seed + 100) for memory in self.engine.memory]
        self._pinned = [device.register(buffer(each.numpy().tobytes())) for each in self.before]
        self.tables = self._tables(load, each)
        nbytes = self.pages.nbytes
        self.arenas = {
            Place.HOST: device.register(buffer(bytes(nbytes * (len(load.places) + 1)))),
            Place.DEVICE: device.allocate(nbytes * (len(load.places) + 1)),
        }
        self.chunks: list[Landed] = []
        for n, place in enumerate(load.places):
            span = self.arenas[place].span(n * nbytes, nbytes)
            bytes_of(span.region)[span.offset : span.offset + nbytes] = noise(nbytes, n + 7)
            self.chunks.append(Landed(memoryview(b""), self.tables[n], 0 if n else load.skip, span))
        self.contents = [noise(nbytes, n + 7).numpy().tobytes() for n in range(len(load.places))]

    def _tables(self, load: Load, each: Sequence[int]) -> list[Blocks]:
        """Blocks of each chunk, for each group in an order of its own."""
        groups = dict(self.engine.part.groups)
        ids: Blocks = {}
        for group in groups:
            rng = np.random.default_rng([load.seed, group])
            count = each[group] * len(load.places)
            ids[group] = (1 + rng.permutation(self.case.blocks - 1)[:count]).tolist()
            gone = min(load.gone[group], count)
            ids[group][:gone] = [0] * gone
        return [
            {group: ids[group][n * each[group] : (n + 1) * each[group]] for group in groups}
            for n in range(len(load.places))
        ]

    def work(self) -> None:
        """Queue the engine's own work, which leaves its blocks as `before` says."""
        for memory, pinned in zip(self.engine.memory, self._pinned, strict=True):
            self.device.copy(self.stream, [(self._adopted(memory), pinned.span(0, pinned.nbytes))])

    def wait(self) -> None:
        """Wait for the engine's work, on a device that forgets waits as well."""
        getattr(self.stream, "stream", self.stream).synchronize()

    def see(self) -> Engine:
        """Queue a copy of all blocks, as the engine's next work would read them."""
        seen = Engine(self.case, 3)
        for memory, now in zip(seen.memory, self.engine.memory, strict=True):
            self.device.copy(self.stream, [(self._adopted(memory), self._adopted(now))])
        return seen

    def expected(self) -> Engine:
        """The engine once all chunks are there, by the way of the CPU."""
        after = self.untouched()
        HostCopies().scatter(
            after.pages,
            [
                replace(chunk, data=memoryview(content))
                for chunk, content in zip(self.chunks, self.contents, strict=True)
            ],
            None,
        )
        return after

    def untouched(self) -> Engine:
        """The engine once its own work is done."""
        engine = Engine(self.case, 5)
        for memory, content in zip(engine.memory, self.before, strict=True):
            memory.copy_(content)
        return engine

    def gathered(self, index: int) -> bytes:
        """A chunk out of the blocks of a table, by the way of the CPU."""
        data = bytearray(self.pages.nbytes)
        HostCopies().gather(self.untouched().pages, memoryview(data), self.tables[index], None)
        return bytes(data)

    def spoil(self) -> None:
        """The chunks' memory is another's."""
        for arena in self.arenas.values():
            bytes_of(arena)[:] ^= 0x5A

    def same(self, one: Engine, other: Engine) -> bool:
        """Whether all bytes are the same."""
        return all(map(torch.equal, one.memory, other.memory))

    def same_layer(self, one: Engine, other: Engine, name: str) -> bool:
        return torch.equal(
            one.caches[name].contiguous().view(torch.uint8),
            other.caches[name].contiguous().view(torch.uint8),
        )

    def _adopted(self, memory: Any) -> Any:
        region = self.device.adopt(memory.data_ptr(), memory.numel())
        return region.span(0, region.nbytes)
