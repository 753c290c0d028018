"""The results as lines for people."""

from collections.abc import Sequence
from typing import Any

from kvtier.bench.trace.curve import Predicted
from kvtier.bench.trace.figures import Result
from kvtier.bench.trace.two_tiers import TierResult


def heading(setup: dict[str, Any]) -> str:
    """What was replayed."""
    return (
        f"{setup['trace']}: {setup['requests']} requests for {setup['references']} chunks, "
        f"{setup['unique']} of them different"
    )


def table(results: Sequence[Result]) -> list[str]:
    """One tier."""
    lines = [
        f"{'policy':9}{'chunks':>9}{'part':>8}{'hit %':>8}{'LRU':>7}{'MIN':>7}{'gap closed':>12}"
        f"{'FLOPs saved':>13}{'us/request':>12}{'index B/chunk':>15}"
    ]
    for row in results:
        gap = "-" if row.gap_closed_percent is None else f"{row.gap_closed_percent:.1f} %"
        lines.append(
            f"{row.policy:9}{row.capacity_chunks:9}{row.capacity_percent:6.1f} %"
            f"{row.hit_percent:8.2f}{row.lru_percent:7.2f}{row.min_percent:7.2f}{gap:>12}"
            f"{row.flops_saved_percent:11.1f} %{row.us_per_request:12.0f}"
            f"{row.index_bytes_per_chunk:15.0f}"
        )
    return lines


def tier_table(results: Sequence[TierResult]) -> list[str]:
    """RAM and disk."""
    lines = [
        f"{'policy':9}{'mode':>14}{'RAM':>9}{'disk':>9}{'RAM hit %':>11}{'disk hit %':>12}"
        f"{'written %':>11}{'refused %':>11}"
    ]
    lines += [
        f"{row.policy:9}{row.mode:>14}{row.ram_chunks:9}{row.disk_chunks:9}"
        f"{row.ram_hit_percent:11.2f}{row.disk_hit_percent:12.2f}{row.written_percent:11.2f}"
        f"{sum(row.refused_by_cause.values()):11.2f}"
        for row in results
    ]
    return lines


def curve_table(results: Sequence[Predicted]) -> list[str]:
    """Live curves, and what they should have said."""
    lines = [
        f"{'policy':9}{'today':>9}{'chunks':>9}{'predicted %':>13}{'replayed %':>12}"
        f"{'difference':>12}{'sampled %':>11}"
    ]
    lines += [
        f"{row.policy:9}{row.base_chunks:9}{row.capacity_chunks:9}{row.predicted_percent:13.2f}"
        f"{row.replayed_percent:12.2f}{row.predicted_percent - row.replayed_percent:+12.2f}"
        f"{row.sampled_percent:11.2f}"
        for row in results
    ]
    return lines
