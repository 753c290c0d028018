"""What is read ahead of a load delays no load, and goes when its asker does."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

import kvtier
from kvtier.chunks import Prefix
from kvtier.config import Config
from kvtier.kernels.device import Urgency
from kvtier.proto import cache_pb2 as pb
from kvtier.service.answers import LoadStop, ReserveOutcome
from kvtier.service.curves import curves_of
from kvtier.service.explain import Explainer
from kvtier.service.servicer import Servicer
from kvtier.service.sessions import Session
from kvtier.tiers.tree import State, TierId
from tests.core import Harness, harness, space
from tests.fakes import MemoryStore
from tests.loops import turn
from tests.service.test_vram_waits import used
from tests.sidecar import offload, prompt_of, space_of
from tests.transfer.test_bus import Gated


async def on_disk(h: Harness, session: Session, *lengths: int) -> list[Prefix]:
    """Prompts of so many chunks that are on disk alone."""
    prefixes = [h.chain_of(session, length, seed) for seed, length in enumerate(lengths)]
    for prefix in prefixes:
        h.put(session, prefix)
        assert await h.write_behind.flush(10)
        h.only_on_disk()
    return prefixes


async def settle(h: Harness) -> None:
    """Let the store go on, and wait for all that is on its way."""
    h.store.gate.set()
    while live := list(h.promotions._live.values()):
        await asyncio.gather(*(promotion.outcome for promotion in live))
        await turn()


def assert_nothing_is_kept(h: Harness) -> None:
    """No slot that is not readable, no pin, and no claim."""
    for each in h.placement.index.spaces:
        for node in h.placement.index.branch(each).nodes:
            for replica in filter(None, node.replicas):
                assert (replica.state, replica.pins) == (State.READY, 0)
    assert not h.promotions._live
    assert not h.cache._ahead._claims
    assert h.cache._ahead._under_way_bytes == 0


def read(h: Harness, prefix: Prefix) -> list[int]:
    """Which chunks of a prefix the store was asked for, in that order."""
    return [prefix.keys.index(key) for key in h.store.loads if key in prefix.keys]


# ── What comes ──


async def test_a_lookup_brings_the_rest_of_what_it_found(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 4)
        await h.get(session, prefix[:1])
        assert h.cache.lookup(session, prefix.keys) == (4, 1)
        await turn()
        await settle(h)
        assert h.cache.lookup(session, prefix.keys) == (4, 4)
        counters = h.placement.counters
        assert (counters.prefetched_chunks, counters.prefetch_used_chunks) == (3, 0)
        came, _, lease = await h.get(session, prefix)
        assert (came, counters.prefetch_used_chunks) == (4, 3)
        h.cache.release(session, lease.id)
        await h.get(session, prefix)
        assert counters.prefetch_used_chunks == 3, "used once"


async def test_nothing_beyond_what_was_named_comes(tmp_path: Path) -> None:
    """Not even the only chunk that continues it."""
    async with harness(tmp_path) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 4)
        h.cache.lookup(session, prefix.keys[:2])
        await turn()
        await settle(h)
        await h.get(session, prefix[:3])
        assert sorted(read(h, prefix)) == [0, 1, 2]


async def test_a_load_of_a_part_leaves_the_rest_on_its_way(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 6)
        h.cache.lookup(session, prefix.keys)
        came, _, _ = await h.get(session, prefix[:2])
        assert came == 2
        await settle(h)
        assert h.cache.lookup(session, prefix.keys) == (6, 6)


async def test_zero_percent_reads_nothing_ahead(tmp_path: Path) -> None:
    async with harness(tmp_path, read_ahead_percent=0) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 4)
        assert h.cache.lookup(session, prefix.keys) == (4, 0)
        assert await h.cache.prefetch(session, prefix.keys) == (0, 0)
        await turn()
        assert h.store.loads == []


async def test_what_is_under_way_is_bounded_for_each_and_for_all(tmp_path: Path) -> None:
    """A quarter of 16 slots for each session, half for all."""
    store = MemoryStore()
    async with harness(tmp_path, slots=16, store=store) as h:
        sessions = [h.session() for _ in range(3)]
        prefixes = await on_disk(h, sessions[0], 6, 6, 6)
        store.gate.clear()
        brought = [
            await h.cache.prefetch(s, p.keys) for s, p in zip(sessions, prefixes, strict=True)
        ]
        assert brought == [(0, 4), (0, 4), (0, 0)]
        assert await h.cache.prefetch(sessions[0], prefixes[0].keys) == (0, 4), "counted once"
        await settle(h)
        assert await h.cache.prefetch(sessions[2], prefixes[2].keys) == (0, 4)


# ── Never ahead of demand ──


async def test_a_load_goes_before_all_that_is_read_ahead(tmp_path: Path) -> None:
    """One of the two lanes is kept free of prefetches."""
    store = MemoryStore()
    async with harness(tmp_path, store=store) as h:
        guessing, loading = h.session(), h.session()
        guessed, wanted = await on_disk(h, guessing, 6, 3)
        store.gate.clear()
        assert await h.cache.prefetch(guessing, guessed.keys) == (0, 6)
        await store.loading.acquire()
        load = asyncio.create_task(h.get(loading, wanted))
        await store.loading.acquire()
        assert store.loads == [guessed[0], wanted[0]], "one guess is read, a load begins at once"
        store.gate.set()
        came, _, _ = await load
        assert came == 3
        await settle(h)
        assert store.loads == [guessed[0], *wanted, *guessed[1:]]


async def test_a_load_that_leaves_takes_its_priority_with_it(tmp_path: Path) -> None:
    """What another session still guesses waits behind the loads again."""
    store = MemoryStore()
    async with harness(tmp_path, store=store) as h:
        guessing, loading = h.session(), h.session()
        blockers, guessed, wanted = await on_disk(h, guessing, 2, 2, 2)
        store.gate.clear()
        first = asyncio.create_task(h.get(loading, blockers))
        for _ in range(2):
            await store.loading.acquire()  # both lanes are taken
        await h.cache.prefetch(guessing, guessed.keys)
        came, stop, _ = await h.get(loading, guessed, deadline_s=0.0)
        assert (came, stop) == (0, LoadStop.DEADLINE)
        second = asyncio.create_task(h.get(loading, wanted))
        await turn()
        store.gate.set()
        await asyncio.gather(first, second)
        await settle(h)
        assert store.loads == [*blockers, *wanted, *guessed]


async def test_a_guess_evicts_nothing_that_is_worth_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(tmp_path, slots=8) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 4)
        h.put(session, h.chain_of(session, 8, seed=7))
        await h.write_behind.flush(10)
        policy = session.branch.tenant.policies[TierId.CPU]
        monkeypatch.setattr(policy, "admits", lambda coming, over: False)
        assert await h.cache.prefetch(session, prefix.keys) == (0, 0)
        came, _, _ = await h.get(session, prefix)
        assert came == 4, "a load has its room"


async def test_guesses_make_way_for_loads_and_offloads(tmp_path: Path) -> None:
    store = MemoryStore()
    async with harness(tmp_path, slots=8, store=store, read_ahead_percent=50) as h:
        guessing, asking = h.session(), h.session()
        guessed, wanted = await on_disk(h, guessing, 4, 6)
        store.gate.clear()
        assert await h.cache.prefetch(guessing, guessed.keys) == (0, 4)
        await store.loading.acquire()  # one of them is being read, and stays
        load = asyncio.create_task(h.get(asking, wanted))
        await turn()
        assert h.placement.counters.prefetch_cancelled_chunks == 3
        store.gate.set()
        came, stop, lease = await load
        assert (came, stop) == (6, LoadStop.COMPLETE)
        h.cache.release(asking, lease.id)
        await settle(h)
        assert_nothing_is_kept(h)

        h.only_on_disk()
        store.gate.clear()
        store.loading = asyncio.Semaphore(0)
        assert await h.cache.prefetch(guessing, guessed.keys) == (0, 4)
        await store.loading.acquire()
        outcomes = h.put(asking, h.chain_of(asking, 7, seed=9))
        assert outcomes == [ReserveOutcome.WRITE] * 7
        await settle(h)


async def test_a_guess_takes_no_other_ones_room(tmp_path: Path) -> None:
    store = MemoryStore()
    async with harness(tmp_path, slots=8, store=store, read_ahead_percent=50) as h:
        first, second = h.session(), h.session()
        guessed, late = await on_disk(h, first, 3, 3)
        leased = h.chain_of(first, 5, seed=8)
        h.put(first, leased)
        await h.get(first, leased)
        store.gate.clear()
        assert await h.cache.prefetch(first, guessed.keys) == (0, 3)
        assert await h.cache.prefetch(second, late.keys) == (0, 0)
        assert h.placement.counters.prefetch_cancelled_chunks == 0
        await settle(h)


async def test_the_room_for_a_guess_is_not_its_own_parents(tmp_path: Path) -> None:
    """What was used longest ago is the chunk before it: the next one goes."""
    async with harness(tmp_path, slots=4) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 2)
        _, _, lease = await h.get(session, prefix[:1])
        h.cache.release(session, lease.id)
        for seed in (5, 6, 7):
            h.put(session, h.chain_of(session, 1, seed))
        assert await h.write_behind.flush(10)
        assert await h.cache.prefetch(session, prefix.keys) == (1, 1)
        await settle(h)
        assert h.cache.lookup(session, prefix.keys) == (2, 2)


async def test_one_tenants_quota_gives_up_its_own_guesses_alone(tmp_path: Path) -> None:
    store = MemoryStore()
    quotas = {TierId.GPU: 100, TierId.CPU: 25, TierId.DISK: 100}
    async with harness(tmp_path, slots=16, store=store, quota_percent=quotas) as h:
        ours, theirs = h.session(space(tenant="ours")), h.session(space(tenant="theirs"))
        (mine,) = await on_disk(h, ours, 4)
        (other,) = await on_disk(h, theirs, 2)
        store.gate.clear()
        await h.cache.prefetch(theirs, other.keys)
        await h.cache.prefetch(ours, mine.keys)
        assert h.put(ours, h.chain_of(ours, 2, seed=5)) == [ReserveOutcome.WRITE] * 2
        live = {promotion.source.node.branch for promotion in h.promotions._live.values()}
        assert live == {theirs.branch}
        await settle(h)


async def test_a_load_hurries_what_vram_is_giving_up(tmp_path: Path) -> None:
    """A chunk that VRAM alone has is on its way down on the paced lane when a load comes for it."""
    device, store = Gated(), MemoryStore(capacity_bytes=1)
    device.gate.set()
    async with harness(tmp_path, 8, device=device, store=store) as h:
        session, elsewhere = h.session(in_vram=True), h.session()
        prefixes = [h.chain_of(session, 1, seed) for seed in range(3)]
        for prefix in prefixes:
            await used(h, session, prefix)
        h.only_on_disk()
        device.gate.clear()
        device.reached.clear()
        device.passed.clear()
        first, *others = (session.branch.nodes[prefix[0]] for prefix in prefixes)
        h.promotions.bring_down(first)
        assert await asyncio.to_thread(device.reached.wait, 30.0)
        for node in others:
            h.promotions.bring_down(node)
        load = asyncio.create_task(h.get(elsewhere, prefixes[2]))
        await turn()
        device.gate.set()
        assert (await load)[0] == 1
        await settle(h)
        assert {*device.passed[:2]} == {(Urgency.OFFLOADS, 4096), (Urgency.LOADS, 4096)}
        assert device.passed[2:] == [(Urgency.OFFLOADS, 4096)]
        assert h.placement.counters.lowered_chunks == 3


# ── Given up ──


async def test_a_session_that_ends_takes_its_guesses_with_it(tmp_path: Path) -> None:
    store = MemoryStore()
    async with harness(tmp_path, store=store) as h:
        going, staying = h.session(), h.session()
        (prefix,) = await on_disk(h, going, 6)
        store.gate.clear()
        await h.cache.prefetch(going, prefix.keys)
        await h.cache.prefetch(staying, prefix.keys[:3])
        await store.loading.acquire()
        h.cache.end_session(going)
        assert len(h.promotions._live) == 3, "what the other one wants stays"
        assert h.placement.counters.prefetch_cancelled_chunks == 3
        await settle(h)
        assert sorted(read(h, prefix)) == [0, 1, 2]
        assert_nothing_is_kept(h)


async def test_a_lookup_whose_session_ends_at_once_brings_nothing(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 2)
        h.cache.lookup(session, prefix.keys)
        h.cache.end_session(session)
        await turn()
        assert h.store.loads == []
        assert_nothing_is_kept(h)


async def test_a_guess_that_a_load_waits_for_outlives_its_asker(tmp_path: Path) -> None:
    store = MemoryStore()
    async with harness(tmp_path, store=store) as h:
        going, loading = h.session(), h.session()
        (prefix,) = await on_disk(h, going, 4)
        store.gate.clear()
        await h.cache.prefetch(going, prefix.keys)
        load = asyncio.create_task(h.get(loading, prefix))
        await turn()
        h.cache.end_session(going)
        store.gate.set()
        came, _, _ = await load
        assert came == 4
        await h.get(loading, prefix)
        counters = h.placement.counters
        assert (counters.prefetch_used_chunks, counters.prefetch_cancelled_chunks) == (4, 0)


async def test_a_load_that_ends_early_no_longer_wants_the_rest(tmp_path: Path) -> None:
    """Its asker goes on without: the lookup before it is done with, too."""
    store = MemoryStore()
    async with harness(tmp_path, store=store) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 6)
        store.gate.clear()
        h.cache.lookup(session, prefix.keys)
        await turn()
        _, stop, lease = await h.get(session, prefix, deadline_s=0.0)
        assert stop is LoadStop.DEADLINE
        h.cache.release(session, lease.id)
        await settle(h)
        assert len(read(h, prefix)) <= 2, "no more than what had begun"
        assert_nothing_is_kept(h)


async def test_a_prefetch_can_be_cancelled(tmp_path: Path) -> None:
    store = MemoryStore()
    async with harness(tmp_path, store=store) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 5)
        store.gate.clear()
        await h.cache.prefetch(session, prefix.keys)
        await store.loading.acquire()
        assert h.cache.cancel_prefetch(session, prefix.keys[3:]) == 2
        assert h.cache.cancel_prefetch(session, prefix.keys[3:]) == 0
        await settle(h)
        assert sorted(read(h, prefix)) == [0, 1, 2]
        assert_nothing_is_kept(h)


async def test_a_cancel_over_the_wire(tmp_path: Path) -> None:
    store = MemoryStore()
    async with harness(tmp_path, store=store) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 3)
        store.gate.clear()
        servicer = Servicer(
            h.cache,
            Explainer(h.placement.index, h.placement.history, Config()),
            curves_of(Config()),
        )
        request = pb.PrefetchRequest(session_id=session.id, keys=b"".join(prefix.keys))
        context: Any = None
        assert (await servicer.Prefetch(request, context)).promoting == 3
        request.cancel = True
        answer = await servicer.Prefetch(request, context)
        assert (answer.in_ram, answer.promoting) == (0, 3)
        await settle(h)
        assert_nothing_is_kept(h)


def test_a_client_can_cancel() -> None:
    """Nothing is on its way in RAM: a Prefetch answers what is there, a cancel answers nothing."""
    with kvtier.open(space_of(), cpu="16MiB") as client:
        prefix = client.prefix(prompt_of(1, 3))
        offload(client, prefix)
        assert (client.prefetch(prefix), client.cancel_prefetch(prefix)) == (3, 0)
