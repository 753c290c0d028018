"""Whether a curve keeps its word: predicted next to replayed in full."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvtier.chunks import ChunkKey
from kvtier.tiers.curve import Curve, Request
from kvtier.tiers.curve_popular import Popular
from kvtier.tiers.curve_replay import MakeFamily, Replay


@dataclass(frozen=True, slots=True)
class Agreement:
    """Hit percentages of the chunks asked for: sampled, and with every chunk replayed."""

    capacity_chunks: int
    predicted_percent: float
    replayed_percent: float
    rate: float  # of the sample


def compare(
    requests: Iterable[tuple[float, Sequence[ChunkKey]]],
    capacities: Sequence[int],
    make_family: MakeFamily,
    most_chunks: int,
) -> list[Agreement]:
    """Replay requests, each a time in seconds and the keys of its prompt, at capacities given in
    chunks; `most_chunks` bounds what a replay of the sample may hold."""
    capacities = sorted(set(capacities))
    curve, popular = Curve(capacities, make_family, most_chunks), Popular()
    replays = [Replay(capacity, make_family(1)) for capacity in capacities]
    hits, asked = [0] * len(replays), 0
    for now_s, keys in requests:
        asked += len(keys)
        popular.count(keys)
        for _ in curve.steps(Request(1, keys, now_s), popular.run(keys)):
            pass
        for place, replay in enumerate(replays):
            hits[place] += replay.ask(keys, [1] * len(keys), now_s)
            if replay.learner.due:
                replay.learner.learn()
    return [
        Agreement(point.capacity_bytes, point.hit_percent, 100 * hit / max(1, asked), curve.rate)
        for point, hit in zip(curve.points(), hits, strict=True)
    ]
