"""What a bus may not do with memory that it has given back: a copy's end is told after its last
byte, also where it ends badly."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from kvtier.kernels.device import Device, DeviceError, Event, Span, Stream, Urgency
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos
from kvtier.tiers.base import Outcome
from kvtier.transfer.bus import Bus, Haul, Pacing
from tests.contracts.device import buffer

SLOT = 4096
SLOTS = 4
PATIENCE_S = 30.0
ONES, TWOS = b"\1" * SLOT * SLOTS, b"\2" * SLOT * SLOTS


@dataclass
class Memories:
    """VRAM full of ones and RAM full of twos: what comes down, and when, is seen."""

    device: Device
    ram: memoryview = field(default_factory=lambda: buffer(TWOS))

    def __post_init__(self) -> None:
        self.host = self.device.register(self.ram)
        self.vram = self.device.allocate(SLOT * SLOTS)
        ones = self.device.register(buffer(ONES))
        stream = self.device.stream(Urgency.LOADS)
        self.device.copy(stream, [(self.vram.span(0, SLOT * SLOTS), ones.span(0, SLOT * SLOTS))])
        stream.synchronize()

    def bring_down(self, bus: Bus, slots: Sequence[int], urgency: Urgency) -> list[Haul]:
        return [
            bus.move(self.host.span(slot * SLOT, SLOT), self.vram.span(slot * SLOT, SLOT), urgency)
            for slot in slots
        ]

    async def ends(self, hauls: Sequence[Haul]) -> list[Outcome]:
        """How the copies end. From then on their targets belong to others, who write there."""

        def reuse(_: object, haul: Haul) -> None:
            start = haul.target.offset
            self.ram[start : start + SLOT] = TWOS[:SLOT]

        for haul in hauls:
            haul.outcome.add_done_callback(lambda done, haul=haul: reuse(done, haul))  # type: ignore[misc]
        every = asyncio.gather(*(haul.outcome for haul in hauls))
        return await asyncio.wait_for(every, PATIENCE_S)

    def is_as_its_next_owner_wrote_it(self) -> bool:
        """Whether nothing came after the end was told; closes the device, which does all work that
        is left."""
        self.device.close()
        return self.ram == TWOS


@dataclass
class _Stream:
    """A stream of offloads as a lane sees it; `event` makes what its `record` gives."""

    stream: Stream
    event: Callable[[Event], Event]

    @property
    def handle(self) -> int:
        return self.stream.handle

    def record(self) -> Event:
        return self.event(self.stream.record())

    def wait(self, event: Event) -> None:
        raise AssertionError("a lane waits for no other stream")

    def synchronize(self) -> None:
        self.stream.synchronize()


@dataclass
class _LoopFirst:
    """An event that is done only after the loop has heard all it was told until then."""

    event: Event
    loop: asyncio.AbstractEventLoop

    @property
    def done(self) -> bool:
        return self.event.done

    def synchronize(self) -> None:
        asyncio.run_coroutine_threadsafe(_turns(), self.loop).result(PATIENCE_S)
        self.event.synchronize()


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class LateDevice(HostDevice):
    """Work is done when it is waited for, and that is when the loop has nothing else to do. Once
    armed, the copy numbered `bad` stands at a gate, or does what `fail` says."""

    def __init__(self) -> None:
        super().__init__(Chaos(1), memory_bytes=1 << 20)
        self.bad = -1
        self.calls = 0
        self.reached, self.gate = threading.Event(), threading.Event()
        self.loop = asyncio.get_running_loop()

    def arm(self, bad: int) -> None:
        self.bad, self.calls = bad, 0

    def event(self, event: Event) -> Event:
        return _LoopFirst(event, self.loop)

    def stream(self, urgency: Urgency) -> Stream:
        stream = super().stream(urgency)
        return _Stream(stream, self.event) if urgency is Urgency.OFFLOADS else stream

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        self.calls += 1
        inner = stream.stream if isinstance(stream, _Stream) else stream
        if self.calls - 1 == self.bad:
            self.fail(inner, pairs)
        super().copy(inner, pairs)

    def fail(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        self.reached.set()
        assert self.gate.wait(PATIENCE_S)


class Refusing(LateDevice):
    """The copy is refused."""

    def fail(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        raise DeviceError("the copy engine is on fire")


class HalfRefusing(LateDevice):
    """The copy is refused when its first pair is under way."""

    def fail(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        super(LateDevice, self).copy(stream, pairs[:1])
        raise DeviceError("the copy engine is on fire")


class Eventless(LateDevice):
    """It takes offloads and cannot say when they are done."""

    def event(self, event: Event) -> Event:
        raise DeviceError("no more events")


async def test_closing_waits_for_the_pieces_that_are_under_way() -> None:
    device = LateDevice()
    memories = Memories(device)
    bus = Bus(device, Pacing(SLOT // 2))
    bus.start()
    device.arm(1)
    hauls = memories.bring_down(bus, [0, 1], Urgency.OFFLOADS)
    assert await asyncio.to_thread(device.reached.wait, PATIENCE_S)  # one of four is under way
    closing = asyncio.create_task(bus.close())
    await asyncio.sleep(0)
    device.gate.set()
    assert await memories.ends(hauls) == [Outcome.FAILED] * 2
    await asyncio.wait_for(closing, PATIENCE_S)
    assert memories.is_as_its_next_owner_wrote_it()


@pytest.mark.parametrize("make", [Refusing, HalfRefusing])
@pytest.mark.parametrize("piece", [0, 1, 2, 3])
async def test_a_piece_that_fails_waits_for_those_before_it(
    make: type[LateDevice], piece: int
) -> None:
    device = make()
    memories = Memories(device)
    bus = Bus(device, Pacing(SLOT // 2))
    bus.start()
    device.arm(piece)
    hauls = memories.bring_down(bus, [0], Urgency.OFFLOADS)
    assert await memories.ends(hauls) == [Outcome.FAILED]
    hauls = memories.bring_down(bus, [1], Urgency.OFFLOADS)
    assert await memories.ends(hauls) == [Outcome.HIT]
    await asyncio.wait_for(bus.close(), PATIENCE_S)
    assert memories.is_as_its_next_owner_wrote_it()


async def test_a_batch_that_fails_waits_for_what_was_queued_of_it() -> None:
    device = HalfRefusing()
    memories = Memories(device)
    bus = Bus(device, Pacing())
    device.arm(0)
    bus.start()
    hauls = memories.bring_down(bus, range(SLOTS), Urgency.LOADS)
    assert Outcome.FAILED in await memories.ends(hauls)
    await asyncio.wait_for(bus.close(), PATIENCE_S)
    assert memories.is_as_its_next_owner_wrote_it()


async def test_a_copy_without_an_event_is_waited_for() -> None:
    device = Eventless()
    memories = Memories(device)
    bus = Bus(device, Pacing())
    bus.start()
    hauls = memories.bring_down(bus, [0], Urgency.OFFLOADS)
    assert await memories.ends(hauls) == [Outcome.FAILED]
    await asyncio.wait_for(bus.close(), PATIENCE_S)
    assert memories.is_as_its_next_owner_wrote_it()
