"""Copies through the bus against bare asynchronous copies of the same pinned memory."""

import asyncio
import time
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from kvtier.bench.gpu.memory import Window, cut, pinned
from kvtier.bench.gpu.scale import Scale
from kvtier.bench.payload import Buffer, filled
from kvtier.bench.timing import ratio
from kvtier.config import format_bytes
from kvtier.kernels.device import Device, DeviceError, Region, Span, Stream, Urgency
from kvtier.kernels.devices import open_device
from kvtier.tiers.base import Outcome
from kvtier.transfer.bus import Bus, Pacing

WAYS = {"up": ("up",), "down": ("down",), "both": ("up", "down")}
FULL_DUPLEX_GAIN = 1.8  # of both directions at once over one, where the bus can do it


def measure(name: str, scale: Scale) -> dict[str, Any]:
    """Ratios of the bus to bare copies: each direction and both, loads and offloads, by chunk size.

    `copies_ratio` is the least of all. `copies_both_gain` is the least of what the bus carries in
    both directions at once over one direction, where bare copies gain FULL_DUPLEX_GAIN; else None.
    Raises DeviceError, WrongBytes.
    """
    with closing(open_device(name)) as device:
        by_size = asyncio.run(_by_size(device, scale))
    lanes = [
        (size[urgency.value], size["bare"]) for size in by_size.values() for urgency in Urgency
    ]
    gains = [ours["both_gain"] for ours, bare in lanes if bare["both_gain"] >= FULL_DUPLEX_GAIN]
    return {
        "copies_ratio": min(ours[way] for ours, _ in lanes for way in WAYS),
        "copies_both_gain": min(gains, default=None),
        "copies": by_size,
    }


async def _by_size(device: Device, scale: Scale) -> dict[str, Any]:
    trial = Trial(device, scale.copy_bytes)
    bus = Bus(device, Pacing())
    bus.start()
    try:
        return {
            format_bytes(nbytes): await trial.of_chunks(bus, nbytes, scale.rounds)
            for nbytes in scale.copy_chunks
        }
    finally:
        await bus.close()


@dataclass(slots=True)
class _Direction:
    """Where the bytes of one direction go, where they come from, and what they are."""

    target: Region
    source: Region
    right: Buffer
    stream: Stream

    def pairs(self, chunk_bytes: int) -> list[tuple[Span, Span]]:
        return list(zip(cut(self.target, chunk_bytes), cut(self.source, chunk_bytes), strict=True))


@dataclass(slots=True)
class _Seconds:
    """Of each round, by way."""

    bare: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    ours: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})


class Trial:
    """As many bytes up as down, in memory of their own, by bare copies and through a bus."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        self._nbytes = nbytes
        self._window = Window(device, nbytes)
        ends = {
            "up": (device.allocate(nbytes), pinned(device, nbytes).region),
            "down": (pinned(device, nbytes).region, device.allocate(nbytes)),
        }
        self._directions: dict[str, _Direction] = {}
        for seed, (way, (target, source)) in enumerate(ends.items()):
            right, stream = filled(1, nbytes, seed)[0], device.stream(Urgency.OFFLOADS)
            self._window.write(source.span(0, nbytes), right)
            self._directions[way] = _Direction(target, source, right, stream)

    async def of_chunks(self, bus: Bus, chunk_bytes: int, rounds: int) -> dict[str, Any]:
        """All ratios for chunks of one size, which divides the bytes of a direction."""
        measured = {urgency: _Seconds() for urgency in Urgency}
        for number in range(rounds + 1):  # the first does not count
            for urgency, seconds in measured.items():
                for way, names in WAYS.items():
                    chosen = [self._directions[name] for name in names]
                    bare_s = self._bare(chosen, chunk_bytes)
                    last = number == rounds
                    if last:
                        self._wipe(chosen)
                    ours_s = await self._through(bus, chosen, chunk_bytes, urgency)
                    if number:
                        seconds.bare[way].append(bare_s)
                        seconds.ours[way].append(ours_s)
                    if last:
                        self._check(chosen)
        return _figures(measured, self._nbytes)

    def _bare(self, chosen: list[_Direction], chunk_bytes: int) -> float:
        pairs = [(each.stream, each.pairs(chunk_bytes)) for each in chosen]
        start_s = time.perf_counter()
        for place in range(len(pairs[0][1])):  # in turn, so that neither direction waits to begin
            for stream, spans in pairs:
                self._device.copy(stream, [spans[place]])
        for each in chosen:
            each.stream.synchronize()
        return time.perf_counter() - start_s

    async def _through(
        self, bus: Bus, chosen: list[_Direction], chunk_bytes: int, urgency: Urgency
    ) -> float:
        columns = [each.pairs(chunk_bytes) for each in chosen]
        start_s = time.perf_counter()
        hauls = [
            bus.move(target, source, urgency)
            for row in zip(*columns, strict=True)
            for target, source in row
        ]
        outcomes = await asyncio.gather(*(haul.outcome for haul in hauls))
        elapsed_s = time.perf_counter() - start_s
        if any(outcome is not Outcome.HIT for outcome in outcomes):
            raise DeviceError("bus: a copy failed; its reason is in the log above")
        return elapsed_s

    def _wipe(self, chosen: list[_Direction]) -> None:
        for each in chosen:
            self._window.wipe(each.target.span(0, self._nbytes))

    def _check(self, chosen: list[_Direction]) -> None:
        for each in chosen:
            self._window.check(each.target.span(0, self._nbytes), each.right, "a copy by the bus")


def _figures(measured: dict[Urgency, _Seconds], nbytes: int) -> dict[str, Any]:
    """Ratios by urgency, and what bare copies do next to loads."""
    bare = measured[Urgency.LOADS].bare
    figures: dict[str, Any] = {
        urgency.value: {
            **{way: ratio(seconds.bare[way], seconds.ours[way]) for way in WAYS},
            "both_gain": gain(seconds.ours),
        }
        for urgency, seconds in measured.items()
    }
    figures["bare"] = {
        **{f"{way}_gb_s": len(WAYS[way]) * nbytes / 1e9 / median(bare[way]) for way in WAYS},
        "both_gain": gain(bare),
    }
    return figures


def gain(seconds: dict[str, list[float]]) -> float:
    """What goes in both directions at once, over what goes in one: 2 where neither slows the
    other, 1 where they take turns. The median of rounds."""
    rounds = zip(seconds["up"], seconds["down"], seconds["both"], strict=True)
    return median((up + down) / both for up, down, both in rounds)
