"""Pins beside everything else that happens to chunks: whatever the order, they keep what they name,
count what they keep, and leave nothing behind."""

import asyncio
import itertools
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.chunks import Prefix, chain, pack_tokens
from kvtier.kernels.shared_memory import SharedMemory
from kvtier.metrics import Counters
from kvtier.sections import Limits
from kvtier.service.answers import ReserveOutcome
from kvtier.service.cache import Cache, Retained
from kvtier.service.history import History
from kvtier.service.leases import Mode
from kvtier.service.pins import Pin, Pins, Terms
from kvtier.service.placement import Memory, Placement, Rules, Tiers
from kvtier.service.promotion import Promotions
from kvtier.service.sessions import Session, Sessions
from kvtier.tiers.policies.registry import make_family
from kvtier.tiers.tree import State, TierId
from tests.core import CHUNK_TOKENS, SLOT_BYTES, space

SLOTS, PERCENT, LENGTH = 20, 30, 6
who, family, length = st.integers(0, 2), st.integers(0, 3), st.integers(1, LENGTH)
SPACES = [space(tenant="a"), space(model="x", tenant="a"), space(tenant="b")]


class PinsMachine(RuleBasedStateMachine):
    """Two tenants, one of them in two spaces, in RAM alone. `kept` are the keys of each pin that is
    to be there, from the root on."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        path = self.folder / "arena"
        memory = Memory(SharedMemory.create(path, SLOTS * SLOT_BYTES))
        family = make_family("lru")
        rules = Rules(lambda tier: family.policy())
        counters = Counters()
        self.placement = Placement(Tiers(memory), History(10), counters, rules, lambda: 1.0)
        self.now_s = 0.0
        self.pins = Pins(self.placement, PERCENT, lambda: self.now_s)
        sessions = Sessions(self.placement.index, 100, path, counters.add_aborted)
        promotions = Promotions(self.placement, None)
        retained = Retained(0.0, Limits(session_lease_percent=100), 0)
        self.cache = Cache(self.placement, promotions, sessions, retained, self.pins)
        self.sessions = [self.open(each) for each in range(len(SPACES))]
        self.kept: dict[Pin, list[bytes]] = {}
        self.ids = itertools.count(1)

    def open(self, place: int) -> Session:
        return self.cache.open_session("test", SPACES[place], tethered=False)

    def prefix(self, who: int, family: int, length: int) -> Prefix:
        tokens = [family * 1000 + n for n in range(length * CHUNK_TOKENS)]
        digest = self.sessions[who].branch.digest
        return chain(digest, pack_tokens(tokens), CHUNK_TOKENS)

    @rule(who=who, family=family, length=length)
    def put(self, who: int, family: int, length: int) -> None:
        prefix, session, lease = (
            self.prefix(who, family, length),
            self.sessions[who],
            next(self.ids),
        )
        answers = self.cache.reserve(session, lease, prefix.keys, prefix.parent)
        granted = [i for i, each in enumerate(answers) if each.outcome is ReserveOutcome.WRITE]
        self.cache.commit(session, lease, granted)

    @rule(who=who, family=family, length=length)
    def lease(self, who: int, family: int, length: int) -> None:
        """Read what is held, and keep it leased."""
        session = self.sessions[who]
        lease = session.leases.open(next(self.ids), Mode.READ)
        run = self.placement.index.match(session.branch, self.prefix(who, family, length).keys)
        for place, node in enumerate(run):
            if node.in_cpu is not None:
                session.leases.add_read(lease, place, node.in_cpu)

    @rule(who=who)
    def release(self, who: int) -> None:
        leases = self.sessions[who].leases
        leases.end_all()
        while not leases.given_back:
            leases.give_back(LENGTH)

    @rule(
        who=who,
        family=family,
        length=length,
        first=st.integers(0, LENGTH - 1),
        ttl_s=st.floats(1, 50),
        ends=st.booleans(),
    )
    def pin(self, who: int, family: int, length: int, first: int, ttl_s: float, ends: bool) -> None:
        prefix, session = self.prefix(who, family, length), self.sessions[who]
        keys = prefix[min(first, length) :].keys
        held = self.cache.lookup(session, keys)[0]
        pinned = self.cache.pin(session, keys, Terms(ttl_s, ends))
        assert pinned.chunks <= held
        assert (pinned.pin is None) == (pinned.chunks == 0)
        if pinned.pin is not None:
            self.kept[pinned.pin] = list(prefix.keys[: length - len(keys) + pinned.chunks])

    @rule(who=who, place=st.integers(0, 100))
    def unpin(self, who: int, place: int) -> None:
        mine = [pin for pin, _ in self.pins.listed(self.sessions[who])]
        if mine:
            self.pins.unpin(self.sessions[who], mine[place % len(mine)].id)
            del self.kept[mine[place % len(mine)]]

    @rule(passed_s=st.floats(0, 30))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.kept = {pin: keys for pin, keys in self.kept.items() if pin.until_s > self.now_s}
        self.pins.expire()

    @rule(who=who, family=family, length=length)
    def evict(self, who: int, family: int, length: int) -> None:
        """A client's wish wins over pins."""
        gone = self.prefix(who, family, length)[-1:]
        asyncio.run(self.cache.evict(self.sessions[who], gone.keys, whole_space=False))
        for pin, keys in list(self.kept.items()):
            if gone.keys[0] in keys:
                self.kept[pin] = keys[: keys.index(gone.keys[0])]
                if not self.kept[pin]:
                    del self.kept[pin]

    @rule(who=who)
    def end_session(self, who: int) -> None:
        session = self.sessions[who]
        self.cache.end_session(session)
        self.kept = {pin: keys for pin, keys in self.kept.items() if pin.session is not session}
        self.sessions[who] = self.open(who)

    @invariant()
    def pins_are_what_they_are_to_be(self) -> None:
        listed = {
            pin: [replica.key for replica in pin.replicas]
            for session in self.sessions
            for pin, _ in self.pins.listed(session)
        }
        assert listed == self.kept
        for pin in self.kept:
            assert all(replica.state is State.READY for replica in pin.replicas)

    @invariant()
    def what_they_take_is_counted_once_and_within_bounds(self) -> None:
        total = 0
        for name in ("a", "b"):
            mine = {r for pin in self.kept if pin.branch.tenant.name == name for r in pin.replicas}
            tenant = self.pins._tenants.get(name)
            assert (tenant.nbytes[TierId.CPU] if tenant else 0) == len(mine) * SLOT_BYTES
            assert len(mine) * 100 <= SLOTS * PERCENT
            total += len(mine)
        assert self.pins._nbytes[TierId.CPU] == total * SLOT_BYTES

    @invariant()
    def the_index_is_sound(self) -> None:
        self.placement.index.check()

    def teardown(self) -> None:
        self.now_s += 1000
        self.pins.expire()
        for session in self.sessions:
            self.cache.end_session(session)
        assert not self.pins._tenants
        assert not self.pins._on
        for each in self.placement.index.spaces:
            nodes = self.placement.index.branch(each).nodes
            assert all(r is None or not r.pins for node in nodes for r in node.replicas)
            asyncio.run(self.cache.evict(self.open(SPACES.index(each)), [], whole_space=True))
        assert self.placement.memory.arena.used_bytes == 0
        self.placement.memory.region.close(unlink=True)
        shutil.rmtree(self.folder)


TestPinsMachine = PinsMachine.TestCase
TestPinsMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
