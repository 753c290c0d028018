"""What one client asks for does not keep the others waiting: long work is done in pieces, and
everybody else's turn comes in between."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvtier.chunks import Prefix
from kvtier.config import Config
from kvtier.errors import InvalidRequest
from kvtier.proto import cache_pb2 as pb
from kvtier.service import (
    cache,
    loading,
    pins,
    promotion,
    read_ahead,
    removals,
    reserving,
    sessions,
    write_behind,
)
from kvtier.service import servicer as servicer_module
from kvtier.service.answers import CommitOutcome, LoadStop, ReserveOutcome
from kvtier.service.curves import curves_of
from kvtier.service.demotion import When, Writing
from kvtier.service.explain import Explainer
from kvtier.service.history import Why
from kvtier.service.pace import in_turns
from kvtier.service.pins import Terms
from kvtier.service.servicer import Servicer
from kvtier.service.sessions import Session
from kvtier.tiers.tree import Node, TierId
from tests.core import SLOT_BYTES, Harness, harness, space
from tests.loops import Turns, turn

CHUNKS = 300
CONTEXT: Any = None  # as in process: the servicer asks nothing of it
PATIENCE_S = 60.0


def servicer_of(h: Harness) -> Servicer:
    explainer = Explainer(h.placement.index, h.placement.history, Config())
    return Servicer(h.cache, explainer, curves_of(Config()))


async def on_disk(h: Harness, session: Session, chunks: int = CHUNKS, seed: int = 0) -> Prefix:
    """A prompt that only the disk has."""
    prefix = h.chain_of(session, chunks, seed)
    h.put(session, prefix)
    assert await h.write_behind.flush(PATIENCE_S)
    h.only_on_disk()
    return prefix


async def test_a_load_begins_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with harness(tmp_path, slots=400) as h, Turns() as turns:
        session = h.session()
        prefix = await on_disk(h, session)
        monkeypatch.setattr(h.promotions, "join", turns.notes(h.promotions.join))
        came, stop, _ = await h.get(session, prefix)
        assert (came, stop) == (CHUNKS, LoadStop.COMPLETE)
        assert turns.done == CHUNKS
        assert turns.most == loading._MOST_AT_ONCE < CHUNKS


async def test_what_goes_before_a_load_begins_it_ends_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_MOST_AT_ONCE", 2)
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = await on_disk(h, session, 10)
        nodes = [session.branch.nodes[key] for key in prefix]
        load = asyncio.create_task(h.get(session, prefix))
        await asyncio.sleep(0)
        assert nodes[0].in_cpu is not None
        assert nodes[6].in_cpu is None, "its turn has not come"
        h.placement.lose(nodes[6], Why.REMOVED)
        came, stop, lease = await load
        assert (came, stop) == (6, LoadStop.MISS)
        h.cache.release(session, lease.id)
        assert not any(replica.pins for node in nodes for replica in node.replicas if replica)


async def test_a_prefetch_begins_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with harness(tmp_path, slots=800, read_ahead_percent=50) as h, Turns() as turns:
        session = h.session()
        prefix = await on_disk(h, session)
        monkeypatch.setattr(h.promotions, "join", turns.notes(h.promotions.join))
        assert await h.cache.prefetch(session, prefix.keys) == (0, CHUNKS)
        assert turns.most == read_ahead._MOST_AT_ONCE < CHUNKS


async def test_a_prefetch_ends_with_its_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_MOST_AT_ONCE", 2)
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = await on_disk(h, session, 20)
        h.store.gate.clear()
        asking = asyncio.create_task(h.cache.prefetch(session, prefix.keys))
        await asyncio.sleep(0)
        h.cache.end_session(session)
        assert await asking == (0, 2)
        h.store.gate.set()
        while h.promotions._live:
            await turn()
        assert h.placement.index.chunks[TierId.CPU] <= 2, "none began after it"


async def test_no_more_guesses_make_way_than_are_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "_MOST_GIVEN_UP", 2)
    async with harness(tmp_path, slots=16, read_ahead_percent=50) as h:
        guessing, asking = h.session(), h.session()
        guessed = await on_disk(h, guessing, 8)
        leased = h.chain_of(asking, 8, seed=8)
        h.put(asking, leased)
        await h.get(asking, leased)
        h.store.gate.clear()
        assert await h.cache.prefetch(guessing, guessed.keys) == (0, 8)
        for seed, chunks, cancelled in ((9, 3, 4), (10, 5, 8)):
            _, outcomes = h.reserve(asking, h.chain_of(asking, chunks, seed))
            assert outcomes == [ReserveOutcome.WRITE] * chunks
            assert h.placement.counters.prefetch_cancelled_chunks == cancelled


async def test_a_reservation_is_answered_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(tmp_path, slots=400) as h, Turns() as turns:
        session, servicer = h.session(), servicer_of(h)
        monkeypatch.setattr(h.placement, "begin_in", turns.notes(h.placement.begin_in))
        prefix = h.chain_of(session, CHUNKS)
        keys = b"".join(prefix.keys)
        request = pb.ReserveRequest(
            session_id=session.id, lease_id=1, keys=keys, parent=prefix.parent
        )
        answer = await servicer.Reserve(request, CONTEXT)
        assert [chunk.status for chunk in answer.chunks] == [pb.RESERVE_STATUS_WRITE] * CHUNKS
        assert len({chunk.offset for chunk in answer.chunks}) == CHUNKS
        assert turns.done == CHUNKS
        assert turns.most == reserving.MOST_AT_ONCE < CHUNKS


async def test_a_commit_is_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_COMMITTED", 128)
    async with harness(tmp_path, slots=400) as h, Turns() as turns:
        session = h.session()
        monkeypatch.setattr(h.placement.index, "commit", turns.notes(h.placement.index.commit))
        prefix = h.chain_of(session, CHUNKS)
        lease_id, _ = h.reserve(session, prefix)
        pieces = h.cache.commit_in_pieces(session, lease_id, range(CHUNKS))
        assert await in_turns(pieces, 128) == [CommitOutcome.STORED] * CHUNKS
        assert h.cache.lookup(session, prefix.keys) == (CHUNKS, CHUNKS)
        assert turns.done == CHUNKS
        assert turns.most == 128


async def test_what_ends_a_lease_between_two_pieces_of_a_commit_ends_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_COMMITTED", 2)
    monkeypatch.setattr(sessions, "_MOST_AT_ONCE", 1)  # some is still to be given back
    async with harness(tmp_path) as h:
        session = h.session()
        lease_id, _ = h.reserve(session, h.chain_of(session, 6))
        pieces = h.cache.commit_in_pieces(session, lease_id, range(6))
        assert next(pieces) == [CommitOutcome.STORED] * 2
        h.cache.end_session(session)
        assert [*next(pieces), *next(pieces)] == [CommitOutcome.NOT_RESERVED] * 4
        assert next(pieces, None) is None
        while h.cache.sessions._giving_back:
            await turn()
        assert h.placement.index.chunks[TierId.CPU] == 2
        assert h.placement.memory.arena.used_bytes == 2 * SLOT_BYTES


async def test_a_commit_that_nobody_waits_for_any_more_discards_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_COMMITTED", 2)
    async with harness(tmp_path) as h:
        session = h.session()
        lease_id, _ = h.reserve(session, h.chain_of(session, 6))
        pieces = h.cache.commit_in_pieces(session, lease_id, range(6))
        committing = asyncio.create_task(in_turns(pieces, 2))
        del pieces
        await asyncio.sleep(0)
        committing.cancel()
        await asyncio.wait({committing})
        del committing
        assert len(session.leases) == 0
        assert h.placement.memory.arena.used_bytes == 2 * SLOT_BYTES


async def test_an_abort_is_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MOST_AT_ONCE", 128)
    async with harness(tmp_path, slots=400) as h, Turns() as turns:
        session = h.session()
        lease_id, _ = h.reserve(session, h.chain_of(session, CHUNKS))
        monkeypatch.setattr(h.placement.index, "abort", turns.notes(h.placement.index.abort))
        h.cache.abort(session, lease_id)
        while not session.leases.given_back:
            await turn()
        assert turns.done == h.placement.counters.aborted_chunks == CHUNKS
        assert turns.most == 128
        assert session.leases.write_bytes == h.placement.memory.arena.used_bytes == 0


@pytest.mark.parametrize("pieces", [1, 2])
async def test_an_answer_names_no_slot_of_a_lease_that_ended_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr(reserving, "MOST_AT_ONCE", 4)
    monkeypatch.setattr(servicer_module, "MOST_AT_ONCE", 4)
    async with harness(tmp_path) as h:
        session, servicer = h.session(), servicer_of(h)
        prefix = h.chain_of(session, 4 * pieces)
        request = pb.ReserveRequest(
            session_id=session.id, lease_id=1, keys=b"".join(prefix.keys), parent=prefix.parent
        )
        asking = asyncio.create_task(servicer.Reserve(request, CONTEXT))
        await asyncio.sleep(0)
        assert h.placement.memory.arena.used_bytes == 4 * SLOT_BYTES
        h.cache.abort(session, 1)
        with pytest.raises(InvalidRequest, match="lease 1 ended"):
            await asking
        assert h.placement.memory.arena.used_bytes == 0
        assert not session.branch.nodes


async def test_a_slab_that_changes_layout_is_looked_over_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(tmp_path, slots=32 * CHUNKS) as h, Turns() as turns:
        session = h.session()
        h.put(session, h.chain_of(session, CHUNKS))
        assert await h.write_behind.flush(PATIENCE_S)
        [slab] = h.placement._residents
        monkeypatch.setattr(Node, "children", turns.notes(Node.children))
        assert h.placement._empty_slab(slab, TierId.CPU, unsaved=False)
        assert turns.done == CHUNKS
        assert h.placement.index.chunks[TierId.CPU] == 0


async def test_removal_is_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with harness(tmp_path, slots=1024) as h, Turns() as turns:
        session = h.session()
        for seed in range(3):
            h.put(session, h.chain_of(session, CHUNKS, seed))
        monkeypatch.setattr(h.placement, "lose", turns.notes(h.placement.lose))
        assert await h.cache.evict(session, [], whole_space=True) == 3 * CHUNKS
        assert turns.done == 3 * CHUNKS
        assert turns.most <= removals._STEPS // removals._STEPS_TO_LOSE < CHUNKS


async def test_pins_that_expire_at_once_end_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(tmp_path, slots=1000, pin_percent=50) as h, Turns() as turns:
        session = h.session()
        prefix = h.chain_of(session, CHUNKS)
        h.put(session, prefix)
        for _ in range(10):
            h.cache.pin(session, prefix.keys, Terms(10))
        monkeypatch.setattr(
            h.cache.pins, "_let_go_of_last", turns.notes(h.cache.pins._let_go_of_last)
        )
        h.pin_clock_s[0] = 10
        await h.cache.pins.end_expired()
        assert turns.done == 10 * CHUNKS
        assert turns.most <= pins._STEPS < 10 * CHUNKS
        assert h.placement.counters.pins_expired == 10


async def test_what_waits_to_be_written_is_begun_and_entered_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(tmp_path, slots=1024) as h, Turns() as turns:
        session, queue = h.session(), h.write_behind
        for name in ("_begin", "_finish"):
            monkeypatch.setattr(queue, name, turns.notes(getattr(queue, name)))
        for seed in range(3):
            h.put(session, h.chain_of(session, CHUNKS, seed))
        assert await queue.flush(PATIENCE_S)
        assert h.placement.index.chunks[TierId.DISK] == 3 * CHUNKS
        assert turns.done == 2 * 3 * CHUNKS
        assert turns.most == write_behind._STEPS < CHUNKS


async def test_what_is_not_to_be_written_any_more_is_passed_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole queue of chunks that have gone: none of them fills a group."""
    async with harness(tmp_path, slots=1024) as h, Turns() as turns:
        session, queue = h.session(), h.write_behind
        monkeypatch.setattr(queue, "_begin", turns.notes(queue._begin))
        h.store.gate.clear()
        h.put(session, h.chain_of(session, 1, seed=9))
        while turns.done == 0:  # the queue's task is in its transaction
            await turn()
        for seed in range(3):
            h.put(session, h.chain_of(session, CHUNKS, seed))
        await h.cache.evict(session, [], whole_space=True)
        h.store.gate.set()
        assert await queue.flush(PATIENCE_S)
        assert turns.done == 1 + 3 * CHUNKS
        assert turns.most <= write_behind._STEPS < CHUNKS
        assert h.store.transactions == [1]


async def test_a_stop_takes_back_what_was_begun_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "_STEPS", 2)
    async with harness(tmp_path, slots=64) as h:
        session, queue = h.session(), h.write_behind
        prefix = h.chain_of(session, 20)
        h.put(session, prefix)
        nodes = [session.branch.nodes[key] for key in prefix]
        while not any(node.in_disk for node in nodes):
            await turn()
        assert not all(node.in_disk for node in nodes), "it is in the middle of it"
        await queue.close()
        assert not any(node.in_disk for node in nodes)
        assert not any(replica.pins for node in nodes if (replica := node.in_cpu))
        assert h.store.transactions == []


async def test_the_shares_are_ranked_once_for_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(tmp_path, slots=200, writing=Writing(When.SECOND_TOUCH)) as h:
        tenants = [h.session(space(tenant=str(n))) for n in range(10)]
        for session in tenants:
            h.put(session, h.chain_of(session, 20))
        ranked: list[int] = []
        allowed = h.placement.shares.allowed

        def noted(*asked: Any) -> Any:
            ranked.append(1)
            return allowed(*asked)

        monkeypatch.setattr(type(h.placement.shares), "allowed", staticmethod(noted))
        late = h.session(space(tenant="late"))
        h.put(late, h.chain_of(late, 10))
        assert h.placement.counters.as_dict()["evicted_cpu"] == 10
        assert len(ranked) == 1
        monkeypatch.setattr(reserving, "MOST_AT_ONCE", 2)
        h.put(late, h.chain_of(late, 6, seed=1))
        assert len(ranked) == 1 + 3


async def test_what_a_session_leased_is_given_back_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(tmp_path, slots=1024) as h, Turns() as turns:
        session = h.session()
        prefix = h.chain_of(session, CHUNKS)
        h.put(session, prefix)
        assert await h.write_behind.flush(PATIENCE_S)
        leases = [(await h.get(session, prefix))[2] for _ in range(3)]
        lease_id, outcomes = h.reserve(session, h.chain_of(session, CHUNKS, seed=1))
        assert outcomes == [ReserveOutcome.WRITE] * CHUNKS
        for name in ("unpin", "abort"):
            work = turns.notes(getattr(h.placement.index, name))
            monkeypatch.setattr(h.placement.index, name, work)
        h.cache.end_session(session)
        assert all(lease.ended for lease in leases)
        assert h.cache.write_lease(session, lease_id) is None
        while h.cache.sessions._giving_back:
            await turn()
        assert turns.done == 4 * CHUNKS
        assert turns.most <= sessions._MOST_AT_ONCE < 4 * CHUNKS
        assert h.placement.counters.aborted_chunks == CHUNKS
        assert h.placement.memory.arena.used_bytes == CHUNKS * SLOT_BYTES
        assert not any(node.in_cpu.pins for node in session.branch.nodes if node.in_cpu)


async def test_a_stop_waits_for_what_an_ended_session_leased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_MOST_AT_ONCE", 1)
    async with harness(tmp_path) as h:
        session = h.session()
        h.reserve(session, h.chain_of(session, 20))
        h.cache.end_session(session)
        await h.cache.sessions.close()
        assert h.placement.memory.arena.used_bytes == 0
