"""What ends a pin, and what wins over one."""

import asyncio
from pathlib import Path

from kvtier.service.answers import LoadStop, ReserveOutcome
from kvtier.service.demotion import Demotion, When, Writing
from kvtier.service.pins import Terms
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import TierId
from tests.core import SLOT_BYTES, harness
from tests.service.test_pins import flood, held, pin, unpin

WRITE = ReserveOutcome.WRITE


async def test_only_pins_made_so_end_with_their_session(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session, other = h.session(), h.session()
        h.put(session, h.chain_of(session, 1))
        pin(h, session, h.chain_of(session, 1), Terms(60, end_with_session=True))
        lasting = pin(h, session, h.chain_of(session, 1), Terms(60))
        others = pin(h, other, h.chain_of(other, 1), Terms(60, end_with_session=True))
        h.cache.end_session(session)
        listed = [each for each, _ in h.cache.pins.listed(other)]
        assert listed == [lasting.pin, others.pin]


async def test_at_a_stop_all_pins_end(tmp_path: Path) -> None:
    async with harness(tmp_path, writing=Writing(When.DEMOTE)) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 3))
        pin(h, session, h.chain_of(session, 3))
        await h.cache.pins.close()
        assert h.cache.pins.listed(session) == []
        Demotion(h.placement, Writing(When.DEMOTE), h.write_behind).stopping()
        assert await h.write_behind.flush(60.0)
        assert h.placement.index.chunks[TierId.DISK] == 3, "and what they kept is written"


# ── what wins over a pin ──────────────────────────────────────────────────────────────────────────


async def test_what_a_client_evicts_frees_its_memory_at_once(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        pinned = pin(h, session, prefix)
        assert h.cache.evict(session, prefix[2:].keys, whole_space=False) == 2
        assert h.placement.memory.arena.used_bytes == 2 * SLOT_BYTES
        [(listed, _)] = h.cache.pins.listed(session)
        assert (listed, len(listed.replicas)) == (pinned.pin, 2)
        h.cache.evict(session, [], whole_space=True)
        assert h.placement.memory.arena.used_bytes == 0
        assert h.cache.pins.listed(session) == []
        unpin(h, session, pinned)
        h.put(session, prefix)  # and its room counts no more
        assert pin(h, session, prefix).chunks == 4


async def test_what_is_evicted_while_it_is_pinned_and_read_ends_with_the_read(
    tmp_path: Path,
) -> None:
    async with harness(tmp_path) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 2)
        h.put(session, prefix)
        pin(h, session, prefix)
        _, _, lease = await h.get(session, prefix)
        h.cache.evict(session, prefix.keys, whole_space=False)
        assert h.cache.pins.listed(session) == []
        assert h.placement.memory.arena.used_bytes == 2 * SLOT_BYTES
        h.cache.release(session, lease.id)
        assert h.placement.memory.arena.used_bytes == 0


async def test_age_wins_over_a_pin(tmp_path: Path) -> None:
    async with harness(tmp_path, ttl_s=100) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 2)
        h.put(session, prefix)
        pin(h, session, prefix)
        h.clock_s[0] += 101
        assert held(h, session, prefix) == 0
        assert h.placement.memory.arena.used_bytes == 0
        assert h.cache.pins.listed(session) == []


async def test_a_corrupt_chunk_is_removed_though_it_is_pinned(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        h.only_on_disk()
        pin(h, session, prefix)
        h.store.outcomes[prefix[1]] = Outcome.CORRUPT
        came, stop, _ = await h.get(session, prefix)
        assert (came, stop) == (1, LoadStop.CORRUPT)
        assert len(h.store.chunks) == 1, "what continued it went as well"
        [(listed, _)] = h.cache.pins.listed(session)
        assert len(listed.replicas) == 1


# ── loads beside it ───────────────────────────────────────────────────────────────────────────────


async def test_a_load_outlives_the_pin_and_the_pressure_under_it(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=20) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        h.only_on_disk()
        pinned = pin(h, session, prefix)
        h.store.gate.clear()
        loading = asyncio.ensure_future(h.get(session, prefix))
        await h.store.loading.acquire()
        unpin(h, session, pinned)
        h.store.capacity_bytes = 4 * SLOT_BYTES  # so that disk, too, would give them up
        flood(h, session, 40)
        h.store.gate.set()
        came, stop, _ = await loading  # every byte is compared
        assert (came, stop) == (4, LoadStop.COMPLETE)
