"""What a run is worth: its figures, its problems, its tables and its picture."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtier.bench.vllm.ask import Answer
from kvtier.bench.vllm.control import Control
from kvtier.bench.vllm.measure import Phase, turn_name
from kvtier.bench.vllm.phases import Played, forget, settle
from kvtier.bench.vllm.plot import plot
from kvtier.bench.vllm.report import due_tokens, summarise
from kvtier.bench.vllm.tables import tables
from kvtier.bench.vllm.workload import EXACT_TOKENS, REPEATS, Conversation, Prompt, Workload

WORKLOAD = Workload(
    prompts=tuple(
        Prompt(f"prompt {number} of {length:,} tokens", (number,) * length)
        for length in EXACT_TOKENS
        for number in range(1, REPEATS + 1)
    ),
    conversations=(Conversation("conversation 1", ("one", "two")),),
)
VERSIONS = {"vllm": "1.2.3"}
DUE_CHUNKS = REPEATS * (4 + 16)  # of 256 tokens, in prompts of 1,024 and of 4,096 tokens


def prompts(ttft_ms: float, *, reused: bool) -> dict[str, Answer]:
    """Longer prompts take longer, and of each length the last one longest."""
    return {
        prompt.name: Answer(
            (len(prompt.token_ids), 2, 3),
            "words",
            ttft_ms * len(prompt.token_ids) / EXACT_TOKENS[0] + place,
            len(prompt.token_ids),
            due_tokens(len(prompt.token_ids)) if reused else 0,
        )
        for place, prompt in enumerate(WORKLOAD.prompts)
    }


def turns(ttft_ms: float, *, reused: bool) -> dict[str, Answer]:
    conversation = WORKLOAD.conversations[0]
    return {
        turn_name(conversation, turn): Answer(
            (turn, 8), "said", ttft_ms, 600 * turn, due_tokens(600 * turn) if reused else 0
        )
        for turn in (1, 2)
    }


def phase(ttft_ms: float, *, reused: bool = False, promoted: int = 0, **more: Any) -> Phase:
    return Phase(
        prompts(ttft_ms, reused=reused),
        turns(ttft_ms, reused=reused),
        service={"promoted_chunks": promoted, "loads": 0},
        **more,
    )


def good() -> Played:
    """A run in which all is well."""
    return Played(
        {
            "without": phase(1000, again=prompts(40, reused=True)),
            "cold": phase(1100),
            "ram": phase(50, reused=True),
            "disk": phase(100, reused=True, promoted=DUE_CHUNKS),
            "disk_cold": phase(150, reused=True, promoted=DUE_CHUNKS),
        },
        left_in_page_cache=0,
        plain_read_ms={"disk": 60.0, "disk_cold": 110.0},
    )


def summary(played: Played) -> dict[str, Any]:
    return summarise(played, WORKLOAD, VERSIONS, 12.3)


def test_a_good_run_has_no_problems() -> None:
    result = summary(good())
    assert result["problems"] == []
    assert result["identical"] is True
    assert result["identical_engine_hit"] is True
    assert json.loads(json.dumps(result)) == result


def test_figures_are_by_length_the_fastest_computed_and_else_the_median() -> None:
    result = summary(good())
    assert result["ttft_ms"] == {
        "recompute": {"1024": 1000, "4096": 4003},
        "engine_hit": {"1024": 41, "4096": 164},
        "cold": {"1024": 1100, "4096": 4403},
        "ram": {"1024": 51, "4096": 204},
        "disk": {"1024": 101, "4096": 404},
        "disk_cold": {"1024": 151, "4096": 604},
    }
    assert result["ratios"] == {
        "recompute_over_ram": {"1024": 19.61, "4096": 19.62},
        "disk_over_ram": {"1024": 1.98, "4096": 1.98},
        "disk_cold_over_ram": {"1024": 2.96, "4096": 2.96},
        "ram_over_engine_hit": {"1024": 1.24, "4096": 1.24},
    }
    assert result["reused_tokens"]["ram"] == {"1024": 1023, "4096": 4095}
    assert result["reused_tokens"]["cold"] == {"1024": 0, "4096": 0}


def test_each_turn_is_told() -> None:
    first, second = summary(good())["conversations"]
    assert (first["conversation"], first["turn"], first["prompt_tokens"]) == (
        "conversation 1",
        1,
        600,
    )
    computed, reloaded = ("without", "cold"), ("ram", "disk", "disk_cold")
    assert second["ttft_ms"] == dict(
        zip((*computed, *reloaded), (1000, 1100, 50, 100, 150), strict=True)
    )
    assert second["reused_tokens"] == dict.fromkeys(computed, 0) | dict.fromkeys(reloaded, 1024)


@pytest.mark.parametrize(
    ("tokens", "due"), [(255, 0), (256, 255), (257, 256), (960, 768), (1024, 1023), (4096, 4095)]
)
def test_the_last_token_is_always_computed(tokens: int, due: int) -> None:
    assert due_tokens(tokens) == due


def changed(name: str, kind: str, asked: str, **changes: Any) -> Played:
    """A good run but for one answer."""
    played = copy.deepcopy(good())
    answers = getattr(played.phases[name], kind)
    answers[asked] = replace(answers[asked], **changes)
    return played


@pytest.mark.parametrize(
    ("name", "kind", "asked", "change", "problem"),
    [
        (
            "ram",
            "turns",
            "conversation 1, turn 2",
            {"token_ids": (2, 9)},
            "ram, conversation 1, turn 2: answers otherwise from token 2 on",
        ),
        (
            "cold",
            "prompts",
            "prompt 1 of 1,024 tokens",
            {"token_ids": (1024, 2)},
            "cold, prompt 1 of 1,024 tokens: answers otherwise from token 3 on",
        ),
        (
            "disk",
            "prompts",
            "prompt 3 of 4,096 tokens",
            {"cached_tokens": 3584},
            "disk, prompt 3 of 4,096 tokens: reused 3584 tokens, not 4095",
        ),
        (
            "ram",
            "turns",
            "conversation 1, turn 1",
            {"cached_tokens": 0},
            "ram, conversation 1, turn 1: reused 0 tokens, not 512",
        ),
        (
            "cold",
            "prompts",
            "prompt 2 of 1,024 tokens",
            {"cached_tokens": 256},
            "cold, prompt 2 of 1,024 tokens: reused 256 tokens of nothing",
        ),
    ],
)
def test_each_wrong_answer_is_found(
    name: str, kind: str, asked: str, change: dict[str, Any], problem: str
) -> None:
    result = summary(changed(name, kind, asked, **change))
    assert result["problems"] == [problem]
    assert result["identical"] is ("otherwise" not in problem)
    assert f"PROBLEM: {problem}" in tables(result)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("ram", {"load_failures": 2}, "ram: vLLM says 2 times that a load failed"),
        ("ram", {"service": {"promoted_chunks": 3}}, "ram: 3 chunks came from disk"),
        ("disk", {"service": {"promoted_chunks": 59}}, "disk: 59 chunks came from disk, not 60"),
        (
            "disk_cold",
            {"service": {"promoted_chunks": 0}},
            "disk_cold: 0 chunks came from disk, not 60",
        ),
    ],
)
def test_what_came_from_elsewhere_is_found(name: str, change: dict[str, Any], problem: str) -> None:
    played = good()
    played.phases[name] = replace(played.phases[name], **change)
    assert summary(played)["problems"] == [problem]


def test_an_answer_that_vllm_alone_gives_otherwise_again_is_told() -> None:
    result = summary(changed("without", "again", "prompt 1 of 1,024 tokens", token_ids=()))
    assert result["identical_engine_hit"] is False
    assert result["problems"] == []


def test_more_reuse_than_due_is_no_problem() -> None:
    more = changed("ram", "turns", "conversation 1, turn 1", cached_tokens=599)
    assert summary(more)["problems"] == []


def test_tables_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = summary(good())
    lines = [" ".join(line.split()) for line in tables(result).splitlines()]
    assert "conversation 1, turn 2 1,200 tokens 1,000 1,100 50 100 150 0 1,024 1,024 1,024" in lines
    assert "4,096 tokens 4,003 4,403 164 204 404 604 19.62 1.98 2.96 1.24" in lines
    assert "of them reused 0 0 4,095 4,095 4,095 4,095" in lines
    assert lines[-2] == "answers: identical to vLLM without kvtier, token for token"
    assert lines[-1].endswith("takes 60 ms, cold 110")
    plot(result, tmp_path / "vllm.png")
    assert (tmp_path / "vllm.png").read_bytes().startswith(b"\x89PNG")


def test_a_busy_machine_is_noted_and_no_problem() -> None:
    played = good()
    assert "NOTE" not in tables(summary(played))
    played.phases["cold"] = replace(played.phases["cold"], others=0.63)
    result = summary(played)
    assert result["problems"] == []
    assert "63 % (cold), 0 % (ram)" in tables(result)


def test_the_document_names_nobody() -> None:
    text = json.dumps(summary(good()))
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


def test_settling_waits_until_the_counters_stand_still() -> None:
    counts = iter([1, 2, 2, 3])
    seen: list[int] = []

    def counters() -> dict[str, int]:
        seen.append(next(counts, 3))
        return {"committed_chunks": seen[-1]}

    settle(counters, quiet_s=0.3)
    assert seen[-2:] == [3, 3]


def test_forgotten_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    (tmp_path / "empty").write_bytes(b"")
    assert 0 <= forget(tmp_path) <= 1 << 20


def test_the_control_is_read_whole(tmp_path: Path) -> None:
    control = Control(tmp_path / "plain.bin", 3_000_000)
    assert (tmp_path / "plain.bin").stat().st_size == 3 << 20
    written = bytes(control._buffer)
    control._buffer[:] = bytes(len(written))
    assert control.read_ms() > 0
    assert bytes(control._buffer) == written
