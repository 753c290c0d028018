"""Two tiers: the service's own core on a trace."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.bench.trace import two_tiers as replayed
from kvtier.bench.trace.core import CHUNK_BYTES, Core, running
from kvtier.bench.trace.optimum import Optimum
from kvtier.bench.trace.replay import replay
from kvtier.bench.trace.requests import Trace
from kvtier.bench.trace.two_tiers import TierResult, TwoTiers, two_tiers
from kvtier.service.demotion import When, Writing
from kvtier.tiers.tree import TierId
from tests.bench.traces import TRACES, Prompt, trace_of


def ignore(done: int) -> None:
    """Nobody looks at the progress."""


def run(trace: Trace, policy: str, ram: int, writing: Writing) -> TierResult:
    return TwoTiers(trace, policy, two_tiers(ram), writing, [0] * trace.requests).run(ignore)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replay ends with a look at what the tiers hold."""

    @asynccontextmanager
    async def looked_at(*words: Any) -> AsyncIterator[Core]:
        async with running(*words) as core:
            yield core
            core.placement.index.check()
            for tier, room in words[1].items():
                assert core.placement.index.chunks[tier] <= room
            store = core.placement.store
            assert store is not None
            assert store.used_bytes == CHUNK_BYTES * core.placement.index.chunks[TierId.DISK]
            assert len(store.records()) == core.placement.index.chunks[TierId.DISK]

    monkeypatch.setattr(replayed, "running", looked_at)


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("policy", ["lru", "gix"])
@given(prompts=TRACES, ram=st.integers(1, 6), when=st.sampled_from(When))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_tiers_serve_what_they_can_hold(
    policy: str, prompts: list[Prompt], ram: int, when: When
) -> None:
    trace = trace_of(prompts)
    row = run(trace, policy, ram, Writing(when, 0.0))
    most = 100 * Optimum(trace).hits(11 * ram) / trace.references
    assert row.ram_hit_percent + row.disk_hit_percent <= most + 1e-9
    assert sum(row.written_by_cause.values()) == pytest.approx(row.written_percent)
    assert row.written_percent > 0 or row.disk_hit_percent == 0


@pytest.mark.parametrize("policy", ["lru", "gix"])
@given(prompts=TRACES, ram=st.integers(1, 12))
@settings(max_examples=25)
def test_without_a_disk_ram_serves_what_one_tier_serves(
    policy: str, prompts: list[Prompt], ram: int
) -> None:
    trace = trace_of(prompts)
    chunks = {TierId.CPU: ram, TierId.DISK: 0}
    writing, labels = Writing(When.SECOND_TOUCH), [0] * trace.requests
    row = TwoTiers(trace, policy, chunks, writing, labels).run(ignore)
    alone = replay(trace, policy, ram, ignore).hits.sum()
    assert row.ram_hit_percent == pytest.approx(100 * alone / trace.references)
    assert row.disk_hit_percent == row.written_percent == 0


@pytest.mark.parametrize(
    ("when", "cause"),
    [
        (When.DEMOTE, "demotion"),
        (When.WRITE_THROUGH, "commit"),
        (When.REUSE, "demotion"),
    ],
)
def test_what_ram_gives_up_is_served_from_disk(when: When, cause: str) -> None:
    trace = trace_of([(1,), (2,), (1,)])
    row = run(trace, "lru", 1, Writing(when))
    assert row.ram_hit_percent == 0
    assert row.disk_hit_percent == pytest.approx(100 / 3)
    assert row.written_by_cause == {
        each: pytest.approx(row.written_percent if each == cause else 0)
        for each in ("commit", "demotion", "second_touch")
    }


def test_a_second_touch_is_of_what_is_held_or_was() -> None:
    missed = run(trace_of([(1,), (2,), (1,), (3,)]), "lru", 1, Writing(When.SECOND_TOUCH))
    assert (missed.disk_hit_percent, missed.written_percent) == (0, 25)
    held = run(trace_of([(1,), (1,), (2,), (1,)]), "lru", 1, Writing(When.SECOND_TOUCH))
    assert (held.ram_hit_percent, held.disk_hit_percent, held.written_percent) == (25, 25, 25)


def test_in_a_prompt_what_ram_lacks_is_served_from_disk() -> None:
    trace = trace_of([(1, 1, 1), (2,), (1, 1, 1)])
    row = run(trace, "lru", 3, Writing(When.WRITE_THROUGH))
    part = 100 / trace.references
    assert row.ram_hit_percent == pytest.approx(2 * part), "the last chunk went for another"
    assert row.disk_hit_percent == pytest.approx(part)


def test_the_unfilled_end_of_a_prompt_is_no_chunk() -> None:
    trace = trace_of([(1, 2), (1, 2), (2,)], partly=[(1, 2), (2,)])
    row = run(trace, "lru", 4, Writing(When.WRITE_THROUGH))
    assert row.ram_hit_percent == row.written_percent == pytest.approx(20)


def test_what_no_tier_keeps_is_refused() -> None:
    often, once = [(0, 0)] * 20, [(1, n, n, n) for n in range(40)]
    prompts = [prompt for pair in zip(often * 2, once, strict=True) for prompt in pair]
    row = run(trace_of(prompts), "gix", 2, Writing(When.SECOND_TOUCH))
    assert row.refused_by_cause["not_worth"] > row.refused_by_cause["no_room"]
