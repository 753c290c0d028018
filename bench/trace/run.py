"""The scenario: its options, and the replays that they ask for."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvtier.bench.report import Progress, Report
from kvtier.bench.trace.figures import Bounds, Result, percent_of, result
from kvtier.bench.trace.optimum import Optimum
from kvtier.bench.trace.plot import plot
from kvtier.bench.trace.read import read_trace
from kvtier.bench.trace.replay import replay
from kvtier.bench.trace.requests import Trace
from kvtier.bench.trace.two_tiers import Mode, TierResult, TwoTiers
from kvtier.errors import InvalidRequest
from kvtier.tiers.policies.registry import FAMILIES

_CAPACITIES = ("1%", "2%", "5%", "10%", "20%")
_LEAST_REUSE = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, metavar="FILE", help=".npz, or Mooncake's .jsonl")
    parser.add_argument("--policy", choices=list(FAMILIES), default="gix")
    parser.add_argument(
        "--capacity",
        nargs="+",
        default=_CAPACITIES,
        metavar="CHUNKS",
        help="how many chunks, or with %% what part of the trace's different ones",
    )
    parser.add_argument(
        "--tiers",
        metavar="MODE",
        help="RAM of that capacity and a disk of ten times that, written to by demote, "
        "write_through, second_touch or reuse (as reuse>=0.3)",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=512, metavar="COUNT", help="to weigh prefill FLOPs"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="hit ratio by capacity, as PNG")


def run(options: argparse.Namespace) -> int:
    """Replay, and write the report to stdout. Raises InvalidRequest for a trace that is none, and
    for options that make no sense."""
    if options.tiers is not None and options.plot is not None:
        raise InvalidRequest("--plot: it draws one tier; leave --tiers out")
    if not 1 <= options.chunk_tokens <= 1 << 16:
        raise InvalidRequest(f"--chunk-tokens: {options.chunk_tokens} is not from 1 to 65536")
    mode = None if options.tiers is None else parse_mode(options.tiers)
    trace = read_trace(options.trace)
    capacities = [parse_capacity(text, trace.unique) for text in options.capacity]
    if mode is None:
        results = _one_tier(trace, options.policy, capacities, options.chunk_tokens)
        lines = _table(results)
        if options.plot is not None:
            plot(trace.name, results, options.plot)
        rows = [asdict(row) for row in results]
    else:
        tiered = _two_tiers(trace, options.policy, capacities, mode)
        lines = _tier_table(tiered)
        rows = [asdict(row) for row in tiered]
    setup = {
        "trace": trace.name,
        "requests": trace.requests,
        "references": trace.references,
        "unique": trace.unique,
        "chunk_tokens": options.chunk_tokens,
    }
    if options.json:
        sys.stdout.write(Report("trace", {"results": rows}, setup).as_json())
    else:
        sys.stdout.write("\n".join([_heading(setup), *lines]) + "\n")
    return 0


def parse_capacity(text: str, unique: int) -> int:
    """Chunks, from a number of them or a percentage of the different ones."""
    found = re.fullmatch(r"(\d{1,12}|\d{0,12}\.\d{1,6})(%?)", text)
    if found is None:
        raise InvalidRequest(f"--capacity: {text[:80]!r} is neither chunks nor a percentage")
    number, is_share = float(found[1]), bool(found[2])
    chunks = int(number * unique / 100) if is_share else int(number)
    if chunks < 1 or (not is_share and chunks != number):
        raise InvalidRequest(f"--capacity: {text[:80]!r} is {number:g}, not whole chunks above 0")
    return chunks


def parse_mode(text: str) -> tuple[Mode, float]:
    """A mode, and the chance that it asks for."""
    name, _, chance = text.partition(">=")
    names = [mode.value for mode in Mode]
    if name not in names or (chance and name != Mode.REUSE.value):
        raise InvalidRequest(f"--tiers: {text[:80]!r} is not one of {', '.join(names)}")
    try:
        least_reuse = float(chance) if chance else _LEAST_REUSE
    except ValueError:
        least_reuse = -1.0
    if not 0 <= least_reuse <= 1:
        raise InvalidRequest(f"--tiers: {chance[:80]!r} is not a chance from 0 to 1")
    return Mode(name), least_reuse


def _one_tier(
    trace: Trace, policy: str, capacities: Sequence[int], chunk_tokens: int
) -> list[Result]:
    optimum = Optimum(trace)
    results = []
    for capacity in capacities:
        lru = replay(trace, "lru", capacity, _progress(f"lru, {capacity} chunks", trace))
        replayed = lru
        if policy != "lru":
            what = f"{policy}, {capacity} chunks"
            replayed = replay(trace, policy, capacity, _progress(what, trace))
        most = 100 * optimum.hits(capacity) / trace.references
        bounds = Bounds(lru=percent_of(trace, lru.hits), optimum=most)
        results.append(result(trace, policy, capacity, replayed, bounds, chunk_tokens))
    return results


def _two_tiers(
    trace: Trace, policy: str, capacities: Sequence[int], mode: tuple[Mode, float]
) -> list[TierResult]:
    when, least_reuse = mode
    return [
        TwoTiers(trace, policy, capacity, when, least_reuse).run(
            _progress(f"{policy}, {when.value}, {capacity} chunks", trace)
        )
        for capacity in capacities
    ]


def _progress(what: str, trace: Trace) -> Callable[[int], None]:
    shown = Progress()
    return lambda done: shown(what, done, trace.requests)


# ── for people ────────────────────────────────────────────────────────────────────────────────────


def _heading(setup: dict[str, Any]) -> str:
    return (
        f"{setup['trace']}: {setup['requests']} requests for {setup['references']} chunks, "
        f"{setup['unique']} of them different"
    )


def _table(results: Sequence[Result]) -> list[str]:
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


def _tier_table(results: Sequence[TierResult]) -> list[str]:
    lines = [
        f"{'policy':9}{'mode':>14}{'RAM':>9}{'disk':>9}{'RAM hit %':>11}{'disk hit %':>12}"
        f"{'written %':>11}"
    ]
    lines += [
        f"{row.policy:9}{row.mode:>14}{row.ram_chunks:9}{row.disk_chunks:9}"
        f"{row.ram_hit_percent:11.2f}{row.disk_hit_percent:12.2f}{row.written_percent:11.2f}"
        for row in results
    ]
    return lines
