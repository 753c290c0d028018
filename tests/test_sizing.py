"""The curve as a person meets it."""

from pathlib import Path

import pytest

from kvtier.client import CurvePoint, HitCurve
from kvtier.sizing import FEWEST_SAMPLED, CannotDraw, plot, readable

GIB = 1 << 30


def curve(
    *, tenant: str | None = None, sampled: int = 5000, ram_gib: int = 32, seen_gib: int = 4096
) -> HitCurve:
    parts = {16: 20.0, 20: 25.0, 24: 30.0, 32: 40.0, 64: 50.0}
    points = [CurvePoint(ram_gib * GIB * part // 16, hits) for part, hits in parts.items()]
    return HitCurve(tenant, "cpu", ram_gib * GIB, tuple(points), 0.25, 700, sampled, seen_gib * GIB)


def test_the_table_has_todays_capacity_and_the_others() -> None:
    printed = readable([curve()])
    assert "all tenants, RAM (32.0 GiB today)" in printed
    rows = [line.split("  ") for line in printed.splitlines()[1:6]]
    assert "    +0   32.0 GiB   20.0 %  ████████" in [line[2:] for line in printed.splitlines()]
    for step in ("+25 %", "+50 %", "x2", "x4"):
        assert any(step in [cell.strip() for cell in row] for row in rows), step


def test_the_sentence_says_what_16_gib_more_would_do() -> None:
    printed = readable([curve()])
    assert "with +16.0 GiB of RAM the hit ratio would be 30.0 % (now 20.0 %)" in printed


def test_a_small_tier_is_not_extrapolated() -> None:
    printed = readable([curve(ram_gib=2)])
    assert "with +6.0 GiB of RAM the hit ratio would be 50.0 % (now 20.0 %)" in printed


def test_what_was_never_filled_is_not_promised() -> None:
    assert "only 40.0 GiB has come by so far" in readable([curve(seen_gib=40)])
    assert "come by" not in readable([curve()])


def test_too_few_requests_give_no_figures() -> None:
    printed = readable([curve(sampled=FEWEST_SAMPLED - 1)])
    assert "too few requests yet: 700 requests gave 999 sampled chunks" in printed
    assert "hit ratio" not in printed


def test_no_curve_is_said() -> None:
    assert "no curve yet" in readable([])


def test_a_tenant_is_named() -> None:
    assert "tenant 'red' alone, RAM" in readable([curve(tenant="red")])


@pytest.mark.parametrize(
    ("gib", "percent"), [(0, 0), (16, 10), (32, 20), (36, 22.5), (128, 50), (900, 50)]
)
def test_points_are_joined_by_straight_lines(gib: int, percent: float) -> None:
    assert curve().hit_percent_at(gib * GIB) == pytest.approx(percent)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curve{suffix}"
    plot([curve(), curve(tenant="red"), curve(sampled=0)], path)
    assert path.stat().st_size > 1000


def test_a_plot_of_nothing_is_drawn_too(tmp_path: Path) -> None:
    plot([], tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").exists()


@pytest.mark.parametrize("name", ["curve.txt", "curve", "missing/curve.png"])
def test_a_plot_that_cannot_be_made_says_why(tmp_path: Path, name: str) -> None:
    with pytest.raises(CannotDraw, match="--plot"):
        plot([curve()], tmp_path / name)
