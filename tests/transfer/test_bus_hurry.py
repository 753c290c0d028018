"""An offload that somebody comes to wait for goes with the loads, unless it has begun."""

import asyncio

from kvtier.kernels.device import Urgency
from kvtier.tiers.base import Outcome
from kvtier.transfer.bus import Bus, Haul, Pacing
from tests.transfer.test_bus import PATIENCE_S, SLOT, Gated, Memories, arrived, running

OFFLOAD, LOAD = (Urgency.OFFLOADS, SLOT), (Urgency.LOADS, SLOT)


def down(bus: Bus, memories: Memories, slot: int) -> Haul:
    """Begin an offload of one slot from the device to RAM."""
    return bus.move(
        memories.span(memories.host, slot), memories.span(memories.vram, slot), Urgency.OFFLOADS
    )


async def test_it_passes_the_offloads_before_it() -> None:
    device = Gated()
    memories = Memories(device)
    async with running(device, Pacing(2 * SLOT)) as bus:
        begun = down(bus, memories, 0)
        assert await asyncio.to_thread(device.reached.wait, PATIENCE_S)
        waiting = [down(bus, memories, slot) for slot in (1, 2, 3)]
        bus.hurry(waiting[2])
        bus.hurry(waiting[2])  # it is there already
        bus.hurry(begun)  # too late
        device.gate.set()
        assert await arrived([begun, *waiting]) == [Outcome.HIT] * 4
        assert sorted(device.passed[:2], key=str) == sorted([OFFLOAD, LOAD], key=str)
        assert device.passed[2:] == [OFFLOAD, OFFLOAD]
        later = down(bus, memories, 4)  # no load is counted as still under way
        assert await arrived([later]) == [Outcome.HIT]
    device.close()


async def test_what_has_begun_stays_where_it_is() -> None:
    """In the middle of its pieces, too: two streams would not know of each other."""
    device = Gated()
    memories = Memories(device)
    async with running(device, Pacing(SLOT // 2)) as bus:
        begun = down(bus, memories, 0)
        assert await asyncio.to_thread(device.reached.wait, PATIENCE_S)
        bus.hurry(begun)
        device.gate.set()
        assert await arrived([begun]) == [Outcome.HIT]
        assert device.passed == [(Urgency.OFFLOADS, SLOT // 4)] * 4
    device.close()


async def test_what_was_given_up_is_not_hurried() -> None:
    device = Gated()
    memories = Memories(device)
    async with running(device, Pacing(2 * SLOT)) as bus:
        begun = down(bus, memories, 0)
        assert await asyncio.to_thread(device.reached.wait, PATIENCE_S)
        waiting = down(bus, memories, 1)
        assert waiting.cancel()
        bus.hurry(waiting)
        device.gate.set()
        assert await arrived([begun, waiting]) == [Outcome.HIT, Outcome.FAILED]
        assert device.passed == [OFFLOAD]
    device.close()


async def test_it_can_be_given_up_afterwards() -> None:
    device = Gated()
    memories = Memories(device)
    async with running(device, Pacing(2 * SLOT)) as bus:
        device.gate.set()
        load = bus.move(
            memories.span(memories.host, 0), memories.span(memories.vram, 0), Urgency.LOADS
        )
        assert await arrived([load]) == [Outcome.HIT]
        device.gate.clear()
        device.reached.clear()
        blocking = bus.move(
            memories.span(memories.host, 0), memories.span(memories.vram, 0), Urgency.LOADS
        )
        assert await asyncio.to_thread(device.reached.wait, PATIENCE_S)
        hurried = down(bus, memories, 1)
        bus.hurry(hurried)
        assert hurried.cancel(), "the lane of the loads is at the gate"
        device.gate.set()
        assert await arrived([blocking, hurried]) == [Outcome.HIT, Outcome.FAILED]
        assert await arrived([down(bus, memories, 2)]) == [Outcome.HIT]
    device.close()
