"""Room, heads and waits of the VRAM tier: what the state machine rarely meets."""

import asyncio
import tempfile
from pathlib import Path

from kvtier.chunks import Prefix
from kvtier.kernels.device import Device
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos
from kvtier.service.sessions import Session
from kvtier.tiers.tree import TierId
from tests.core import SLOT_BYTES, Harness, harness
from tests.fakes import MemoryStore
from tests.kernels.forgetful import Forgetful
from tests.service.test_vram_machine import PATIENCE_S, Eyes, Play


async def used(core: Harness, session: Session, prefix: Prefix) -> list[TierId]:
    """Store what is missing of a prompt, load it and wait; says where its chunks were."""
    core.put(session, prefix)
    came, _, lease = await core.get(session, prefix)
    tiers = [lease.replicas[index].tier for index in range(came)]
    core.cache.release(session, lease.id)
    while not core.raisings_idle():  # noqa: ASYNC110 - copies report to the loop alone
        await asyncio.sleep(0)
    return tiers


async def test_room_for_a_chunk_is_not_made_of_its_own_source(tmp_path: Path) -> None:
    device, store = HostDevice(memory_bytes=1 << 20), MemoryStore(capacity_bytes=1)
    async with harness(tmp_path, 8, device=device, vram_slots=4, store=store) as core:
        assert core.raisings is not None
        session = core.session(in_vram=True)
        for seed in range(3):
            await used(core, session, core.chain_of(session, 1, seed))
        core.only_on_disk()  # VRAM alone has these: they are brought down when it needs room
        source, *others = (core.chain_of(session, 1, seed) for seed in range(10, 17))
        for prefix in (source, *others):
            core.put(session, prefix)
        await used(core, session, core.chain_of(session, 1, 20))  # what VRAM may give up
        core.raisings.raise_up([session.branch.nodes[source[0]]])
        await Play(core, Eyes(device)).copies_settle()
        assert await used(core, session, source) == [TierId.GPU]
        Play(core, Eyes(device)).check_slots()


async def test_the_tail_of_a_prompt_follows_its_head_into_vram(tmp_path: Path) -> None:
    device = HostDevice(memory_bytes=1 << 20)
    async with harness(tmp_path, device=device) as core:
        session = core.session(in_vram=True)
        whole = core.chain_of(session, 4)
        await used(core, session, whole[:2])
        assert await core.write_behind.flush(PATIENCE_S)
        core.only_on_disk()  # the head is in VRAM and on disk, and no longer in RAM
        assert await used(core, session, whole) == [TierId.GPU] * 2 + [TierId.CPU] * 2
        assert await used(core, session, whole) == [TierId.GPU] * 4
        assert await core.write_behind.flush(PATIENCE_S)


async def goes_up_and_down(folder: Path, device: Device, eyes: Eyes) -> bool:
    """Chunks go to VRAM and come down again, one at a time; whether each is right at once."""
    async with harness(folder, 4, device=device, vram_slots=4) as core:
        play = Play(core, eyes)
        session, other = core.session(in_vram=True), core.session()
        right = True
        for seed in range(3):
            prefix = core.chain_of(session, 1, seed)
            await used(core, session, prefix)
            node = session.branch.nodes[prefix[0]]
            right &= (there := node.ready(TierId.GPU)) is not None and play.is_right(there)
            assert await core.write_behind.flush(PATIENCE_S)
            core.only_on_disk()
            core.placement.memory.region.view[:] = bytes(4 * SLOT_BYTES)  # nor in a free slot
            lease = core.cache.open_read(other, 1)
            chunks, _ = core.cache.load(other, lease, prefix.keys, None)
            async for landed in chunks:
                right &= all(play.is_right(replica) for _, replica in landed.chunks)
            core.cache.release(other, lease.id)
        assert core.placement.counters.lowered_chunks == 3
        return right


def test_each_wait_of_the_tier_is_needed() -> None:
    """With any one wait removed, some order that events allow shows wrong bytes."""

    def run(seed: int, forget: int) -> tuple[bool, int]:
        inner = HostDevice(Chaos(seed), memory_bytes=1 << 20)
        device = Forgetful(inner, forget)
        with tempfile.TemporaryDirectory() as folder:
            right = asyncio.run(goes_up_and_down(Path(folder), device, Eyes(inner)))
        return right, device.waits

    assert [run(seed, -1) for seed in range(8)] == [(True, 6)] * 8  # three up, three down
    for forget in range(6):
        noticed = sum(not run(seed, forget)[0] for seed in range(12))
        assert noticed, f"nothing noticed that wait {forget} was missing"
