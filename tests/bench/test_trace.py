"""Replays of traces: against simulations that are too plain to be wrong."""

import json
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.bench.trace.figures import flops_saved_percent, percent_of
from kvtier.bench.trace.optimum import Optimum
from kvtier.bench.trace.replay import bytes_of, replay
from kvtier.bench.trace.requests import Trace
from kvtier.bench.trace.run import parse_capacity, parse_mode
from kvtier.cli import main
from kvtier.errors import InvalidRequest
from kvtier.service.demotion import When, Writing
from kvtier.tiers.policies.registry import FAMILIES
from tests.bench.traces import PROMPTS, TRACES, Prompt, trace_of

CAPACITIES = st.integers(1, 12)


def ignore(done: int) -> None:
    """Nobody looks at the progress."""


# ── MIN ───────────────────────────────────────────────────────────────────────────────────────────


def best_of_all(trace: Trace, capacity: int) -> int:
    """The most hits of any choice of what to keep, by trying all."""

    @cache
    def best(request: int, held: frozenset[int]) -> int:
        if request == trace.requests:
            return 0
        needs = trace.needs(request)
        hits = 0
        while hits < len(needs) and needs[hits] in held:
            hits += 1
        known = held | set(needs)
        most = max(
            best(request + 1, frozenset(kept))
            for size in range(min(capacity, len(known)) + 1)
            for kept in combinations(sorted(known), size)
        )
        return hits + most

    return best(0, frozenset())


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5
    ),
    st.integers(1, 4),
)
def test_the_optimum_is_the_best_that_can_be_done(prompts: list[Prompt], capacity: int) -> None:
    trace = trace_of(prompts)
    assert Optimum(trace).hits(capacity) == best_of_all(trace, capacity)


@given(TRACES)
def test_with_room_for_all_the_optimum_misses_each_chunk_once(prompts: list[Prompt]) -> None:
    trace = trace_of(prompts)
    assert Optimum(trace).hits(trace.unique) == trace.references - trace.unique


# ── one tier ──────────────────────────────────────────────────────────────────────────────────────


def plain_lru(trace: Trace, capacity: int) -> list[int]:
    """Hits by request of LRU with the last chunk of a request first, chunk by chunk."""
    order: dict[int, None] = {}
    hits = []
    for request in range(trace.requests):
        needs = trace.needs(request)
        found = 0
        while found < len(needs) and needs[found] in order:
            found += 1
        hits.append(found)
        for chunk in reversed(needs):
            order.pop(chunk, None)
            order[chunk] = None
        for oldest in list(order)[: max(len(order) - capacity, 0)]:
            del order[oldest]
    return hits


@given(TRACES, CAPACITIES)
def test_lru_through_the_index_is_lru(prompts: list[Prompt], capacity: int) -> None:
    trace = trace_of(prompts)
    assert replay(trace, "lru", capacity, ignore).hits.tolist() == plain_lru(trace, capacity)


@pytest.mark.parametrize("policy", FAMILIES)
@given(prompts=TRACES, capacity=CAPACITIES)
@settings(max_examples=25)
def test_no_policy_beats_the_optimum(policy: str, prompts: list[Prompt], capacity: int) -> None:
    trace = trace_of(prompts)
    hits = replay(trace, policy, capacity, ignore).hits
    assert 0 <= hits.sum() <= Optimum(trace).hits(capacity)
    assert (hits <= trace.lengths).all()


@pytest.mark.parametrize("policy", FAMILIES)
def test_with_room_for_all_every_policy_hits_what_can_be_hit(policy: str) -> None:
    trace = trace_of([(1, 2), (1, 2, 0), (2,), (1, 2, 0), (2, 1)])
    assert replay(trace, policy, trace.unique, ignore).hits.tolist() == [0, 2, 0, 3, 1]


def test_gix_does_not_store_the_unfilled_end_of_a_prompt() -> None:
    trace = trace_of([(1, 2), (1, 2)], partly=[(1, 2)])
    assert replay(trace, "gix", 2, ignore).hits.tolist() == [0, 1]
    assert replay(trace, "lru", 2, ignore).hits.tolist() == [0, 2]


def test_the_index_is_weighed() -> None:
    trace = trace_of([tuple(range(500))])
    weighed = replay(trace, "gix", 500, ignore).index_bytes_per_chunk
    assert 150 < weighed < 1000
    part = [bytes(1000)]
    assert bytes_of([part, part], but=None) - bytes_of([part], but=None) == 8
    assert bytes_of([part], but=part) < 1000


# ── figures ───────────────────────────────────────────────────────────────────────────────────────


def test_all_served_is_all_saved_and_the_end_of_a_prompt_saves_more_than_its_start() -> None:
    trace = trace_of([(1, 2, 0, 1)])
    assert flops_saved_percent(trace, np.array([4]), 512) == pytest.approx(100)
    half = flops_saved_percent(trace, np.array([2]), 512)
    assert percent_of(trace, np.array([2])) == 50
    assert 45 < half < 50, "later tokens attend to more"
    assert flops_saved_percent(trace, np.array([2]), 8192) < half


@pytest.mark.parametrize(
    ("text", "chunks"), [("1", 1), ("10%", 20), ("0.5%", 1), ("2.5%", 5), ("1000", 1000)]
)
def test_a_capacity_is_chunks_or_a_part(text: str, chunks: int) -> None:
    assert parse_capacity(text, 200) == chunks


@pytest.mark.parametrize("text", ["0", "-1", "0%", "0.1%", "1.5", "ten", "5 %", "", "1e3", "nan%"])
def test_other_capacities_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--capacity"):
        parse_capacity(text, 200)


def test_modes() -> None:
    assert parse_mode("demote").when is When.DEMOTE
    assert parse_mode("reuse") == Writing(When.REUSE, 0.2), "as the service has it"
    assert parse_mode("reuse>=0.75") == Writing(When.REUSE, 0.75)
    for text in ("", "demote>=0.5", "reuse>=2", "reuse>=x", "reuse>=nan", "often"):
        with pytest.raises(InvalidRequest, match="--tiers"):
            parse_mode(text)


# ── the command ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def file(tmp_path: Path) -> Path:
    prompts = [(1, 2), (1, 2, 0), (2, 2), (1, 2, 0), (2, 1)]
    lines = []
    for number, prompt in enumerate(prompts):
        ids = [hash(prompt[: end + 1]) for end in range(len(prompt))]
        line = {"timestamp": 1000 * number, "input_length": 512 * len(ids), "hash_ids": ids}
        lines.append(json.dumps(line))
    path = tmp_path / "made.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_the_report_has_a_row_for_each_capacity(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "trace", str(file), "--capacity", "2", "100%", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    small, large = report["results"]
    assert small["capacity_chunks"] == 2
    assert large["hit_percent"] == large["min_percent"] == large["lru_percent"]
    assert large["gap_closed_percent"] is None
    assert {
        "policy", "capacity_chunks", "hit_percent", "min_percent", "lru_percent",
        "flops_saved_percent", "gap_closed_percent", "us_per_request", "index_bytes_per_chunk",
    } <= small.keys()  # fmt: skip


def test_a_table_and_a_picture(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "hits.png"
    words = ["bench", "trace", str(file), "--policy", "lru", "--plot", str(picture)]
    assert main([*words, "--capacity", "30%", "60%"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("made: 5 requests for 12 chunks")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*words[:-1], str(tmp_path / "no" / "such"), "--capacity", "2"]) == 2


def test_two_tiers_have_a_report_of_their_own(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "trace", str(file), "--tiers", "demote", "--capacity", "1"]
    assert main([*words, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["results"]
    assert row["disk_chunks"] == 10
    assert row["disk_hit_percent"] > 0
    assert {
        "policy", "mode", "ram_chunks", "ram_hit_percent", "written_percent", "written_by_cause",
        "refused_by_cause",
    } <= row.keys()  # fmt: skip
    assert main(words) == 0
    assert "demote" in capsys.readouterr().out


@given(PROMPTS)
def test_a_request_needs_its_chunks(prompt: Prompt) -> None:
    assert trace_of([prompt]).needs(0) == list(range(len(prompt)))
