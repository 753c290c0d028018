"""The VRAM tier: raised on a hit, found by engines on the device, brought down when needed."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.config import Config
from kvtier.kernels.host import HostDevice
from kvtier.kernels.host_streams import Chaos
from kvtier.service.answers import KeyState, LoadStop, ReserveOutcome
from kvtier.service.explain import Explainer
from kvtier.service.leases import Lease
from kvtier.tiers.tree import TierId
from tests.core import Harness, harness
from tests.fakes import MemoryStore

PATIENCE_S = 30.0


def device(seed: int | None = None) -> HostDevice:
    return HostDevice(Chaos(seed) if seed is not None else None, memory_bytes=1 << 20)


async def until(there: Callable[[], bool]) -> None:
    """Give the loop to the copies until they have come so far."""
    async with asyncio.timeout(PATIENCE_S):
        while not there():  # noqa: ASYNC110 - copies report to the loop alone
            await asyncio.sleep(0)


async def raised(core: Harness, chunks: int) -> None:
    await until(lambda: core.placement.counters.raised_chunks == chunks)


def tiers_of(lease: Lease) -> list[TierId]:
    return [lease.replicas[index].tier for index in sorted(lease.replicas)]


def drop_from_ram(core: Harness) -> None:
    """Drop every RAM replica that may go, with the disk tier as it is."""
    core.only_on_disk()
    assert core.placement.index.chunks[TierId.CPU] == 0


async def on_disk(core: Harness, chunks: int) -> None:
    await until(lambda: core.placement.index.chunks[TierId.DISK] == chunks)


@pytest.mark.parametrize("seed", [None, 1, 2])
async def test_what_was_found_in_ram_is_found_in_vram_next(tmp_path: Path, seed: int) -> None:
    on = device(seed)
    async with harness(tmp_path, device=on) as core:
        session = core.session(in_vram=True)
        prefix = core.chain_of(session, 5)
        core.put(session, prefix)
        came, stop, lease = await core.get(session, prefix)
        assert (came, stop, tiers_of(lease)) == (5, LoadStop.COMPLETE, [TierId.CPU] * 5)
        core.cache.release(session, lease.id)
        await raised(core, 5)
        came, stop, lease = await core.get(session, prefix)  # checks every byte
        assert (came, stop, tiers_of(lease)) == (5, LoadStop.COMPLETE, [TierId.GPU] * 5)
        assert core.placement.counters.load_vram_hits == 5
        gpu = core.cache.tiers()[0]
        assert (gpu.name, gpu.chunks, gpu.used_bytes) == ("gpu", 5, 5 * 4096)


async def test_nothing_is_raised_while_the_client_reads(tmp_path: Path) -> None:
    async with harness(tmp_path, device=device()) as core:
        session = core.session(in_vram=True)
        prefix = core.chain_of(session, 3)
        core.put(session, prefix)
        _, _, lease = await core.get(session, prefix)
        assert core.raisings is not None
        assert core.raisings.under_way_bytes == 0, "the bus is the client's"
        core.cache.release(session, lease.id)
        assert core.raisings.under_way_bytes == 3 * 4096
        await raised(core, 3)


async def test_who_does_not_reach_vram_is_answered_in_ram(tmp_path: Path) -> None:
    async with harness(tmp_path, device=device()) as core:
        session, other = core.session(in_vram=True), core.session()
        prefix = core.chain_of(session, 3)
        core.put(session, prefix)
        _, _, lease = await core.get(session, prefix)
        core.cache.release(session, lease.id)
        await raised(core, 3)
        _, _, lease = await core.get(other, prefix)
        assert tiers_of(lease) == [TierId.CPU] * 3


async def test_what_vram_alone_holds_is_brought_down_for_them(tmp_path: Path) -> None:
    async with harness(tmp_path, device=device()) as core:
        session, other = core.session(in_vram=True), core.session()
        prefix = core.chain_of(session, 3)
        core.put(session, prefix)
        await on_disk(core, 3)
        _, _, lease = await core.get(session, prefix)
        core.cache.release(session, lease.id)
        await raised(core, 3)
        drop_from_ram(core)
        assert core.cache.lookup(other, prefix.keys) == (3, 3)
        came, _, lease = await core.get(other, prefix)
        assert (came, tiers_of(lease)) == (3, [TierId.CPU] * 3)
        assert core.placement.counters.lowered_chunks == 3
        assert core.placement.counters.promoted_chunks == 0  # the disk was not asked


async def test_a_full_tier_gives_up_what_was_used_longest_ago(tmp_path: Path) -> None:
    async with harness(tmp_path, device=device(), vram_slots=8) as core:
        session = core.session(in_vram=True)
        chains = [core.chain_of(session, 2, seed) for seed in range(6)]
        for number, prefix in enumerate(chains):
            core.put(session, prefix)
            _, _, lease = await core.get(session, prefix)
            core.cache.release(session, lease.id)
            await raised(core, 2 * (number + 1))
        _, _, lease = await core.get(session, chains[5])
        assert tiers_of(lease) == [TierId.GPU] * 2
        _, _, lease = await core.get(session, chains[0])
        assert tiers_of(lease) == [TierId.CPU] * 2
        assert core.placement.counters.evicted_gpu >= 4
        assert core.placement.counters.evicted_cpu == 0


async def test_a_leased_slot_is_not_given_up(tmp_path: Path) -> None:
    async with harness(tmp_path, device=device(), vram_slots=4) as core:
        session = core.session(in_vram=True)
        held = core.chain_of(session, 1, 1)
        core.put(session, held)
        _, _, lease = await core.get(session, held)
        core.cache.release(session, lease.id)
        await raised(core, 1)
        _, _, lease = await core.get(session, held)
        assert tiers_of(lease) == [TierId.GPU]
        before = core.bytes_of(lease.replicas[0])
        for seed in range(2, 12):
            prefix = core.chain_of(session, 1, seed)
            core.put(session, prefix)
            _, _, other = await core.get(session, prefix)
            core.cache.release(session, other.id)
            await raised(core, seed)
        assert core.bytes_of(lease.replicas[0]) == before


async def test_what_vram_alone_holds_is_not_lost_for_room(tmp_path: Path) -> None:
    store = MemoryStore(capacity_bytes=1)  # nothing fits on disk
    async with harness(tmp_path, slots=8, device=device(), vram_slots=4, store=store) as core:
        session = core.session(in_vram=True)
        first = core.chain_of(session, 1, 1)
        core.put(session, first)
        _, _, lease = await core.get(session, first)
        core.cache.release(session, lease.id)
        await raised(core, 1)
        drop_from_ram(core)
        for seed in range(2, 8):
            prefix = core.chain_of(session, 1, seed)
            core.put(session, prefix)
            _, _, lease = await core.get(session, prefix)
            core.cache.release(session, lease.id)
            await until(core.raisings_idle)
        came, _, _ = await core.get(session, first)
        assert came == 1
        assert core.placement.counters.lowered_chunks >= 1


async def test_a_chunk_removed_while_it_is_raised_does_not_come_back(tmp_path: Path) -> None:
    async with harness(tmp_path, device=device()) as core:
        session = core.session(in_vram=True)
        prefix = core.chain_of(session, 2)
        core.put(session, prefix)
        _, _, lease = await core.get(session, prefix)
        core.cache.release(session, lease.id)
        assert await core.cache.evict(session, prefix.keys, whole_space=False) >= 1
        await until(core.raisings_idle)
        assert core.cache.lookup(session, prefix.keys) == (0, 0)
        assert core.placement.index.chunks[TierId.GPU] == 0
        assert core.put(session, prefix) == [ReserveOutcome.WRITE] * 2


async def test_explain_names_vram(tmp_path: Path) -> None:
    async with harness(tmp_path, device=device()) as core:
        session = core.session(in_vram=True)
        prefix = core.chain_of(session, 1)
        core.put(session, prefix)
        await on_disk(core, 1)
        _, _, lease = await core.get(session, prefix)
        core.cache.release(session, lease.id)
        await raised(core, 1)
        drop_from_ram(core)
        explainer = Explainer(core.placement.index, core.placement.history, Config())
        (answer,) = explainer.explain(session.branch, prefix.keys, b"", [])
        assert answer.state is KeyState.VRAM


async def test_copies_that_fail_leave_the_chunk_where_it_is(tmp_path: Path) -> None:
    on = device()
    async with harness(tmp_path, device=on) as core:
        session = core.session(in_vram=True)
        prefix = core.chain_of(session, 2)
        core.put(session, prefix)
        vram = core.vram
        assert vram is not None
        vram.device.release(vram.ram)  # the device's copies fail from here on
        _, _, lease = await core.get(session, prefix)
        core.cache.release(session, lease.id)
        await until(core.raisings_idle)
        assert core.placement.counters.raised_chunks == 0
        came, stop, lease = await core.get(session, prefix)
        assert (came, stop, tiers_of(lease)) == (2, LoadStop.COMPLETE, [TierId.CPU] * 2)
        core.cache.release(session, lease.id)
        await until(core.raisings_idle)
        vram.ram = vram.device.register(core.placement.memory.region.view)


async def test_what_vram_cannot_give_is_asked_of_the_disk_next(tmp_path: Path) -> None:
    async with harness(tmp_path, device=device()) as core:
        session, other = core.session(in_vram=True), core.session()
        prefix = core.chain_of(session, 1)
        core.put(session, prefix)
        await on_disk(core, 1)
        _, _, lease = await core.get(session, prefix)
        core.cache.release(session, lease.id)
        await raised(core, 1)
        drop_from_ram(core)
        vram = core.vram
        assert vram is not None
        vram.device.release(vram.ram)  # the device's copies fail from here on
        came, stop, _ = await core.get(other, prefix)
        assert (came, stop) == (0, LoadStop.FAILED)
        came, stop, lease = await core.get(other, prefix)
        assert (came, stop, tiers_of(lease)) == (1, LoadStop.COMPLETE, [TierId.CPU])
        assert core.placement.counters.promoted_chunks == 1
        vram.ram = vram.device.register(core.placement.memory.region.view)
