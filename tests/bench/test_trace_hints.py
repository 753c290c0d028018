"""Hints made of a trace's future, and what comes of them in a replay."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.bench.trace.hints import labels_of, next_uses_s, parse_hints
from kvtier.bench.trace.optimum import Optimum
from kvtier.bench.trace.read import read_trace
from kvtier.bench.trace.replay import replay
from kvtier.bench.trace.requests import Trace
from kvtier.chunks import ChunkKey
from kvtier.cli import main
from kvtier.errors import InvalidRequest
from kvtier.service.hints import Label, StopReason
from kvtier.tiers.policies.lru import Arrival, Lru
from kvtier.tiers.policies.registry import FAMILIES, Family, NothingToLearn
from kvtier.tiers.tree import Replica
from tests.bench.traces import PROMPTS, TRACES, Prompt, trace_of

KINDS = ["return", "next_use", "next_use~4.5", "lie"]


def ignore(done: int) -> None:
    """Nobody looks at the progress."""


def hits(trace: Trace, kind: str, capacity: int) -> int:
    labels = labels_of(trace, parse_hints(kind))
    return int(replay(trace, "gix", capacity, ignore, labels).hits.sum())


def sessions(count: int) -> Trace:
    """One-chunk prompts, one a second, of which every fourth comes back 40 to 60 seconds later: so
    much is known, and not which."""
    lots = np.random.default_rng(7)
    arrivals = [(float(at), at) for at in range(count)]
    arrivals += [(at + lots.uniform(40, 60), at) for at in range(0, count, 4)]
    arrivals.sort()
    return Trace(
        "sessions",
        np.array([at_s for at_s, _ in arrivals]),
        np.arange(len(arrivals) + 1),
        np.array([chunk for _, chunk in arrivals]),
        np.zeros(count, np.bool_),
    )


# ── what is told ──────────────────────────────────────────────────────────────────────────────────


@given(TRACES, st.sets(PROMPTS, max_size=3))
def test_the_next_use_is_the_next_request_for_the_last_whole_chunk(
    prompts: list[Prompt], unfilled: set[Prompt]
) -> None:
    # What is continued is filled.
    partly = [end for end in unfilled if not any(p[: len(end)] == end != p for p in prompts)]
    trace = trace_of(prompts, partly)
    for request, next_use_s in enumerate(next_uses_s(trace).tolist()):
        whole = [c for c in trace.needs(request) if not trace.partly[c]]
        if not whole:
            assert math.isnan(next_use_s)
            continue
        later = [r for r in range(request + 1, trace.requests) if whole[-1] in trace.needs(r)]
        at_s = trace.times_s[later[0]] if later else math.inf
        assert next_use_s == at_s - trace.times_s[request]


def test_exact_hints_are_told_as_the_protocol_has_them() -> None:
    trace = trace_of([(1,), (1, 2), (2,), (0,)], partly=[(0,)])
    first, second, third, unfilled = parse_hints("next_use")(trace)
    assert (first.next_use_s, first.session_end) == (1, False)
    assert second.session_end
    assert third.session_end
    assert (unfilled.next_use_s, unfilled.session_end) == (0, False), "there is nothing to say"
    at_once = replace(trace, times_s=np.zeros(4))
    assert parse_hints("next_use")(at_once)[0].next_use_s > 0, "0 would be nothing told"


def test_whether_it_returns_is_wrong_one_time_in_ten() -> None:
    trace = sessions(8000)
    told = [hint.session_end for hint in parse_hints("return")(trace)]
    wrong = np.mean(np.array(told) != np.isinf(next_uses_s(trace)))
    assert 0.09 < wrong < 0.11


def test_the_error_of_a_next_use_is_the_factor_at_one_standard_deviation() -> None:
    trace = sessions(8000)
    exact_s = next_uses_s(trace)
    told = parse_hints("next_use~4.5")(trace)
    back = np.flatnonzero(np.isfinite(exact_s))
    errors = np.log([told[request].next_use_s / exact_s[request] for request in back])
    assert abs(errors.mean()) < 0.1
    assert math.exp(errors.std()) == pytest.approx(4.5, rel=0.05)
    assert all(told[request].session_end for request in np.flatnonzero(np.isinf(exact_s)))
    assert parse_hints("next_use~1")(trace) == parse_hints("next_use")(trace)


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_the_same_is_told_in_each_run(kind: str) -> None:
    trace = sessions(100)
    labels = labels_of(trace, parse_hints(kind))
    assert labels == labels_of(trace, parse_hints(kind))
    assert (set(labels) == {Label.NONE}) == (kind == "none")


def test_lies_know_nothing_of_the_trace() -> None:
    trace = sessions(400)
    other = trace_of([(0,)] * trace.requests)
    assert parse_hints("lie")(trace) == parse_hints("lie")(other)


def test_stop_reasons_are_the_trace_s_own() -> None:
    trace = replace(trace_of([(1,), (2,), (0,)]), stops=np.array([0, 1, 2]))
    telling = parse_hints("stop_reason")
    told = [hint.stop_reason for hint in telling(trace)]
    assert told == [0, StopReason.TOOL_USE.value, StopReason.END_OF_TURN.value]
    assert labels_of(trace, telling) == [Label.NONE, Label.TOOL_USE, Label.END_OF_TURN]
    for stops in (None, np.zeros(3, np.int64)):
        with pytest.raises(InvalidRequest, match=r"made does not say why turns end; take an \.npz"):
            labels_of(replace(trace, stops=stops), telling)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("soon", "'soon' is not one of none, return, next_use, stop_reason, lie and next_use~"),
        ("", "'' is not one of"),
        ("return~2", "'return~2' is not one of"),
        ("x" * 500, "'x{80}' is not one of"),
        ("next_use~", "next_use~: a factor is from 1 to 1000, as in next_use~4.5"),
        ("next_use~0.5", "next_use~0.5: a factor is from 1"),
        ("next_use~1001", "next_use~1001: a factor is from 1"),
        ("next_use~nan", "next_use~nan: a factor is from 1"),
        ("next_use~often", "next_use~often: a factor is from 1"),
    ],
)
def test_other_hints_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"--hints: {message}"):
        parse_hints(text)


# ── what comes of it ──────────────────────────────────────────────────────────────────────────────


class Recorder(Lru[Replica]):
    """An LRU that remembers what it was told, in the order in which it was."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int, int]] = []  # by which call, of how many chunks, label

    def asked(self, path: Sequence[Replica], beyond: Sequence[ChunkKey], now_s: float) -> None:
        self.told.append(("asked", len(path), 0))
        super().asked(path, beyond, now_s)

    def hinted(self, path: Sequence[Replica], label: int, now_s: float) -> None:
        self.told.append(("hinted", len(path), label))

    def arrival(
        self, above: Replica | None, keys: Sequence[ChunkKey], now_s: float, label: int = 0
    ) -> Arrival:
        self.told.append(("arrival", len(keys), label))
        return super().arrival(above, keys, now_s, label)


@given(prompts=TRACES, data=st.data())
def test_labels_reach_the_policy_for_what_is_held_and_what_comes(
    prompts: list[Prompt], data: st.DataObject
) -> None:
    trace = trace_of(prompts)
    each = st.lists(st.integers(0, 7), min_size=trace.requests, max_size=trace.requests)
    labels = data.draw(each)
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "lru", lambda: Family(lambda: recorder, NothingToLearn()))
        held = replay(trace, "lru", 3, ignore, labels).hits.tolist()
    expected = []
    for length, hit, label in zip(trace.lengths.tolist(), held, labels, strict=True):
        expected.append(("asked", hit, 0))
        if hit and label:
            expected.append(("hinted", hit, label))
        if hit < length:
            expected.append(("arrival", length - hit, label))
    assert recorder.told == expected


def test_what_is_told_right_is_worth_much_and_lies_cost_little() -> None:
    trace = sessions(3000)
    untold, most = hits(trace, "none", 40), Optimum(trace).hits(40)
    assert hits(trace, "next_use", 40) > 0.95 * most
    assert hits(trace, "return", 40) > 1.1 * untold
    assert hits(trace, "lie", 40) > 0.7 * untold


# ── the command, and files ────────────────────────────────────────────────────────────────────────


def save(path: Path, trace: Trace, **more: np.ndarray[tuple[int], np.dtype[np.int8]]) -> Path:
    np.savez(
        path,
        t=trace.times_s,
        off=trace.starts,
        blk=trace.chunks,
        parent=trace.first_parents(),
        partial=trace.partly.astype(np.uint8),
        **more,  # type: ignore[arg-type]
    )
    return path


def test_stop_reasons_of_a_file(tmp_path: Path) -> None:
    trace = trace_of([(1,), (2,), (1,)])
    file = save(tmp_path / "made.npz", trace)
    assert read_trace(file).stops is None
    file = save(tmp_path / "made.npz", trace, hint=np.array([2, 0, 1], np.int8))
    stops = read_trace(file).stops
    assert stops is not None
    assert stops.tolist() == [2, 0, 1]
    for wrong, message in [
        ([1, 2], "hint: 2 numbers for 3 requests"),
        ([0, 3, 0], "request 1: hint: 3 is not 0, 1 or 2"),
        ([0, 0, -1], "request 2: hint: -1 is not 0, 1 or 2"),
    ]:
        file = save(tmp_path / "made.npz", trace, hint=np.array(wrong, np.int8))
        with pytest.raises(InvalidRequest, match=message):
            read_trace(file)


def test_the_report_says_what_was_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = sessions(600)
    file = save(tmp_path / "made.npz", trace)
    served = {}
    for kind in ("none", "next_use"):
        words = ["bench", "trace", str(file), "--capacity", "16", "--hints", kind, "--json"]
        assert main(words) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["setup"]["hints"] == kind
        served[kind] = report["results"][0]["hit_percent"]
    assert served["next_use"] > served["none"]
    assert served["none"] == pytest.approx(100 * hits(trace, "none", 16) / trace.references)


def test_hints_reach_the_service_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "made.npz", sessions(600))
    served = {}
    for kind in ("none", "next_use"):
        words = ["bench", "trace", str(file), "--capacity", "16", "--hints", kind, "--json"]
        assert main([*words, "--tiers", "demote"]) == 0
        row = json.loads(capsys.readouterr().out)["results"][0]
        served[kind] = row["ram_hit_percent"]
    assert served["next_use"] > served["none"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hints", "soon"], "--hints: 'soon' is not one of"),
        (["--hints", "stop_reason"], "does not say why turns end; take"),
        (["--hints", "return", "--curve"], "--curve: hints are not replayed for it; leave --hints"),
        (["--hints", "return", "--policy", "lru"], "lru learns nothing of them; take --policy gix"),
    ],
)
def test_hints_that_cannot_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    file = save(tmp_path / "made.npz", trace_of([(1,), (2,), (1,)]))
    assert main(["bench", "trace", str(file), "--capacity", "1", *words]) == 2
    assert message in capsys.readouterr().err
