"""Eviction with everything at once: two tenants with chunks of two sizes, any policy, any rule of
writing, quotas, hints, pins, read-ahead and a disk that stalls, refuses and loses. Whatever the
order, every byte is right, the books agree, and in the end all of it can be given up."""

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.chunks import ChunkKey, Prefix
from kvtier.errors import InvalidRequest
from kvtier.service import (
    cache,
    loading,
    read_ahead,
    removals,
    reserving,
    sessions,
    write_behind,
)
from kvtier.service.answers import CommitOutcome, LoadStop
from kvtier.service.demotion import When, Writing
from kvtier.service.hints import Hints, Label
from kvtier.service.leases import Lease
from kvtier.service.pace import in_turns
from kvtier.service.pins import Terms
from kvtier.service.sessions import Session
from kvtier.spaces import Layout, Space
from kvtier.tiers.arena import slot_bytes_of
from kvtier.tiers.base import Outcome
from kvtier.tiers.policies.registry import FAMILIES
from kvtier.tiers.tree import Replica, State, TierId
from tests.core import CHUNK_TOKENS, SLOT_BYTES, harness, space
from tests.fakes import MemoryStore
from tests.service.test_vram_machine import Using, right_bytes

PATIENCE_S = 60.0
LENGTH, FAMILIES_OF_PROMPTS = 8, 4
_WIDE = Layout("int8", 6, 2, 64, tokens=CHUNK_TOKENS, planes=2)  # two slots, the other takes one
SPACES = [space(tenant="a"), Space("wide", _WIDE, tenant="a"), space(tenant="b")]
ResultT = TypeVar("ResultT")
# What long work does between two turns of the loop.
PIECES = [
    (loading, "_MOST_AT_ONCE"),
    (read_ahead, "_MOST_AT_ONCE"),
    (removals, "_STEPS"),
    (reserving, "MOST_AT_ONCE"),
    (cache, "MOST_COMMITTED"),
    (sessions, "_MOST_AT_ONCE"),
    (write_behind, "_STEPS"),
]
who, length = st.integers(0, len(SPACES) - 1), st.sampled_from([*range(1, LENGTH + 1), LENGTH])
family = st.integers(0, FAMILIES_OF_PROMPTS - 1)
hints = st.builds(Hints, st.integers(0, 6), st.sampled_from([Label.NONE, *Label]))
some, firsts = st.integers(0, 99), st.sampled_from([0, 0, 0, 1, 4])


class EvictionMachine(RuleBasedStateMachine):
    """One session for each space. `gone` are the keys that a client removed and nobody stored
    since."""

    running: Any = None

    @initialize(
        policy=st.sampled_from(["gix", "gix", *FAMILIES]),
        when=st.sampled_from([When.DEMOTE, When.DEMOTE, *When]),
        slots=st.sampled_from([8, 12, 24, 40]),
        disk_slots=st.sampled_from([0, 16, 1 << 20]),
        quota=st.sampled_from([100, 100, 40]),
        piece=st.sampled_from([1, 2, 128]),
    )
    def start(
        self, policy: str, when: When, slots: int, disk_slots: int, quota: int, piece: int
    ) -> None:
        self.patch = pytest.MonkeyPatch()
        for module, name in PIECES:
            self.patch.setattr(module, name, piece)
        self.folder = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.store = MemoryStore(capacity_bytes=disk_slots * SLOT_BYTES)
        self.running = harness(
            self.folder,
            slots,
            store=self.store,
            policy=policy,
            writing=Writing(when),
            quota_percent=dict.fromkeys(TierId, quota),
        )
        self.core = self.run(self.running.__aenter__())
        self.placement, self.cache = self.core.placement, self.core.cache
        self.sessions = [self.core.session(each) for each in SPACES]
        self.using: list[Using] = []
        self.loads: list[asyncio.Task[tuple[int, LoadStop]]] = []  # of leases that have ended
        self.ids = itertools.count(1)
        self.gone: set[ChunkKey] = set()
        self.removing: list[asyncio.Task[int]] = []
        self.offering: list[asyncio.Task[None]] = []

    def run(self, what: Coroutine[Any, Any, ResultT]) -> ResultT:
        return self.loop.run_until_complete(asyncio.wait_for(what, PATIENCE_S))

    def prefix(self, session: Session, family: int, length: int = LENGTH) -> Prefix:
        """Prompts of even and of odd families part half-way."""
        tokens = [family % 2 * 1000 + n for n in range(length * CHUNK_TOKENS)]
        for n in range(LENGTH // 2 * CHUNK_TOKENS, len(tokens)):
            tokens[n] += family * 10_000
        return self.core.prefix(session, tokens)

    def asked(self, who: int, family: int, length: int) -> tuple[Session, tuple[ChunkKey, ...]]:
        return self.sessions[who], self.prefix(self.sessions[who], family, length).keys

    def called(self, call: Any, *said: Any, **more: Any) -> Any:
        """Call the cache on its loop."""

        async def on_loop() -> Any:
            answer = call(*said, **more)
            return await answer if asyncio.iscoroutine(answer) else answer

        return self.run(on_loop())

    # ── what engines do ───────────────────────────────────────────────────────────────────────────

    @rule(who=who, family=family, length=length, hints=hints, first=firsts,
          at_once=st.sampled_from([True, True, False]))  # fmt: skip
    def offload(
        self, who: int, family: int, length: int, hints: Hints, first: int, at_once: bool
    ) -> None:
        session, lease_id = self.sessions[who], next(self.ids)
        part = self.prefix(session, family, length)[first:]
        self.called(self.cache.reserve, session, lease_id, part.keys, part.parent, hints)
        lease = self.cache.write_lease(session, lease_id)
        if lease is None:
            return
        self.fill(session, lease)
        if at_once:
            self.commit(session, self.using.pop().lease)

    def fill(self, session: Session, lease: Lease) -> None:
        for replica in lease.replicas.values():
            self.placement.memory.view(replica.slot)[:] = right_bytes(replica)
        self.using.append(Using(session, lease))

    @rule(who=who, family=family, length=length, hints=hints, first=firsts,
          at_once=st.booleans(), turns=st.integers(1, 4))  # fmt: skip
    def offload_in_turns(
        self, who: int, family: int, length: int, hints: Hints, first: int, *,
        at_once: bool, turns: int,
    ) -> None:  # fmt: skip
        """Whatever else happens has its turn between two pieces of an answer."""
        part = self.prefix(self.sessions[who], family, length)[first:]
        offering = self.offer(self.sessions[who], part, hints, at_once)
        self.offering.append(self.loop.create_task(offering))
        self.turn(turns)

    async def offer(self, session: Session, part: Prefix, hints: Hints, at_once: bool) -> None:
        lease_id = next(self.ids)
        pieces = self.cache.reserve_in_pieces(session, lease_id, part.keys, part.parent, hints)
        try:
            answers = await in_turns(pieces, 1)
        except InvalidRequest:
            assert session not in self.cache.sessions, "only its end takes a lease away here"
            return
        lease = self.cache.write_lease(session, lease_id)
        named = [answer.slot for answer in answers if answer.slot is not None]
        if lease is None:
            assert not named
        else:
            assert named == [replica.slot for replica in lease.replicas.values()]
            self.fill(session, lease)

    @rule(prompts=st.lists(st.tuples(who, family), min_size=2, max_size=8), hints=hints,
          settled=st.booleans(), again=st.booleans())  # fmt: skip
    def flood(
        self, prompts: list[tuple[int, int]], hints: Hints, settled: bool, again: bool
    ) -> None:
        """Whole prompts come, one after the other, and perhaps they are asked for again."""
        for who, family in prompts:
            self.offload(who, family, LENGTH, hints, 0, at_once=True)
            if settled and self.store.gate.is_set():
                self.settle()
        for who, family in prompts if again else ():
            self.load(who, family, LENGTH, hints, 0.0, 6)
            self.leave(-1, publish=False)

    def commit(self, session: Session, lease: Lease) -> None:
        keys = {index: replica.key for index, replica in lease.replicas.items()}
        outcomes = self.called(self.cache.commit, session, lease.id, list(keys))
        stored = zip(keys.values(), outcomes, strict=True)
        self.gone.difference_update(key for key, each in stored if each is CommitOutcome.STORED)

    @rule(who=who, family=family, length=length, hints=hints,
          deadline_s=st.sampled_from([None, 0.0]), turns=st.integers(0, 4))  # fmt: skip
    def load(
        self, who: int, family: int, length: int, hints: Hints, deadline_s: float | None, turns: int
    ) -> None:
        session, keys = self.asked(who, family, length)
        lease = self.cache.open_read(session, next(self.ids))
        reading = self.read(session, lease, keys, hints, deadline_s)
        self.using.append(Using(session, lease, self.loop.create_task(reading)))
        self.turn(turns)

    async def read(
        self, session: Session, lease: Lease, keys: Sequence[ChunkKey], hints: Hints,
        deadline_s: float | None,
    ) -> tuple[int, LoadStop]:  # fmt: skip
        chunks, loading = self.cache.load(session, lease, keys, deadline_s, hints=hints)
        came = 0
        async for landed in chunks:
            for index, replica in landed.chunks:
                assert (index, replica.key) == (came, keys[index])
                assert self.is_right(replica)
                came += 1
        return came, loading.stop

    def is_right(self, replica: Replica) -> bool:
        return bytes(self.placement.memory.view(replica.slot)) == right_bytes(replica)

    @rule(which=some, publish=st.booleans())
    def leave(self, which: int, publish: bool) -> None:
        """Release what was read, perhaps before it has come; commit what was written, or not."""
        if not self.using:
            return
        use = self.using.pop(which % len(self.using))
        if use.load is not None:
            self.called(self.cache.release, use.session, use.lease.id)
            self.loads.append(use.load)
        elif publish:
            self.commit(use.session, use.lease)
        else:
            self.called(self.cache.abort, use.session, use.lease.id)

    @rule(who=who, family=family, length=length, which=st.integers(0, 2))
    def foresee(self, who: int, family: int, length: int, which: int) -> None:
        it = self.cache
        call = (it.lookup, it.prefetch, it.cancel_prefetch)[which]
        self.called(call, *self.asked(who, family, length))

    @rule(who=who, family=family, length=length, ttl_s=st.floats(1, 20), ends=st.booleans())
    def pin(self, who: int, family: int, length: int, ttl_s: float, ends: bool) -> None:
        session, keys = self.asked(who, family, length)
        self.called(self.cache.pin, session, keys, Terms(ttl_s, ends))

    @rule(who=who, family=family, at=st.integers(0, LENGTH - 1), awaited=st.booleans())
    def remove(self, who: int, family: int, at: int, awaited: bool) -> None:
        session = self.sessions[who]
        first = self.prefix(session, family)[at]
        removing = self.loop.create_task(self.cache.evict(session, [first], whole_space=False))
        if not awaited:
            self.removing.append(removing)
            return
        self.run(asyncio.wait_for(removing, PATIENCE_S))
        for other in range(FAMILIES_OF_PROMPTS):
            keys = self.prefix(session, other).keys
            self.gone.update(keys[at:] if first == keys[at] else ())

    @rule(who=who)
    def reconnect(self, who: int) -> None:
        """A session ends, with all that it leased."""
        session = self.sessions[who]
        self.called(self.cache.end_session, session)
        self.loads += [use.load for use in self.using if use.session is session and use.load]
        self.using = [use for use in self.using if use.session is not session]
        self.sessions[who] = self.core.session(SPACES[who])

    # ── what else happens ─────────────────────────────────────────────────────────────────────────

    @rule(passed_s=st.floats(-5, 400))
    def wait(self, passed_s: float) -> None:
        self.core.clock_s[0] += passed_s
        self.core.pin_clock_s[0] += abs(passed_s) / 40

    @rule(turns=st.integers(1, 20))
    def turn(self, turns: int) -> None:
        async def turn_over() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(turn_over())

    @precondition(lambda self: self.store.gate.is_set())
    @rule()
    def settle(self) -> None:
        """Wait for all copies and loads, and let the policies learn."""
        self.run(self.all_settle())
        for tenant in self.placement.index.tenants:
            learner = getattr(tenant.policies[TierId.CPU], "_learner", None)
            if learner is not None and learner.due:
                learner.learn()

    async def all_settle(self) -> None:
        reading = [use.load for use in self.using if use.load]
        await asyncio.gather(*reading, *self.loads, *self.removing, *self.offering)
        await asyncio.gather(*self.cache.sessions._giving_back)
        while self.core.promotions._live:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await self.core.write_behind.flush(PATIENCE_S)

    @rule(stands_still=st.booleans(), refuses=st.booleans())
    def disk_is_moody(self, stands_still: bool, refuses: bool) -> None:
        self.store.refuse_writes = refuses
        self.store.gate.clear() if stands_still else self.store.gate.set()

    @rule(who=who, family=family, at=st.integers(0, LENGTH - 1),
          outcome=st.sampled_from([Outcome.FAILED, Outcome.CORRUPT, Outcome.MISS]))  # fmt: skip
    def disk_loses(self, who: int, family: int, at: int, outcome: Outcome) -> None:
        self.store.outcomes[self.prefix(self.sessions[who], family)[at]] = outcome

    # ── what holds all the time ───────────────────────────────────────────────────────────────────

    @invariant()
    def the_books_agree(self) -> None:
        self.placement.index.check()
        arena = self.placement.memory.arena
        there = [r for slab in self.placement._residents.values() for r in slab if r is not None]
        assert arena.used_bytes == sum(slot_bytes_of(each.slot.nbytes) for each in there)
        assert arena.used_bytes <= arena.nbytes
        spans = sorted((r.slot.offset, slot_bytes_of(r.slot.nbytes)) for r in there)
        assert all(one + size <= other for (one, size), (other, _) in itertools.pairwise(spans))
        for tenant in self.placement.index.tenants:
            mine = [each for each in there if each.node.branch.tenant is tenant]
            assert tenant.used_bytes[TierId.CPU] == sum(each.node.branch.nbytes for each in mine)

    @invariant()
    def what_is_leased_stays(self) -> None:
        for use in self.using:
            assert not use.lease.ended
            assert all(replica.pins for replica in use.lease.replicas.values() if use.load)
            assert all(self.is_right(replica) for replica in use.lease.replicas.values())

    @invariant()
    def what_was_removed_does_not_come_back(self) -> None:
        for session, each in itertools.product(self.sessions, range(FAMILIES_OF_PROMPTS)):
            held = self.placement.index.match(session.branch, self.prefix(session, each).keys)
            assert self.gone.isdisjoint(node.key for node in held)

    def teardown(self) -> None:
        if self.running is None:
            return
        try:
            self.store.refuse_writes = False
            self.store.gate.set()
            self.run(self.all_goes())
            self.run(self.running.__aexit__(None, None, None))
        finally:
            self.loop.close()
            self.patch.undo()
            shutil.rmtree(self.folder)

    async def all_goes(self) -> None:
        """Once all have left, everything can be given up, leaf by leaf, and nothing is left."""
        self.loads += [use.load for use in self.using if use.load]
        self.using.clear()
        for session in self.sessions:
            self.cache.end_session(session)
        await self.all_settle()
        self.core.pin_clock_s[0] += 1e6
        self.cache.pins.expire()
        index = self.placement.index
        held = [node for each in SPACES for node in index.branch(each).nodes]
        replicas = [replica for node in held for replica in node.replicas if replica is not None]
        assert all(each.state is State.READY and not each.pins for each in replicas)
        assert len(self.store.chunks) == index.chunks[TierId.DISK]
        for tenant, tier in itertools.product(index.tenants, (TierId.CPU, TierId.DISK)):
            while (victim := self.core.next_victim(tenant, tier)) is not None:
                self.placement.evict(victim)
        assert index.chunks == [0, 0, 0]
        assert not any(index.branch(each).nodes for each in SPACES)
        assert not any(any(tenant.used_bytes) for tenant in index.tenants)
        assert not self.store.chunks
        assert not self.placement.memory.arena.used_bytes


class TestEviction(EvictionMachine.TestCase):
    settings = settings(
        max_examples=150,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
