"""The scenario: its options, and the replays that they ask for."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from kvtier.bench.report import Progress, Report
from kvtier.bench.trace.curve import Predicted, predict
from kvtier.bench.trace.figures import Bounds, Result, percent_of, result
from kvtier.bench.trace.hints import NONE, labels_of, parse_hints
from kvtier.bench.trace.optimum import Optimum
from kvtier.bench.trace.plot import plot
from kvtier.bench.trace.read import read_trace
from kvtier.bench.trace.replay import learns, replay
from kvtier.bench.trace.requests import Trace
from kvtier.bench.trace.tables import curve_table, heading, table, tier_table
from kvtier.bench.trace.two_tiers import TierResult, TwoTiers, two_tiers
from kvtier.errors import InvalidRequest
from kvtier.sections import Disk
from kvtier.service.demotion import When, Writing
from kvtier.tiers.policies.registry import FAMILIES

_CAPACITIES = ("1%", "2%", "5%", "10%", "20%")


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
        "--hints",
        default=NONE,
        metavar="KIND",
        help="what engines tell with each request, made of the trace's future: return, next_use, "
        "next_use~FACTOR, stop_reason or lie (default: none)",
    )
    parser.add_argument(
        "--curve",
        action="store_true",
        help="what the live curve of a service of each capacity says of larger ones, and what "
        "replays say",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=512, metavar="COUNT", help="to weigh prefill FLOPs"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="hit ratio by capacity, as PNG")


def run(options: argparse.Namespace) -> int:
    """Replay, and write the report to stdout. Raises InvalidRequest for a trace that is none, and
    for options that make no sense."""
    _check(options)
    telling = parse_hints(options.hints)
    writing = None if options.tiers is None else parse_mode(options.tiers)
    trace = read_trace(options.trace)
    capacities = [parse_capacity(text, trace.unique) for text in options.capacity]
    labels = labels_of(trace, telling)
    results: Sequence[Result] | Sequence[TierResult] | Sequence[Predicted]
    if options.curve:
        results = _curves(trace, options.policy, capacities)
        lines = curve_table(results)
    elif writing is not None:
        results = _two_tiers(trace, options.policy, capacities, writing, labels)
        lines = tier_table(results)
    else:
        results = _one_tier(trace, options.policy, capacities, labels, options.chunk_tokens)
        lines = table(results)
        if options.plot is not None:
            plot(trace.name, results, options.plot)
    setup = {
        "trace": trace.name,
        "requests": trace.requests,
        "references": trace.references,
        "unique": trace.unique,
        "chunk_tokens": options.chunk_tokens,
        "hints": options.hints,
    }
    if options.json:
        sys.stdout.write(
            Report("trace", {"results": [asdict(row) for row in results]}, setup).as_json()
        )
    else:
        sys.stdout.write("\n".join([heading(setup), *lines]) + "\n")
    return 0


def _check(options: argparse.Namespace) -> None:
    """What options must be, and what goes together."""
    if options.curve and options.tiers is not None:
        raise InvalidRequest("--curve: it is of one tier; leave --tiers out")
    if options.curve and options.hints != NONE:
        raise InvalidRequest("--curve: hints are not replayed for it; leave --hints out")
    if options.plot is not None and (options.curve or options.tiers is not None):
        raise InvalidRequest("--plot: it draws one tier; leave --tiers and --curve out")
    if options.hints != NONE and not learns(options.policy):
        raise InvalidRequest(
            f"--hints: {options.policy} learns nothing of them; take --policy gix or gix-lite"
        )
    if not 1 <= options.chunk_tokens <= 1 << 16:
        raise InvalidRequest(f"--chunk-tokens: {options.chunk_tokens} is not from 1 to 65536")


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


def parse_mode(text: str) -> Writing:
    """When chunks are written, and the chance that `reuse` asks for."""
    name, _, chance = text.partition(">=")
    names = [when.value for when in When]
    if name not in names or (chance and name != When.REUSE.value):
        raise InvalidRequest(f"--tiers: {text[:80]!r} is not one of {', '.join(names)}")
    try:
        least_reuse = float(chance) if chance else Disk().write_reuse_percent / 100
    except ValueError:
        least_reuse = -1.0
    if not 0 <= least_reuse <= 1:
        raise InvalidRequest(f"--tiers: {chance[:80]!r} is not a chance from 0 to 1")
    return Writing(When(name), least_reuse)


def _one_tier(
    trace: Trace,
    policy: str,
    capacities: Sequence[int],
    labels: Sequence[int],
    chunk_tokens: int,
) -> list[Result]:
    optimum = Optimum(trace)
    results = []
    for capacity in capacities:
        lru = replay(trace, "lru", capacity, _progress(f"lru, {capacity} chunks", trace))
        replayed = lru
        if policy != "lru":
            what = f"{policy}, {capacity} chunks"
            replayed = replay(trace, policy, capacity, _progress(what, trace), labels)
        most = 100 * optimum.hits(capacity) / trace.references
        bounds = Bounds(lru=percent_of(trace, lru.hits), optimum=most)
        results.append(result(trace, policy, capacity, replayed, bounds, chunk_tokens))
    return results


def _two_tiers(
    trace: Trace,
    policy: str,
    capacities: Sequence[int],
    writing: Writing,
    labels: Sequence[int],
) -> list[TierResult]:
    return [
        TwoTiers(trace, policy, two_tiers(capacity), writing, labels).run(
            _progress(f"{policy}, {writing.when.value}, {capacity} chunks", trace)
        )
        for capacity in capacities
    ]


def _curves(trace: Trace, policy: str, capacities: Sequence[int]) -> list[Predicted]:
    return [
        point
        for capacity in capacities
        for point in predict(trace, policy, capacity, lambda what: _progress(what, trace))
    ]


def _progress(what: str, trace: Trace) -> Callable[[int], None]:
    shown = Progress()
    return lambda done: shown(what, done, trace.requests)
