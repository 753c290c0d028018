"""How much a decode loop slows down beside bulk offload.

The loop is a stand-in: each step launches kernels bound by memory bandwidth, one after the other as
layers are, and waits for them as sampling does. Offload is what the bus carries out of the device,
and what an engine brings out of its blocks.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import cycle
from statistics import median
from typing import Any

from kvtier.bench.gpu.blocks import Blocks
from kvtier.bench.gpu.engine_offload import ROOM, EngineOffload
from kvtier.bench.gpu.memory import Window, cut, pinned
from kvtier.bench.gpu.scale import Scale
from kvtier.bench.gpu.served import served
from kvtier.bench.payload import filled
from kvtier.bench.timing import seconds
from kvtier.config import Config
from kvtier.kernels.device import Device, DeviceError, Span, Urgency
from kvtier.kernels.paged import gather
from kvtier.tiers.base import Outcome
from kvtier.transfer.bus import LOADS_IN_FLIGHT_BYTES, Bus, Haul, Pacing

_SERVICE = Config().gpu  # as it is by default
PACINGS = {
    "unpaced": Pacing(LOADS_IN_FLIGHT_BYTES),
    "paced": Pacing(_SERVICE.in_flight, _SERVICE.bus_share_percent / 100),
    "half_share": Pacing(_SERVICE.in_flight, 0.5),
}


def measure(name: str, scale: Scale) -> dict[str, Any]:
    """By how many percent steps take longer beside offload by the bus, for each pacing, and beside
    an engine's; what the offload carries meanwhile; and a step alone.

    `decode_slowdown_percent` is with the service's default pacing. Raises DeviceError,
    SidecarFailed, WrongBytes.
    """
    style, chunks = scale.styles["nhd"], scale.offload_chunks
    with served(name, style.layout, ROOM * chunks, in_vram=False) as there:
        decode = _Decode(there.device, scale)
        measured = asyncio.run(_beside_bus(there.device, decode, scale))
        measured["engine"] = _beside_engine(EngineOffload(there, style, chunks), decode, scale)
    every = [alone_s for rounds in measured.values() for alone_s in rounds.alone]
    decode_figures: dict[str, Any] = {name: rounds.figures for name, rounds in measured.items()}
    return {
        "decode_slowdown_percent": decode_figures["paced"]["slowdown_percent"],
        "decode_slowdown_engine_percent": decode_figures["engine"]["slowdown_percent"],
        "decode": {**decode_figures, "step_ms_alone": 1000 * median(every) / scale.steps},
    }


def slowdown_percent(alone: list[float], beside: list[float]) -> float:
    """By how many percent work takes longer beside other work: the median over rounds, in each of
    which both were timed (in seconds) one after the other."""
    return 100 * (median(b / a for a, b in zip(alone, beside, strict=True)) - 1)


@dataclass(slots=True)
class _Rounds:
    """Of each round: seconds of the steps alone and beside offload, and GB/s of that."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    gb_s: list[float] = field(default_factory=list)

    def add(self, alone_s: float, beside_s: float, gb_s: float) -> None:
        self.alone.append(alone_s)
        self.beside.append(beside_s)
        self.gb_s.append(gb_s)

    @property
    def figures(self) -> dict[str, float]:
        return {
            "slowdown_percent": slowdown_percent(self.alone, self.beside),
            "offload_gb_s": median(self.gb_s),
        }


async def _beside_bus(device: Device, decode: "_Decode", scale: Scale) -> dict[str, _Rounds]:
    offload = _Offload(device, scale)
    buses = {name: Bus(device, pacing) for name, pacing in PACINGS.items()}
    measured = {name: _Rounds() for name in PACINGS}
    async with AsyncExitStack() as stack:
        for bus in buses.values():
            bus.start()
            stack.push_async_callback(bus.close)
        for number in range(scale.rounds + 1):  # the first does not count
            for name, rounds in measured.items():
                alone_s = await asyncio.to_thread(seconds, decode.run)
                beside = await offload.beside(decode, buses[name])
                if number:
                    rounds.add(alone_s, *beside)
    offload.check()
    return measured


def _beside_engine(offload: EngineOffload, decode: "_Decode", scale: Scale) -> _Rounds:
    rounds = _Rounds()
    with offload.engine:
        for number in range(scale.rounds + 1):
            alone_s = seconds(decode.run)
            beside = offload.beside(decode.run)
            if number:
                rounds.add(alone_s, *beside)
        offload.check()
    return rounds


class _Decode:
    """Some steps: kernels that read and write as many bytes as fit the device's bandwidth."""

    def __init__(self, device: Device, scale: Scale) -> None:
        style, count = scale.styles["nhd"], scale.kernel_chunks
        blocks = Blocks(device, style, count * style.blocks_per_chunk)
        blocks.fill()
        chunks = cut(device.allocate(count * style.layout.nbytes), style.layout.nbytes)
        self._job = gather(blocks.cache, style.layout, chunks, blocks.tables(count, seed=1))
        self._device = device
        self._stream = device.stream(Urgency.OFFLOADS)  # of the urgency that others' streams have
        self._scale = scale

    def run(self) -> None:
        job = self._job
        for _ in range(self._scale.steps):
            for _ in range(self._scale.step_launches):
                self._device.launch(self._stream, job.kernel, job.threads, job.job)
            self._stream.synchronize()


class _Offload:
    """Chunks on the device, and room for each in pinned memory."""

    def __init__(self, device: Device, scale: Scale) -> None:
        nbytes = scale.offload_chunk * scale.offload_chunks
        source, target = device.allocate(nbytes), pinned(device, nbytes).region
        self._window = Window(device, nbytes)
        self._right = filled(1, nbytes, seed=5)[0]
        self._window.write(source.span(0, nbytes), self._right)
        self._target = target.span(0, nbytes)
        chunks = (cut(region, scale.offload_chunk) for region in (target, source))
        self._pairs = list(zip(*chunks, strict=True))

    async def beside(self, decode: _Decode, bus: Bus) -> tuple[float, float]:
        """Seconds of the steps while a bus offloads chunks over and over, and GB/s of those.

        The steps begin once the first chunk has arrived.
        """
        hauls, pairs = deque[Haul](), cycle(self._pairs)
        self._keep_full(bus, hauls, pairs)
        await self._arrived(hauls)
        start_s, nbytes = time.perf_counter(), 0
        steps = asyncio.create_task(asyncio.to_thread(seconds, decode.run))
        while not steps.done():
            self._keep_full(bus, hauls, pairs)
            watched: set[asyncio.Future[Any]] = {steps, hauls[0].outcome}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            while hauls and hauls[0].outcome.done():
                nbytes += await self._arrived(hauls)
        gb_s = nbytes / 1e9 / (time.perf_counter() - start_s)
        while hauls:
            await self._arrived(hauls)
        return await steps, gb_s

    def check(self) -> None:
        """Raise WrongBytes unless every chunk arrived as it was."""
        self._window.check(self._target, self._right, "chunks as offloaded")

    def _keep_full(self, bus: Bus, hauls: deque[Haul], pairs: Iterator[tuple[Span, Span]]) -> None:
        while len(hauls) < len(self._pairs):
            hauls.append(bus.move(*next(pairs), Urgency.OFFLOADS))

    async def _arrived(self, hauls: deque[Haul]) -> int:
        """Wait for the oldest; returns its bytes."""
        haul = hauls.popleft()
        if await haul.outcome is not Outcome.HIT:
            raise DeviceError("bus: an offload failed; its reason is in the log above")
        return haul.source.nbytes
