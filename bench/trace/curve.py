"""What a service's live curve would have said, next to replays at the capacities it speaks of."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvtier.bench.trace.replay import Keys, Progress, replay, wanted
from kvtier.bench.trace.requests import Trace
from kvtier.tiers.curve_family import sampled_family
from kvtier.tiers.curve_tenants import Curves, Reading


@dataclass(frozen=True, slots=True)
class Predicted:
    """One point of the curve of a service with room for `base_chunks`. The percentages are of the
    chunks that are looked up; `sampled_percent` of them were replayed for the prediction."""

    policy: str
    base_chunks: int
    capacity_chunks: int
    predicted_percent: float
    replayed_percent: float
    sampled_percent: float


def predict(
    trace: Trace, policy: str, base: int, progress: Callable[[str], Progress]
) -> list[Predicted]:
    """The curve of a service that has served a trace with room for so many chunks, and what a
    replay through the index finds at each of its capacities."""
    reading = _read(trace, policy, base, progress(f"curve of {base} chunks"))
    asked = sum(len(wanted(trace, request, policy)) for request in range(trace.requests))
    points = []
    for point in reading.points:
        capacity = point.capacity_bytes  # a chunk is taken to have one
        replayed = replay(trace, policy, capacity, progress(f"{policy}, {capacity} chunks"))
        points.append(
            Predicted(
                policy=policy,
                base_chunks=base,
                capacity_chunks=capacity,
                predicted_percent=point.hit_percent,
                replayed_percent=100 * int(replayed.hits.sum()) / max(asked, 1),
                sampled_percent=100 * reading.rate,
            )
        )
    return points


def _read(trace: Trace, policy: str, base: int, progress: Progress) -> Reading:
    curves = Curves({"cpu": base}, partial(sampled_family, policy), defer=lambda work: None)
    keys = Keys(trace.unique)
    for request, now_s in enumerate(trace.times_s.tolist()):
        curves.asked("", 1, keys.of(wanted(trace, request, policy)), now_s)
        curves.settle()
        progress(request + 1)
    [reading] = curves.read()
    return reading
