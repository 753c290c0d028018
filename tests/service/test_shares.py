"""Who has to give up room for whom."""

from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.service.answers import ReserveOutcome
from kvtier.service.demotion import When, Writing
from kvtier.service.pins import Terms
from kvtier.service.shares import Shares
from kvtier.spaces import Layout, Space
from kvtier.tiers.index import Index
from kvtier.tiers.policies.lru import Lru
from kvtier.tiers.tree import Replica, Tenant, TierId
from tests.core import Harness, harness, space

WRITE, QUOTA = ReserveOutcome.WRITE, ReserveOutcome.QUOTA
CPU = TierId.CPU
HOUR_S = 3600.0


def in_ram(h: Harness, tenant: str) -> int:
    """Chunks of a tenant in RAM."""
    return h.session(space(tenant=tenant)).branch.tenant.used_bytes[CPU] // 4096


async def test_a_flood_evicts_nobody_below_the_share(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=8) as h:
        quiet, loud = h.session(space(tenant="quiet")), h.session(space(tenant="loud"))
        kept = h.chain_of(quiet, 4)
        h.put(quiet, kept)
        h.cache.lookup(quiet, kept.keys)
        await h.get(quiet, kept[:0])
        for seed in range(5):
            h.put(loud, h.chain_of(loud, 3, seed=seed))
        assert h.cache.lookup(quiet, kept.keys) == (4, 4)
        assert in_ram(h, "loud") == 4


async def test_who_has_more_than_its_share_gives_it_back(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=8) as h:
        early, late = h.session(space(tenant="early")), h.session(space(tenant="late"))
        h.put(early, h.chain_of(early, 8))
        assert in_ram(h, "early") == 8
        assert h.put(late, h.chain_of(late, 3)) == [WRITE] * 3
        assert h.put(late, h.chain_of(late, 3, seed=1)) == [WRITE] * 3
        assert (in_ram(h, "early"), in_ram(h, "late")) == (4, 4)


async def test_room_of_one_that_went_away_is_anyones(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=8) as h:
        gone, here = h.session(space(tenant="gone")), h.session(space(tenant="here"))
        h.put(gone, h.chain_of(gone, 4))
        h.clock_s[0] += HOUR_S + 1
        for seed in range(2):
            h.put(here, h.chain_of(here, 4, seed=seed))
        assert (in_ram(h, "gone"), in_ram(h, "here")) == (0, 8)


async def test_a_quota_is_kept_and_costs_only_ones_own(tmp_path: Path) -> None:
    quotas = dict.fromkeys(TierId, 50)
    async with harness(tmp_path, slots=8, quota_percent=quotas) as h:
        first, second = h.session(space(tenant="first")), h.session(space(tenant="second"))
        other = h.chain_of(second, 2)
        h.put(second, other)
        prefix = h.chain_of(first, 4)
        assert h.put(first, prefix) == [WRITE] * 4
        _, _, lease = await h.get(first, prefix)
        assert h.put(first, h.chain_of(first, 2, seed=1)) == [QUOTA] * 2
        first.leases.end(lease)
        assert h.put(first, h.chain_of(first, 2, seed=2)) == [WRITE] * 2
        assert in_ram(h, "first") == 4
        assert h.cache.lookup(second, other.keys) == (2, 2)
        assert h.placement.counters.refused_quota == 2


@dataclass(frozen=True)
class Standing:
    """What a tenant holds, how much of that is pinned, and when it asked for anything."""

    used: int
    pinned_percent: int
    ago_s: float


class ShareMachine(RuleBasedStateMachine):
    """Tenants come, hold and ask as they like."""

    CAPACITY = 100

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(lambda tier: Lru[Replica](), lambda replica: None)
        self.now_s = 10 * HOUR_S
        capacity = dict.fromkeys(TierId, self.CAPACITY)
        self.shares = Shares(self.index, capacity, dict.fromkeys(TierId, 60), lambda: self.now_s)

    def tenant(self, name: int) -> Tenant:
        layout = Layout("int8", 1, 1, 1, tokens=1, planes=1)
        return self.index.branch(Space("m", layout, tenant=str(name))).tenant

    @rule(name=st.integers(0, 4), nbytes=st.integers(0, 100))
    def hold(self, name: int, nbytes: int) -> None:
        self.tenant(name).used_bytes[CPU] = nbytes

    @rule(name=st.integers(0, 4), ago_s=st.floats(0, 2 * HOUR_S))
    def ask(self, name: int, ago_s: float) -> None:
        self.tenant(name).asked_s = self.now_s - ago_s

    @rule(name=st.integers(0, 4))
    def losers(self, name: int) -> None:
        asker = self.tenant(name)
        losers = list(self.shares.losers(CPU, asker))
        assert losers[-1] is asker
        assert len(losers) == len({tenant.name for tenant in losers})
        present = {t.name for t in self.index.tenants if t.asked_s > self.now_s - HOUR_S}
        share = self.CAPACITY // len(present | {asker.name})
        for tenant in losers[:-1]:
            assert tenant.used_bytes[CPU] > (share if tenant.name in present else 0)

    @rule(name=st.integers(0, 4), more=st.integers(1, 100))
    def quota(self, name: int, more: int) -> None:
        tenant = self.tenant(name)
        allowed = self.shares.within_quota(tenant, CPU, more)
        assert allowed == (tenant.used_bytes[CPU] + more <= 60)

    @invariant()
    def a_tenant_alone_loses_its_own(self) -> None:
        if len(self.index.tenants) == 1:
            [tenant] = self.index.tenants
            assert list(self.shares.losers(CPU, tenant)) == [tenant]


class TestShares(ShareMachine.TestCase):
    settings = settings(max_examples=50, stateful_step_count=30)


tenants_of = st.lists(
    st.builds(
        Standing,
        used=st.integers(0, 60),
        pinned_percent=st.sampled_from([0, 0, 30, 100]),
        ago_s=st.sampled_from([0.0, HOUR_S - 1, HOUR_S + 1]),
    ),
    min_size=1,
    max_size=7,
)
changes = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30)), max_size=6)


@given(standings=tenants_of, changes=changes)
def test_one_claim_takes_from_whom_one_for_each_chunk_would(
    standings: list[Standing], changes: list[tuple[int, int]]
) -> None:
    """While the first one grows and the others only lose, as in one turn of the loop."""
    machine = ShareMachine()
    pinned: dict[Tenant, int] = {}
    for name, standing in enumerate(standings):
        machine.hold(name, standing.used)
        machine.ask(name, standing.ago_s)
        tenant = machine.tenant(name)
        rest = 90 - sum(pinned.values())
        pinned[tenant] = min(rest, standing.used * standing.pinned_percent // 100)
    machine.shares.pinned = lambda tenant, tier: pinned[tenant]
    asker = machine.tenant(0)
    losers = machine.shares.losers(CPU, asker)
    for who, nbytes in [(0, 0), *changes]:
        used = machine.tenant(who % len(standings)).used_bytes
        used[CPU] = used[CPU] + nbytes if who % len(standings) == 0 else max(0, used[CPU] - nbytes)
        assert list(losers) == by_the_rule(machine, asker, pinned)
        for tenant in losers:  # one that stops half-way leaves the next as it should be
            if tenant.used_bytes[CPU] % 2:
                break


def by_the_rule(machine: ShareMachine, asker: Tenant, pinned: dict[Tenant, int]) -> list[Tenant]:
    """Who loses for one chunk, found anew and plainly: the share is the most that everyone present
    can have beside what is pinned beyond it."""
    everyone = machine.index.tenants
    present = {t for t in everyone if t is asker or t.asked_s > machine.now_s - HOUR_S}

    def bound(tenant: Tenant, share: int) -> int:
        return max(pinned[tenant], share) if tenant in present else pinned[tenant]

    share = max(
        each
        for each in range(machine.CAPACITY + 1)
        if sum(bound(tenant, each) for tenant in everyone) <= machine.CAPACITY
    )
    excess = {tenant: tenant.used_bytes[CPU] - bound(tenant, share) for tenant in everyone}
    over = sorted((t for t in everyone if excess[t] > 0), key=excess.__getitem__, reverse=True)
    return [*over[: over.index(asker)], asker] if asker in over else [*over, asker]


async def test_who_comes_late_finds_its_share_beside_what_is_pinned(tmp_path: Path) -> None:
    """Half of RAM is pinned, and the others hold the rest, each less than an equal part of all."""
    async with harness(tmp_path, slots=40, writing=Writing(When.SECOND_TOUCH)) as h:
        pinning = [h.session(space(tenant=f"pinning {n}")) for n in range(3)]
        for session, chunks in zip(pinning, (8, 8, 4), strict=True):
            prefix = h.chain_of(session, chunks)
            h.put(session, prefix)
            assert h.cache.pin(session, prefix.keys, Terms(60)).chunks == chunks
        others = [h.session(space(tenant=f"other {n}")) for n in range(10)]
        for session in others:
            h.put(session, h.chain_of(session, 2))
        late = h.session(space(tenant="late"))
        assert h.put(late, h.chain_of(late, 1)) == [WRITE]
        assert [in_ram(h, f"pinning {n}") for n in range(3)] == [8, 8, 4]
        assert sorted(in_ram(h, f"other {n}") for n in range(10)) == [1] + 9 * [2]


@given(held=st.lists(st.integers(0, 100), min_size=2, max_size=6))
def test_the_one_furthest_above_its_share_loses_first(held: list[int]) -> None:
    machine = ShareMachine()
    for name, nbytes in enumerate(held):
        machine.hold(name, nbytes)
        machine.ask(name, 0.0)
    asker = machine.tenant(0)
    used = [tenant.used_bytes[CPU] for tenant in machine.shares.losers(CPU, asker)][:-1]
    assert used == sorted(used, reverse=True)
