"""Why a key is not a hit: each reason, forced."""

from pathlib import Path

from kvtier.chunks import Prefix, pack_tokens
from kvtier.service.answers import Explanation, KeyState, ReserveOutcome
from kvtier.service.explain import Explainer
from kvtier.service.history import History, Loss, LossRecord
from kvtier.service.sessions import Session
from kvtier.tiers.base import Outcome
from tests.core import Harness, harness, space


def explain(
    h: Harness, session: Session, prefix: Prefix, tokens: list[int] | None = None
) -> list[Explanation]:
    explainer = Explainer(h.placement.index, h.placement.history)
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


async def test_evicted(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=4) as h:
        h.store.refuse_writes = True
        session = h.session()
        old = h.chain_of(session, 4, seed=1)
        h.put(session, old)
        assert h.put(session, h.chain_of(session, 1, seed=2)) == [ReserveOutcome.WRITE]
        answer = explain(h, session, old)[3]
        assert answer.state is KeyState.EVICTED
        assert "cpu tier needed its room" in answer.detail


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
        assert "continued that chunk" in second.detail


async def test_expired(tmp_path: Path) -> None:
    async with harness(tmp_path, ttl_s=5) as h:
        session = h.session()
        prefix = h.chain_of(session, 1)
        h.put(session, prefix)
        h.clock_s[0] += 6
        h.cache.lookup(session, prefix.keys)
        assert explain(h, session, prefix)[0].state is KeyState.EXPIRED


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


def test_history_is_bounded() -> None:
    history = History(limit=2)
    keys = [bytes([n]) * 32 for n in range(3)]
    for key in keys:
        history.note(b"s", key, LossRecord(Loss.EVICTED, 1.0, "x"))  # type: ignore[arg-type]
    found = [history.find(b"s", key) is not None for key in keys]  # type: ignore[arg-type]
    assert found == [False, True, True]
