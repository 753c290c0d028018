"""RAM, VRAM and disk under everything at once: whatever happens, in whichever order copies are
done, every byte is right, and stays so for as long as it is leased."""

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.chunks import ChunkKey, Prefix
from kvtier.kernels.device import Span, Urgency
from kvtier.kernels.host import HostDevice
from kvtier.service.answers import CommitOutcome, LoadStop
from kvtier.service.leases import Lease
from kvtier.service.sessions import Session
from kvtier.spaces import Layout, Space
from kvtier.tiers.arena import slot_bytes_of
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import Replica, State, TierId
from tests.contracts.device import buffer
from tests.core import CHUNK_TOKENS, SLOT_BYTES, Harness, harness, space
from tests.fakes import MemoryStore
from tests.kernels.moody import MoodyDevice

PATIENCE_S = 60.0
LENGTH = 8  # chunks of a prompt
# Chunks of one slot, and of one and a half in two: what one space gives up, the other may get.
SPACES = [space(), Space("wide", Layout("int8", 6, 2, 64, tokens=CHUNK_TOKENS, planes=2))]
ResultT = TypeVar("ResultT")
FAMILIES = 3
families, lengths, some = st.integers(0, FAMILIES - 1), st.integers(1, LENGTH), st.integers(0, 99)
sessions = st.integers(0, 3)


class Eyes:
    """Sees what is in device memory, past the bus and its moods."""

    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self._stream = device.stream(Urgency.LOADS)
        self._window = buffer(bytes(2 * SLOT_BYTES))
        self._region = device.register(self._window)

    def see(self, span: Span) -> bytes:
        target = self._region.span(0, span.nbytes)
        HostDevice.copy(self._device, self._stream, [(target, span)])
        self._stream.synchronize()
        return bytes(self._window[: span.nbytes])


def right_bytes(replica: Replica) -> bytes:
    """The only right content of a chunk."""
    nbytes = replica.slot.nbytes
    return (replica.node.key * nbytes)[:nbytes]


@dataclass
class Play:
    """A core, and how to look into it."""

    core: Harness
    eyes: Eyes

    def seen(self, replica: Replica) -> bytes:
        if replica.tier is TierId.CPU:
            return bytes(self.core.placement.memory.view(replica.slot))
        assert self.core.vram is not None
        return self.eyes.see(self.core.vram.span(replica.slot))

    def is_right(self, replica: Replica) -> bool:
        return self.seen(replica) == right_bytes(replica)

    def reserve(self, session: Session, lease_id: int, prefix: Prefix) -> Lease | None:
        """Reserve what is wanted of a prefix and fill it; None where nothing was granted."""
        self.core.cache.reserve(session, lease_id, prefix.keys, prefix.parent)
        lease = self.core.cache.write_lease(session, lease_id)
        for replica in lease.replicas.values() if lease else ():
            self.core.placement.memory.view(replica.slot)[:] = right_bytes(replica)
        return lease

    async def load(
        self, session: Session, lease: Lease, prefix: Prefix, deadline_s: float | None
    ) -> tuple[int, LoadStop]:
        """Load and check every byte as it lands."""
        chunks, loading = self.core.cache.load(
            session, lease, prefix.keys, deadline_s, in_vram=session.in_vram
        )
        came = 0
        async for landed in chunks:
            for index, replica in landed.chunks:
                assert index == came
                assert replica.tier is TierId.CPU or session.in_vram
                assert self.is_right(replica)
                came += 1
        return came, loading.stop

    async def release(self, session: Session, lease: Lease) -> None:
        self.core.cache.release(session, lease.id)

    async def copies_settle(self) -> None:
        """Wait until nothing is on its way between two tiers."""
        while self.core.promotions._live or not self.core.raisings_idle():  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await self.core.write_behind.flush(PATIENCE_S)

    def replicas(self) -> list[Replica]:
        """All replicas in the tree."""
        index = self.core.placement.index
        nodes = [node for each in SPACES for node in index.branch(each).nodes]
        return [replica for node in nodes for replica in node.replicas if replica is not None]

    def check_slots(self) -> None:
        """Each arena's used bytes are its replicas' slots, and no two share one."""
        residents = self.core.placement._residents
        for tier in (TierId.GPU, TierId.CPU):
            there = [r for slab in residents.values() for r in slab if r and r.tier is tier]
            assert {r for r in self.replicas() if r.tier is tier} <= set(there)
            sizes = {r.slot.offset: slot_bytes_of(r.slot.nbytes) for r in there}
            assert len(sizes) == len(there)
            for (one, nbytes), (other, _) in itertools.pairwise(sorted(sizes.items())):
                assert one + nbytes <= other
            assert self.core.placement._arena(tier).used_bytes == sum(sizes.values())


@dataclass
class Using:
    """A lease and, for reading, the load that fills it."""

    session: Session
    lease: Lease
    load: "asyncio.Task[tuple[int, LoadStop]] | None" = None


class VramMachine(RuleBasedStateMachine):
    """Four sessions: of each space one that reaches VRAM, and one that does not."""

    play: Play

    @initialize(
        seed=st.integers(0, 2**32),
        slots=st.sampled_from([(8, 6), (20, 12), (24, 64), (64, 64)]),
        disk=st.sampled_from([0, 10 * SLOT_BYTES, 1 << 30]),
    )
    def start(self, seed: int, slots: tuple[int, int], disk: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.device = MoodyDevice(seed)
        self.store = MemoryStore(capacity_bytes=disk)
        ram, vram = slots
        self.running = harness(
            self.folder, ram, store=self.store, device=self.device, vram_slots=vram
        )
        core = self.run(self.running.__aenter__())
        self.play = Play(core, Eyes(self.device))
        self.sessions = [core.session(each, in_vram=True) for each in SPACES]
        self.sessions += [core.session(each) for each in SPACES]
        self.using: list[Using] = []
        self.loads: list[asyncio.Task[tuple[int, LoadStop]]] = []  # of leases that have ended
        self.lease_ids = itertools.count(1)
        self.removed: set[ChunkKey] = set()  # and not stored again since

    def run(self, what: Coroutine[Any, Any, ResultT]) -> ResultT:
        return self.loop.run_until_complete(asyncio.wait_for(what, PATIENCE_S))

    def prefix(self, session: Session, family: int, length: int) -> Prefix:
        return self.play.core.chain_of(session, length, family)

    # ── what engines do ───────────────────────────────────────────────────────────────────────────

    @rule(who=sessions, family=families, length=lengths, at_once=st.booleans())
    def offload(self, who: int, family: int, length: int, at_once: bool) -> None:
        session = self.sessions[who]
        prefix = self.prefix(session, family, length)
        lease = self.play.reserve(session, next(self.lease_ids), prefix)
        if lease is not None and at_once:
            self.commit(session, lease)
        elif lease is not None:
            self.using.append(Using(session, lease))

    def commit(self, session: Session, lease: Lease) -> None:
        keys = {index: replica.node.key for index, replica in lease.replicas.items()}
        outcomes = self.play.core.cache.commit(session, lease.id, list(keys))
        for key, outcome in zip(keys.values(), outcomes, strict=True):
            if outcome is CommitOutcome.STORED:
                self.removed.discard(key)

    @rule(
        who=sessions,
        family=families,
        length=lengths,
        deadline_s=st.sampled_from([None, None, 0.0]),
        turns=st.integers(0, 4),
    )
    def load(
        self, who: int, family: int, length: int, deadline_s: float | None, turns: int
    ) -> None:
        session = self.sessions[who]
        prefix = self.prefix(session, family, length)
        lease = self.play.core.cache.open_read(session, next(self.lease_ids))
        load = self.loop.create_task(self.play.load(session, lease, prefix, deadline_s))
        self.using.append(Using(session, lease, load))
        self.turn(turns)

    @precondition(lambda self: self.store.gate.is_set())
    @rule(who=sessions, family=families, length=lengths)
    def use_twice(self, who: int, family: int, length: int) -> None:
        """Store a prompt and load it twice: from RAM, then from VRAM where that is reached."""
        self.offload(who, family, length, at_once=True)
        for _ in range(2):
            self.load(who, family, length, None, 0)
            self.settle()
            self.leave(-1, publish=False)

    @precondition(lambda self: self.using)
    @rule(which=some, publish=st.booleans())
    def leave(self, which: int, publish: bool) -> None:
        """Release what was read, perhaps before it has come; commit what was written, or not."""
        use = self.using.pop(which % len(self.using))
        assert all(self.play.is_right(replica) for replica in use.lease.replicas.values())
        cache = self.play.core.cache
        if use.load is not None:
            self.run(self.play.release(use.session, use.lease))
            self.loads.append(use.load)
        elif publish:
            self.commit(use.session, use.lease)
        else:
            cache.abort(use.session, use.lease.id)

    @rule(who=sessions, family=families, length=lengths)
    def prefetch(self, who: int, family: int, length: int) -> None:
        session = self.sessions[who]
        keys = self.prefix(session, family, length).keys

        async def ask() -> None:
            await self.play.core.cache.prefetch(session, keys)

        self.run(ask())

    @rule(who=sessions, family=families, at=st.integers(0, LENGTH - 1))
    def remove(self, who: int, family: int, at: int) -> None:
        session, cache = self.sessions[who], self.play.core.cache
        keys = self.prefix(session, family, LENGTH).keys
        self.run(cache.evict(session, keys[at : at + 1], whole_space=False))
        self.removed.update(keys[at:])

    @rule(who=sessions)
    def remove_all(self, who: int) -> None:
        session = self.sessions[who]
        self.run(self.play.core.cache.evict(session, [], whole_space=True))
        for family in range(FAMILIES):
            self.removed.update(self.prefix(session, family, LENGTH))

    @rule(who=sessions)
    def reconnect(self, who: int) -> None:
        """A session ends, with all that it leased."""
        core, session = self.play.core, self.sessions[who]
        core.cache.end_session(session)
        self.loads += [use.load for use in self.using if use.session is session and use.load]
        self.using = [use for use in self.using if use.session is not session]
        self.sessions[who] = core.session(session.branch.space, in_vram=session.in_vram)

    # ── what else happens ─────────────────────────────────────────────────────────────────────────

    @rule(turns=st.integers(1, 20))
    def turn(self, turns: int) -> None:
        """Let the loop hear of some copies."""

        async def turn_over() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(turn_over())

    @precondition(lambda self: self.store.gate.is_set())
    @rule()
    def settle(self) -> None:
        """Wait for all copies and loads."""
        loads = [use.load for use in self.using if use.load]

        async def all_settle() -> None:
            await asyncio.gather(*loads, *self.loads)
            await self.play.copies_settle()

        self.run(all_settle())

    @rule(count=st.integers(1, 8))
    def ram_is_needed(self, count: int) -> None:
        placement = self.play.core.placement
        for tenant in placement.index.tenants:
            victims = placement.index.victims(tenant, TierId.CPU, placement.clock())
            for victim in itertools.islice(victims, count):
                placement.evict(victim)

    @rule()
    def disk_stands_still_or_goes_on(self) -> None:
        gate = self.store.gate
        gate.clear() if gate.is_set() else gate.set()

    @rule()
    def disk_refuses_or_takes(self) -> None:
        self.store.refuse_writes = not self.store.refuse_writes

    @rule(who=sessions, family=families, at=st.integers(0, LENGTH - 1),
          outcome=st.sampled_from([Outcome.FAILED, Outcome.CORRUPT, Outcome.MISS]))  # fmt: skip
    def disk_loses(self, who: int, family: int, at: int, outcome: Outcome) -> None:
        self.store.outcomes[self.prefix(self.sessions[who], family, LENGTH)[at]] = outcome

    @rule()
    def copies_fail_or_work(self) -> None:
        self.device.failing = not self.device.failing

    # ── what holds all the time ───────────────────────────────────────────────────────────────────

    @invariant()
    def the_index_and_the_arenas_agree(self) -> None:
        self.play.core.placement.index.check()
        self.play.check_slots()

    @invariant()
    def what_is_leased_stays(self) -> None:
        for use in self.using:
            assert not use.lease.ended
            assert all(replica.pins for replica in use.lease.replicas.values() if use.load)
            assert all(self.play.is_right(replica) for replica in use.lease.replicas.values())

    @invariant()
    def what_was_removed_does_not_come_back(self) -> None:
        for session, family in itertools.product(self.sessions[2:], range(FAMILIES)):
            keys = self.prefix(session, family, LENGTH).keys
            held = self.play.core.placement.index.match(session.branch, keys)
            assert self.removed.isdisjoint(node.key for node in held)

    @invariant()
    def vram_lets_nothing_go_that_is_nowhere_else(self) -> None:
        history = self.play.core.placement.history
        for session, family in itertools.product(self.sessions[:2], range(FAMILIES)):
            for key in self.prefix(session, family, LENGTH):
                lost = history.find(session.branch.digest, key)
                assert lost is None or lost.loss.tier is not TierId.GPU

    def teardown(self) -> None:
        if not hasattr(self, "play"):
            return
        try:
            self.device.failing = self.store.refuse_writes = False
            self.store.gate.set()
            self.store.outcomes.clear()
            self.run(self.all_ends_well())
            self.run(self.running.__aexit__(None, None, None))  # type: ignore[arg-type]
        finally:
            self.device.close()
            self.loop.close()
            shutil.rmtree(self.folder)

    async def all_ends_well(self) -> None:
        """Once all have left and copies work again, what is held can be had, and nothing is kept
        that nobody needs."""
        core, play = self.play.core, self.play
        for use in self.using:
            core.cache.end_session(use.session)
        await asyncio.gather(*self.loads, *(use.load for use in self.using if use.load))
        sessions = [core.session(each, in_vram=True) for each in SPACES]
        sessions += [core.session(each) for each in SPACES]
        for session, family in itertools.product(sessions, range(FAMILIES)):
            prefix = self.prefix(session, family, LENGTH)
            held, _ = core.cache.lookup(session, prefix.keys)
            lease = core.cache.open_read(session, next(self.lease_ids))
            came, stop = await play.load(session, lease, prefix, None)
            core.cache.release(session, lease.id)
            assert came == held or stop is LoadStop.NO_ROOM
        await play.copies_settle()
        assert all(replica.state is State.READY for replica in play.replicas())
        assert not any(replica.pins for replica in play.replicas())
        residents = core.placement._residents.values()
        assert {r for slab in residents for r in slab if r} <= set(play.replicas())


class TestVram(VramMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
