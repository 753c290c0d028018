"""`kvtier bench trace --curve`: what a service's curve says, next to replays through the index."""

import json
from pathlib import Path

import pytest

from kvtier.cli import main
from tests.bench.test_trace_hints import save, sessions


def curve(file: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, float]]:
    assert main(["bench", "trace", str(file), "--curve", "--json", *words]) == 0
    found: list[dict[str, float]] = json.loads(capsys.readouterr().out)["results"]
    return found


@pytest.mark.parametrize("policy", ["lru", "gix"])
def test_a_small_cache_is_predicted_just_as_it_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    file = save(tmp_path / "made.npz", sessions(600))
    points = curve(file, capsys, "--capacity", "16", "64", "--policy", policy)
    assert [(row["base_chunks"], row["capacity_chunks"]) for row in points] == [
        (base, base * part // 4) for base in (16, 64) for part in (4, 5, 6, 8, 16)
    ]
    for row in points:
        assert row["sampled_percent"] == 100
        assert row["predicted_percent"] == pytest.approx(row["replayed_percent"], abs=0.5)
    assert points[0]["replayed_percent"] < points[4]["replayed_percent"]


def test_a_curve_is_of_one_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "made.npz", sessions(10))
    assert main(["bench", "trace", str(file), "--curve", "--tiers", "demote"]) == 2
    assert "--curve: it is of one tier; leave --tiers out" in capsys.readouterr().err
