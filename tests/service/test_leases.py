"""Leases as a state machine: whatever is granted ends exactly once, and nothing else moves."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.chunks import ChunkKey
from kvtier.errors import InvalidRequest, LimitReached
from kvtier.service.leases import LEASES_PER_SESSION, Lease, Leases, Mode
from kvtier.spaces import Layout, Space
from kvtier.tiers.arena import Arena
from kvtier.tiers.index import Index
from kvtier.tiers.policies.lru import Lru
from kvtier.tiers.tree import Replica, State, TierId

SPACE = Space("m", Layout("int8", 1, 1, 1, tokens=1, planes=1))
SLOT = 4096


class LeaseMachine(RuleBasedStateMachine):
    """Two sessions over one index and arena."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(64 * SLOT)
        self.index = Index(lambda _: Lru[Replica](), lambda replica: self.arena.free(replica.slot))
        self.branch = self.index.branch(SPACE)
        self.sessions = [Leases(self.index), Leases(self.index)]
        self.open: list[tuple[Leases, Lease]] = []
        self.next_id = 0
        self.next_key = 0

    def _lease(self, session: int, mode: Mode) -> tuple[Leases, Lease]:
        self.next_id += 1
        leases = self.sessions[session]
        pair = leases, leases.open(self.next_id, mode)
        self.open.append(pair)
        return pair

    def _ready(self) -> list[Replica]:
        found = [node.ready(TierId.CPU) for node in self.branch.nodes]
        return [replica for replica in found if replica is not None]

    @rule(session=st.integers(0, 1), count=st.integers(0, 4))
    def reserve(self, session: int, count: int) -> None:
        leases, lease = self._lease(session, Mode.WRITE)
        for index in range(count):
            slot = self.arena.allocate(1)
            if slot is None:
                return
            self.next_key += 1
            key = ChunkKey(self.next_key.to_bytes(32, "big"))
            node = self.index.enter(self.branch, key, self.branch.digest, 1.0)
            [coming] = self.index.arrival(self.branch, TierId.CPU, None, [key], 1.0)
            replica = self.index.begin(node, TierId.CPU, slot, coming)
            leases.add_write(lease, index, replica)

    @rule(session=st.integers(0, 1), data=st.data())
    def read(self, session: int, data: st.DataObject) -> None:
        leases, lease = self._lease(session, Mode.READ)
        ready = self._ready()
        chosen = data.draw(st.lists(st.sampled_from(ready), unique=True)) if ready else []
        for index, replica in enumerate(chosen):
            leases.add_read(lease, index, replica)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit_some(self, data: st.DataObject) -> None:
        leases, lease = data.draw(st.sampled_from(self.open))
        if lease.mode is Mode.WRITE:
            for index in list(lease.replicas):
                if data.draw(st.booleans()):
                    replica = leases.take_written(lease, index)
                    assert replica is not None
                    assert self.index.commit(replica)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.open))
        self.open.remove(pair)
        leases, lease = pair
        expected = len(lease.replicas) if lease.mode is Mode.WRITE else 0
        assert leases.end(lease) == expected
        assert lease.ended

    @rule(session=st.integers(0, 1), piece=st.integers(1, 5))
    def lose_a_client(self, session: int, piece: int) -> None:
        leases = self.sessions[session]
        mine = [lease for other, lease in self.open if other is leases]
        reserved = sum(len(lease.replicas) for lease in mine if lease.mode is Mode.WRITE)
        leases.end_all()
        assert all(lease.ended for other, lease in self.open if other is leases)
        discarded = 0
        while not leases.given_back:
            discarded += leases.give_back(piece)
        assert discarded == reserved
        self.open = [pair for pair in self.open if pair[0] is not leases]
        assert len(leases) == 0
        assert leases.write_bytes == 0

    @rule()
    def evict_what_may_go(self) -> None:
        for victim in self.index.victims(self.branch.tenant, TierId.CPU, 1.0):
            self.index.drop(victim)

    @invariant()
    def what_is_leased_stays(self) -> None:
        for leases, lease in self.open:
            assert leases.find(lease.id, lease.mode) is lease
            expected = State.READY if lease.mode is Mode.READ else State.WRITING
            assert all(replica.state is expected for replica in lease.replicas.values())

    @invariant()
    def everything_is_counted(self) -> None:
        self.index.check()
        replicas = [r for node in self.branch.nodes for r in node.replicas if r]
        assert self.arena.used_bytes == SLOT * len(replicas)
        reads = [lease for _, lease in self.open if lease.mode is Mode.READ]
        writes = [lease for _, lease in self.open if lease.mode is Mode.WRITE]
        assert sum(r.pins for r in replicas) == sum(len(lease.replicas) for lease in reads)
        assert sum(leases.write_bytes for leases in self.sessions) == sum(
            len(lease.replicas) for lease in writes
        )


class TestLeases(LeaseMachine.TestCase):
    settings = settings(max_examples=80, stateful_step_count=40)


def test_an_id_is_used_once_at_a_time() -> None:
    machine = LeaseMachine()
    leases = machine.sessions[0]
    lease = leases.open(7, Mode.READ)
    with pytest.raises(InvalidRequest, match="lease_id: 7"):
        leases.open(7, Mode.WRITE)
    leases.end(lease)
    assert leases.open(7, Mode.WRITE)
    assert leases.find(7, Mode.READ) is None


def test_a_client_that_leaks_leases_is_stopped() -> None:
    machine = LeaseMachine()
    leases = machine.sessions[0]
    for number in range(LEASES_PER_SESSION):
        leases.open(number, Mode.READ)
    with pytest.raises(LimitReached, match="leases"):
        leases.open(LEASES_PER_SESSION, Mode.READ)
