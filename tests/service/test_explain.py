"""Why a key is not a hit: each reason, forced."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.chunks import ChunkKey, Prefix, pack_tokens
from kvtier.config import Config
from kvtier.config import load as load_config
from kvtier.service.answers import Explanation, KeyState, ReserveOutcome
from kvtier.service.explain import Explainer
from kvtier.service.history import LOSSES, History, Loss, Why
from kvtier.service.journal import COMMITTED
from kvtier.service.sessions import Session
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import Outcome
from kvtier.tiers.tree import TierId
from tests.core import CHUNK_TOKENS, Harness, harness, space

DEFAULTS = load_config(None, {}, [])


def explain(
    h: Harness,
    session: Session,
    prefix: Prefix,
    tokens: list[int] | None = None,
    config: Config = DEFAULTS,
) -> list[Explanation]:
    explainer = Explainer(h.placement.index, h.placement.history, config)
    return explainer.explain(session.branch, prefix.keys, pack_tokens(tokens or []), [])


async def test_held_being_written_and_never_stored(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix[:2])
        await h.write_behind.flush(10)
        h.only_on_disk()
        await h.get(session, prefix[:1])
        h.reserve(session, prefix[2:3])
        states = [answer.state for answer in explain(h, session, prefix)]
        assert states == [
            KeyState.RAM,
            KeyState.DISK,
            KeyState.BEING_WRITTEN,
            KeyState.NEVER_STORED,
        ]


async def test_a_prompt_that_parts_inside_a_chunk_is_told(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        h.put(session, h.prefix(session, [1, 2, 3, 4, 5, 6, 7, 8]))
        parted = h.prefix(session, [1, 2, 3, 4, 5, 6, 7, 9])
        answer = explain(h, session, parted)[1]
        assert answer.state is KeyState.NEVER_STORED
        assert "part from this one in chunk 1" in answer.detail


# ── Evicted ──


async def test_evicted_for_a_chunk_of_its_own_tenant(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=4) as h:
        h.store.refuse_writes = True
        session = h.session()
        old = h.chain_of(session, 4, seed=1)
        h.put(session, old)
        h.clock_s[0] = 86_400.0
        assert h.put(session, h.chain_of(session, 1, seed=2)) == [ReserveOutcome.WRITE]
        answer = explain(h, session, old)[3]
        assert answer.state is KeyState.EVICTED
        assert answer.detail == (
            "evicted from cpu, the only tier with it, by eviction.policy = gix: room was needed for"
            " a chunk of its own tenant (1970-01-02 00:00:00 UTC)"
        )
        assert explain(h, session, old)[2].state is KeyState.RAM


async def test_evicted_for_another_tenant(tmp_path: Path) -> None:
    """The one that fills RAM gives up what it has above its share."""
    async with harness(tmp_path, slots=4) as h:
        h.store.refuse_writes = True
        flood, late = h.session(space(tenant="flood")), h.session(space(tenant="late"))
        old = h.chain_of(flood, 4)
        h.put(flood, old)
        h.put(late, h.chain_of(late, 1))
        answer = explain(h, flood, old)[3]
        assert answer.state is KeyState.EVICTED
        assert "a chunk of another tenant, and its own held more than its share" in answer.detail
        assert "late" not in answer.detail, "whose it was is not told"


async def test_evicted_by_its_own_tenants_quota(tmp_path: Path) -> None:
    quotas = {TierId.GPU: 100, TierId.CPU: 50, TierId.DISK: 100}
    config = load_config(None, {}, ["tenants.cpu_percent=50", "eviction.policy=lru"])
    async with harness(tmp_path, slots=8, quota_percent=quotas) as h:
        h.store.refuse_writes = True
        session = h.session()
        old = h.chain_of(session, 4, seed=1)
        h.put(session, old)
        h.put(session, h.chain_of(session, 1, seed=2))
        answer = explain(h, session, old, config=config)[3]
        assert answer.state is KeyState.EVICTED
        assert "its tenant held all that tenants.cpu_percent = 50 allows" in answer.detail
        assert "eviction.policy = lru" in answer.detail


async def test_evicted_with_its_slab(tmp_path: Path) -> None:
    """A layout of another size gets the slab with the last two chunks."""
    async with harness(tmp_path, slots=64) as h:
        h.store.refuse_writes = True
        session = h.session()
        old = h.chain_of(session, 64)
        h.put(session, old)
        layout = Layout("int8", 8, 2, 64, tokens=CHUNK_TOKENS, planes=2)
        other = h.session(Space("large", layout))
        lease = h.cache.reserve(other, 99, h.chain_of(other, 1).keys, other.branch.digest)
        assert [answer.outcome for answer in lease] == [ReserveOutcome.WRITE]
        answers = explain(h, session, old)[62:]
        assert {answer.state for answer in answers} == {KeyState.EVICTED}
        assert all("given to chunks of another size" in answer.detail for answer in answers)


async def test_evicted_from_disk(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 1)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.only_on_disk()
        victim = h.next_victim(session.branch.tenant, TierId.DISK)
        assert victim is not None
        h.placement.evict(victim)
        assert "evicted from disk" in explain(h, session, prefix)[0].detail


async def test_removed_by_a_client_with_what_continued_it(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        h.put(session, prefix)
        await h.cache.evict(session, prefix.keys[1:2], whole_space=False)
        kept, removed, below = explain(h, session, prefix)
        assert kept.state is KeyState.RAM
        assert removed.state is below.state is KeyState.EVICTED
        assert "asked for it with Evict (" in removed.detail
        assert "with Evict; it continued such a chunk" in below.detail


async def test_what_lost_its_copy_in_ram_is_not_lost(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=4) as h:
        session = h.session()
        prefix = h.chain_of(session, 4, seed=1)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.put(session, h.chain_of(session, 4, seed=2))
        assert {answer.state for answer in explain(h, session, prefix)} == {KeyState.DISK}
        assert len(h.placement.history) == 0


# ── Refused ──


async def test_refused_while_everything_is_leased(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=2) as h:
        session = h.session()
        leased = h.chain_of(session, 2, seed=1)
        h.put(session, leased)
        await h.get(session, leased)
        refused = h.chain_of(session, 1, seed=2)
        h.put(session, refused)
        answer = explain(h, session, refused)[0]
        assert answer.state is KeyState.REFUSED
        assert answer.detail.startswith("refused: everything else in RAM was leased (")


async def test_refused_as_not_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with harness(tmp_path, slots=2) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 2, seed=1))
        policy = session.branch.tenant.policies[TierId.CPU]
        monkeypatch.setattr(policy, "admits", lambda coming, over: False)
        prefix = h.chain_of(session, 1, seed=2)
        assert h.put(session, prefix) == [ReserveOutcome.NOT_WORTH]
        answer = explain(h, session, prefix)[0]
        assert answer.state is KeyState.REFUSED
        assert "eviction.policy = gix took everything else in RAM to be likelier" in answer.detail


async def test_refused_by_the_lease_limit(tmp_path: Path) -> None:
    config = load_config(None, {}, ["limits.session_lease_percent=25"])
    async with harness(tmp_path, slots=8, session_lease_percent=25) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        assert h.put(session, prefix)[2] is ReserveOutcome.LEASE_LIMIT
        answer = explain(h, session, prefix, config=config)[2]
        assert answer.state is KeyState.REFUSED
        assert "limits.session_lease_percent = 25" in answer.detail


async def test_refused_without_its_parent(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        assert h.put(session, prefix[1:2]) == [ReserveOutcome.PARENT_MISSING]
        lease_id, _ = h.reserve(session, prefix)
        h.cache.commit(session, lease_id, [0, 2])
        answers = explain(h, session, prefix)
        assert [answer.state for answer in answers] == [
            KeyState.RAM,
            KeyState.NEVER_STORED,  # reserved again, and then not committed
            KeyState.REFUSED,
        ]
        assert "neither held nor being written" in answers[2].detail


async def test_reserved_and_never_committed(tmp_path: Path) -> None:
    """Given up by the client, or its session ended."""
    async with harness(tmp_path) as h:
        session, asking = h.session(), h.session()
        prefixes = [h.chain_of(session, 1, seed) for seed in range(2)]
        given_up, _ = h.reserve(session, prefixes[0])
        h.reserve(session, prefixes[1])
        h.cache.abort(session, given_up)
        h.cache.end_session(session)
        for prefix in prefixes:
            answer = explain(h, asking, prefix)[0]
            assert answer.state is KeyState.NEVER_STORED
            assert "reserved and never committed" in answer.detail


async def test_refused_by_the_quota(tmp_path: Path) -> None:
    quotas = {TierId.GPU: 100, TierId.CPU: 25, TierId.DISK: 100}
    config = load_config(None, {}, ["tenants.cpu_percent=25"])
    async with harness(tmp_path, slots=8, quota_percent=quotas) as h:
        session = h.session()
        prefix = h.chain_of(session, 3)
        assert h.reserve(session, prefix)[1][2] is ReserveOutcome.QUOTA
        answer = explain(h, session, prefix, config=config)[2]
        assert answer.state is KeyState.QUOTA
        assert "all that tenants.cpu_percent = 25 allows" in answer.detail


# ── Corrupt, expired, elsewhere ──


async def test_corrupt_and_what_continued_it(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 2)
        h.put(session, prefix)
        await h.write_behind.flush(10)
        h.only_on_disk()
        h.store.outcomes[prefix.keys[0]] = Outcome.CORRUPT
        await h.get(session, prefix)
        first, second = explain(h, session, prefix)
        assert (first.state, second.state) == (KeyState.CORRUPT, KeyState.CORRUPT)
        assert "checksum on disk was wrong (" in first.detail
        assert "continued such a chunk" in second.detail


async def test_expired(tmp_path: Path) -> None:
    async with harness(tmp_path, ttl_s=5) as h:
        session = h.session()
        prefix = h.chain_of(session, 1)
        h.put(session, prefix)
        h.clock_s[0] += 6
        h.cache.lookup(session, prefix.keys)
        config = load_config(None, {}, ["retention.ttl_s=5"])
        answer = explain(h, session, prefix, config=config)[0]
        assert answer.state is KeyState.EXPIRED
        assert "retention.ttl_s = 5" in answer.detail


async def test_another_space_is_told_by_the_fields_that_differ(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        tokens = list(range(8))
        held = h.session(space(weights="old"))
        h.put(held, h.prefix(held, tokens))
        asking = h.session(space(weights="new"))
        answer = explain(h, asking, h.prefix(asking, tokens), tokens)[0]
        assert answer.state is KeyState.OTHER_SPACE
        assert answer.fields == ("weights",)
        unrelated = [99, *tokens[1:]]
        answer = explain(h, asking, h.prefix(asking, unrelated), unrelated)[0]
        assert answer.state is KeyState.NEVER_STORED


async def test_what_another_tenant_holds_is_not_told(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        tokens = list(range(8))
        theirs = h.session(space(tenant="theirs"))
        h.put(theirs, h.prefix(theirs, tokens))
        ours = h.session(space(tenant="ours"))
        held = explain(h, ours, h.prefix(ours, tokens), tokens)
        other = [99, *tokens[1:]]
        never = explain(h, ours, h.prefix(ours, other), other)
        assert held == never, "the answer does not depend on what they hold"
        assert held[0].fields == ("tenant",)


# ── The history ──


def key_of(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(32, "big"))


@given(
    limit=st.integers(0, 5),
    notes=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.sampled_from(Why))),
)
def test_the_history_is_the_last_losses(limit: int, notes: list[tuple[int, int, Why]]) -> None:
    """Against a list of everything: whatever is told is the chunk's last loss, it is among the last
    `limit` notes, and a chunk that was noted as one of those is told."""
    history = History(limit)
    spaces = [bytes([number]) * 32 for number in range(2)]
    for when, (space_number, number, why) in enumerate(notes):
        history.note(spaces[space_number], key_of(number), Loss(why), when)
        assert len(history) <= limit
    last = {(space, number): when for when, (space, number, _) in enumerate(notes)}
    for space_number in range(2):
        for number in range(7):
            found = history.find(spaces[space_number], key_of(number))
            when = last.get((space_number, number), -1)
            assert (found is not None) == (when >= 0 and when >= len(notes) - limit)
            if found is not None:
                assert (found.loss.why, found.when_s) == (notes[when][2], when)


def test_every_loss_fits_in_a_byte_of_its_own() -> None:
    assert len(LOSSES) == 2 * 4 * len(Why)
    assert min(LOSSES) > COMMITTED
    assert max(LOSSES) < 256
