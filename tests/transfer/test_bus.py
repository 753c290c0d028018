"""Copies between RAM and a device's memory: whole, the urgent first, and never told too early."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels.device import Device, DeviceError, DeviceFault, Region, Span, Stream, Urgency
from kvtier.kernels.host import Chaos, HostDevice
from kvtier.tiers.base import Outcome
from kvtier.transfer.bus import Bus, Haul, Pacing
from tests.contracts.device import buffer
from tests.kernels.forgetful import Forgetful

SLOT = 4096
SLOTS = 8
PATIENCE_S = 30.0


class Memories:
    """Registered RAM and device memory, in slots of one size."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.ram = buffer(bytes(SLOT * SLOTS))
        self.host = device.register(self.ram)
        self.vram = device.allocate(SLOT * SLOTS)

    def span(self, region: Region, slot: int) -> Span:
        return region.span(slot * SLOT, SLOT)

    def fill(self, slot: int, content: bytes) -> None:
        self.ram[slot * SLOT : (slot + 1) * SLOT] = content

    def read(self, slot: int) -> bytes:
        return bytes(self.ram[slot * SLOT : (slot + 1) * SLOT])


@asynccontextmanager
async def running(device: Device, pacing: Pacing | None = None) -> AsyncIterator[Bus]:
    bus = Bus(device, pacing or Pacing())
    bus.start()
    try:
        yield bus
    finally:
        await bus.close()


async def arrived(hauls: Sequence[Haul]) -> list[Outcome]:
    return await asyncio.wait_for(asyncio.gather(*(haul.outcome for haul in hauls)), PATIENCE_S)


async def there_and_back(device: Device, seed: int, pacing: Pacing | None = None) -> bool:
    """Chunks go up and come down again through slots that are reused at once; whether each is what
    it was."""
    rng = random.Random(seed)
    memories = Memories(device)
    contents = [rng.randbytes(SLOT) for _ in range(4)]
    right = True
    async with running(device, pacing) as bus:
        for _ in range(2):
            for slot, content in enumerate(contents):
                memories.fill(slot, content)
            hauls = [
                bus.move(memories.span(memories.vram, slot), memories.span(memories.host, slot),
                         rng.choice(list(Urgency)))
                for slot in range(4)
            ]  # fmt: skip
            outcomes = await arrived(hauls)
            for slot in range(4):
                memories.fill(slot, bytes(SLOT))  # nobody may read the sources any more
            hauls = [
                bus.move(memories.span(memories.host, 4 + slot), memories.span(memories.vram, slot),
                         rng.choice(list(Urgency)))
                for slot in range(4)
            ]  # fmt: skip
            outcomes += await arrived(hauls)
            right &= all(outcome is Outcome.HIT for outcome in outcomes)
            right &= [memories.read(4 + slot) for slot in range(4)] == contents
            for slot in range(4):
                memories.fill(4 + slot, bytes(SLOT))
            rng.shuffle(contents)
    return right


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), chaos=st.booleans(), piece=st.sampled_from([1000, SLOT, 10**6]))
def test_every_byte_is_there_when_it_is_said_to_be(seed: int, chaos: bool, piece: int) -> None:
    device = HostDevice(Chaos(seed) if chaos else None, memory_bytes=1 << 20)
    try:
        assert asyncio.run(there_and_back(device, seed, Pacing(piece)))
    finally:
        device.close()


def waits_of(seed: int) -> int:
    device = Forgetful(HostDevice(Chaos(seed), memory_bytes=1 << 20), -1)
    assert asyncio.run(there_and_back(device, seed))
    device.close()
    return device.waits


def test_each_wait_is_needed() -> None:
    """With any one wait removed, some order that events allow shows wrong bytes."""
    most = max(waits_of(seed) for seed in range(4))
    assert most >= 4
    for forget in range(4):  # in each run there are at least as many
        seen = 0
        for seed in range(12):
            device = Forgetful(HostDevice(Chaos(seed), memory_bytes=1 << 20), forget)
            seen += not asyncio.run(there_and_back(device, seed))
            device.close()
        assert seen, f"nothing noticed that wait {forget} was missing"


class Gated(HostDevice):
    """Copies wait at a gate; notes what passed, as the number of bytes of each call."""

    def __init__(self) -> None:
        super().__init__(memory_bytes=1 << 20)
        self.gate = threading.Event()
        self.passed: list[tuple[Urgency, int]] = []
        self.reached = threading.Event()
        self._urgencies: dict[int, Urgency] = {}

    def stream(self, urgency: Urgency) -> Stream:
        stream = super().stream(urgency)
        self._urgencies[stream.handle] = urgency
        return stream

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        self.reached.set()
        assert self.gate.wait(PATIENCE_S)
        nbytes = sum(target.nbytes for target, _ in pairs)
        self.passed.append((self._urgencies[stream.handle], nbytes))
        super().copy(stream, pairs)


async def test_an_offload_lets_loads_pass_after_each_piece() -> None:
    device = Gated()
    memories = Memories(device)
    async with running(device, Pacing(SLOT // 2)) as bus:
        offload = bus.move(
            memories.span(memories.vram, 0), memories.span(memories.host, 0), Urgency.OFFLOADS
        )
        assert await asyncio.to_thread(device.reached.wait, PATIENCE_S)  # its first piece is begun
        loads = [
            bus.move(memories.span(memories.vram, slot), memories.span(memories.host, slot),
                     Urgency.LOADS)
            for slot in (1, 2)
        ]  # fmt: skip
        device.gate.set()
        assert await arrived([offload, *loads]) == [Outcome.HIT] * 3
    offloads = [place for place, (who, _) in enumerate(device.passed) if who is Urgency.OFFLOADS]
    loaded = [place for place, (who, _) in enumerate(device.passed) if who is Urgency.LOADS]
    assert [device.passed[place][1] for place in offloads] == [SLOT // 4] * 4
    assert max(loaded) < offloads[1]
    device.close()


async def test_the_other_direction_does_not_wait() -> None:
    device = Gated()
    memories = Memories(device)
    device.gate.set()
    async with running(device) as bus:
        up = bus.move(
            memories.span(memories.vram, 0), memories.span(memories.host, 0), Urgency.LOADS
        )
        down = bus.move(
            memories.span(memories.host, 1), memories.span(memories.vram, 1), Urgency.OFFLOADS
        )
        assert await arrived([up, down]) == [Outcome.HIT] * 2
    device.close()


class Failing(HostDevice):
    """Copies to or from one slot of RAM fail."""

    def __init__(self) -> None:
        super().__init__(memory_bytes=1 << 20)
        self.bad_offset = -1

    def copy(self, stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
        if any(source.offset == self.bad_offset for _, source in pairs):
            raise DeviceError("the copy engine is on fire")
        super().copy(stream, pairs)


async def test_a_copy_that_fails_is_told_and_costs_no_other() -> None:
    device = Failing()
    memories = Memories(device)
    async with running(device) as bus:
        device.bad_offset = SLOT
        moved = []
        for slot in range(3):
            haul = bus.move(
                memories.span(memories.vram, slot), memories.span(memories.host, slot),
                Urgency.LOADS,
            )  # fmt: skip
            moved += await arrived([haul])
        assert moved == [Outcome.HIT, Outcome.FAILED, Outcome.HIT]
        offload = bus.move(
            memories.span(memories.vram, 0), memories.span(memories.host, 0), Urgency.OFFLOADS
        )
        assert await arrived([offload]) == [Outcome.HIT]  # no load is counted as still under way
    device.close()


async def test_a_copy_can_be_given_up_until_it_begins() -> None:
    device = Gated()
    memories = Memories(device)
    async with running(device) as bus:
        first = bus.move(
            memories.span(memories.vram, 0), memories.span(memories.host, 0), Urgency.LOADS
        )
        assert await asyncio.to_thread(device.reached.wait, PATIENCE_S)
        second = bus.move(
            memories.span(memories.vram, 1), memories.span(memories.host, 1), Urgency.LOADS
        )
        assert second.cancel()
        assert not first.cancel()
        device.gate.set()
        assert await arrived([first, second]) == [Outcome.HIT, Outcome.FAILED]
        offload = bus.move(
            memories.span(memories.host, 2), memories.span(memories.vram, 0), Urgency.OFFLOADS
        )
        assert await arrived([offload]) == [Outcome.HIT]
    assert sum(nbytes for _, nbytes in device.passed) == 2 * SLOT
    device.close()


async def test_closing_ends_what_was_not_begun() -> None:
    device = Gated()
    memories = Memories(device)
    bus = Bus(device, Pacing(2 * SLOT, share=0.001))
    bus.start()
    hauls = [
        bus.move(memories.span(memories.vram, slot), memories.span(memories.host, slot), urgency)
        for slot, urgency in enumerate([Urgency.OFFLOADS] * 3)
    ]
    assert await asyncio.to_thread(device.reached.wait, PATIENCE_S)
    device.gate.set()
    await asyncio.wait_for(bus.close(), PATIENCE_S)  # also out of the rest after a piece
    outcomes = await arrived(hauls)
    assert outcomes[0] is Outcome.HIT
    assert outcomes[2] is Outcome.FAILED
    device.close()


async def test_a_fault_ends_all_copies_also_one_that_somebody_comes_to_wait_for() -> None:
    device = Gated()
    memories = Memories(device)
    told: list[DeviceFault] = []
    async with running(device, Pacing(SLOT)) as bus:
        bus.on_fault = told.append
        hauls = [
            bus.move(memories.span(memories.vram, slot), memories.span(memories.host, slot),
                     Urgency.OFFLOADS)
            for slot in range(2)
        ]  # fmt: skip
        assert await asyncio.to_thread(device.reached.wait, PATIENCE_S)
        fault = DeviceFault("fallen off the bus")
        for _ in range(2):
            bus._stop_at(fault)
        bus.hurry(hauls[1])
        hauls.append(
            bus.move(memories.span(memories.vram, 2), memories.span(memories.host, 2),
                     Urgency.LOADS)
        )  # fmt: skip
        device.gate.set()
        assert await arrived(hauls) == [Outcome.FAILED] * 3
        assert (told, bus.fault) == ([fault], fault)
    device.close()


async def test_what_cannot_be_moved_is_refused() -> None:
    device = HostDevice(memory_bytes=1 << 20)
    memories = Memories(device)
    async with running(device) as bus:
        with pytest.raises(ValueError, match="move"):
            bus.move(
                memories.span(memories.host, 0), memories.span(memories.host, 1), Urgency.LOADS
            )
        with pytest.raises(ValueError, match="move"):
            bus.move(memories.host.span(0, 10), memories.vram.span(0, 11), Urgency.LOADS)
    device.close()


@pytest.mark.parametrize(("nbytes", "share"), [(0, 1.0), (1, 0.0), (1, 1.1), (-5, 0.5)])
def test_pacing_out_of_range_is_refused(nbytes: int, share: float) -> None:
    with pytest.raises(ValueError, match="pacing"):
        Pacing(nbytes, share)
