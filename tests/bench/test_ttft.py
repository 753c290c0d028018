"""The parts of the TTFT benchmark that need no engine: what it checks, prints and refuses."""

import argparse
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.bench import ttft
from kvtier.bench.ttft import phases
from kvtier.bench.ttft.command import slug
from kvtier.bench.ttft.phases import Played, TtftFailed
from kvtier.bench.ttft.plot import plot
from kvtier.bench.ttft.report import TARGETS, TIERS, problems, summarise, table
from kvtier.bench.ttft.shapes import LLAMA_8B, PHASES, TINY, Prompt

GIB = 1 << 30
DUE = {length: length // TINY.chunk_tokens for length in TINY.lengths}


# ── what is reported ──────────────────────────────────────────────────────────────────────────────


def answer(folder: Path, phase: str, length: int, number: int) -> dict[str, Any]:
    logits = folder / f"{phase}-{length}-{number}.npy"
    np.save(logits, np.zeros(4, np.float32))
    loaded = phase in TIERS
    sources = dict.fromkeys(TIERS.values(), 0)
    if loaded:
        sources[TIERS[phase]] = DUE[length]
    made: dict[str, Any] = {
        "length": length,
        "number": number,
        "ttft_ms": 10.0 + number if loaded else 600.0 + number,
        "kvtier_ms": 2.0,
        "reused_tokens": length if loaded else 0,
        "answer": [length, number, 3],
        "logits": str(logits),
        "kv": "ab",
        "loaded_bytes": DUE[length] * TINY.layout.nbytes if loaded else 0,
        "stored_chunks": DUE[length] if phase == "cold" else 0,
        "sources": sources,
        "at_once": None,
    }
    if phase == "alone":
        made["at_once"] = deepcopy(made) | {"ttft_ms": 500.0 + number}
    return made


@pytest.fixture
def played(tmp_path: Path) -> Played:
    """A run in which all is well."""
    answers = {
        phase: [answer(tmp_path, phase, prompt.length, prompt.number) for prompt in TINY.prompts(3)]
        for phase in PHASES
    }
    return Played({"device": "a device", "versions": {}}, answers, 0)


def test_a_good_run_has_no_problems(played: Played) -> None:
    figures = summarise(played, TINY, 12.3).figures
    assert figures["problems"] == []
    assert figures["identical"] is True
    assert figures["max_logit_diff"] == 0
    longest = figures["lengths"][str(max(TINY.lengths))]
    assert longest["recompute"]["ttft_ms"] == 501  # the median of the faster way
    assert longest["recompute"]["every_one_pass_ms"] == [500, 501, 502]
    assert longest["recompute"]["every_two_passes_ms"] == [600, 601, 602]
    assert longest["ram"]["ttft_ms"] == 11
    assert figures["speedup_ram"] == pytest.approx(501 / 11)
    assert longest["disk"]["sources"] == {
        **dict.fromkeys(TIERS.values(), 0),
        "load_disk_hits": 3 * DUE[max(TINY.lengths)],
    }
    assert longest["vram"]["bytes"] == DUE[max(TINY.lengths)] * TINY.layout.nbytes


@pytest.mark.parametrize(
    ("phase", "change", "problem"),
    [
        ("ram", {"answer": [1, 2, 4]}, "ram, 128 tokens, prompt 1: answers otherwise"),
        ("disk", {"kv": "cd"}, "disk, 128 tokens, prompt 1: loaded other KV"),
        ("ram", {"reused_tokens": 0}, "ram, 128 tokens, prompt 1: reused 0 tokens"),
        ("vram", {"sources": {"load_ram_hits": 2}}, "vram, 128 tokens, prompt 1: reused 128"),
        ("cold", {"reused_tokens": 64}, "cold, 128 tokens, prompt 1: reused 64 tokens of nothing"),
        ("cold", {"stored_chunks": 1}, "cold, 128 tokens, prompt 1: reused 0 tokens of nothing"),
    ],
)
def test_each_problem_is_found(
    played: Played, phase: str, change: dict[str, Any], problem: str
) -> None:
    for name, value in change.items():
        before = played.answers[phase][0][name]
        played.answers[phase][0][name] = before | value if isinstance(value, dict) else value
    assert [line for line in problems(played, TINY) if line.startswith(problem)]
    assert f"PROBLEM: {problem}" in table(summarise(played, TINY, 0.0))


@pytest.mark.parametrize("change", [{"answer": [0]}, {"kv": "cd"}])
def test_what_differs_is_not_identical(played: Played, change: dict[str, Any]) -> None:
    played.answers["disk"][-1].update(change)
    report = summarise(played, TINY, 0.0)
    assert report.figures["identical"] is False
    (line,) = [
        each for each in table(report).splitlines() if "DIFFERENT" in each and "disk" in each
    ]
    assert line.split()[:5] == ["2,048", "+", "1", "from", "disk"]


def test_logit_differences_are_the_largest_of_all(played: Played) -> None:
    np.save(played.answers["vram"][1]["logits"], np.array([0, 0, -0.5, 0.25], np.float32))
    figures = summarise(played, TINY, 0.0).figures
    assert figures["max_logit_diff"] == 0.5
    assert figures["lengths"]["128"]["vram"]["max_logit_diff"] == 0.5
    assert figures["lengths"]["128"]["ram"]["max_logit_diff"] == 0


def test_noise_of_recomputing_is_told_and_is_no_problem(played: Played) -> None:
    """Another order of sums gives other bits: that says nothing about kvtier."""
    played.answers["alone"][0]["at_once"]["kv"] = "cd"
    played.answers["alone"][0]["answer"] = [9]
    report = summarise(played, TINY, 0.0)
    assert report.figures["problems"] == []
    assert report.figures["identical"] is True
    assert report.figures["noise"]["one_pass"]["kv_identical"] is False
    assert report.figures["noise"]["another_process"]["identical"] is False
    assert "recomputed in another process: KV identical to it, answers DIFFERENT" in table(report)


def test_targets_are_those_of_the_large_model(played: Played) -> None:
    assert summarise(played, TINY, 0.0).targets == {}
    report = summarise(played, TINY, 0.0)
    report.targets = {"speedup_ram": TARGETS["speedup_ram"]}
    assert "speedup_ram: 45.5, met: >= 25" in table(report)
    report.figures["speedup_ram"] = 24.9
    assert "speedup_ram: 24.9, MISSED: >= 25" in table(report)


def test_the_document_says_what_it_rests_on(played: Played) -> None:
    document = json.loads(summarise(played, TINY, 0.0).as_json())
    assert document["scenario"] == "ttft"
    assert document["setup"]["device"] == "a device"
    assert document["setup"]["repeats"] == 3
    assert document["date"]


def test_plot(played: Played, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(summarise(played, TINY, 0.0), tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")


# ── what is measured ──────────────────────────────────────────────────────────────────────────────


def test_the_large_shape_is_that_of_the_8b_model() -> None:
    layout = LLAMA_8B.layout
    assert (layout.layers, layout.heads, layout.head_dim, layout.dtype) == (32, 8, 128, "bfloat16")
    assert layout.nbytes == LLAMA_8B.chunk_tokens * (128 << 10)
    assert LLAMA_8B.room_tokens % LLAMA_8B.chunk_tokens == 0


def test_prompts_share_nothing() -> None:
    every = [TINY.token_ids(prompt) for prompt in TINY.prompts(3)]
    every += [TINY.token_ids(Prompt(length, 0), p) for p in PHASES for length in TINY.lengths]
    beginnings = {tuple(ids[: TINY.chunk_tokens]) for ids in every}
    assert len(beginnings) == len(every)
    assert all(len(ids) - 1 in TINY.lengths for ids in every)
    assert TINY.token_ids(Prompt(128, 1)) == TINY.token_ids(Prompt(128, 1))


def test_as_many_prompts_as_shared_memory_holds() -> None:
    assert phases.repeats_that_fit(LLAMA_8B, 64 * GIB) == LLAMA_8B.repeats
    one = phases.tier_bytes(LLAMA_8B, 1)
    assert phases.repeats_that_fit(LLAMA_8B, one) == 1
    with pytest.raises(TtftFailed, match="needed; give more"):
        phases.repeats_that_fit(LLAMA_8B, one - 1)


def test_options() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    ttft.add_arguments(parser)
    assert parser.parse_args([]).device == "cuda:0"
    assert parser.parse_args(["--device", "cpu"]).device == "host"
    with pytest.raises(argparse.ArgumentError, match="name a GPU"):
        parser.parse_args(["--device", "cuda"])


def test_the_name_of_a_device_in_that_of_a_file() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize("module", ["", ".command", ".phases", ".plot", ".report", ".shapes"])
def test_the_orchestrator_does_not_load_the_engine(module: str) -> None:
    code = f"import sys, kvtier.bench.ttft{module}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
