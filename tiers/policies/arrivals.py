"""Chunks on their way to a tier, and which turn it is when they are asked for."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from kvtier.chunks import ChunkKey
from kvtier.tiers.policies.segments import Segment
from kvtier.tiers.policies.shades import Shade
from kvtier.tiers.policies.traits import Traits


class Arrival:
    """Chunks on their way. Runs of them are of the same traits: first those that are ghosts, up to
    the place `known`, then the others. `deepest` is the last of their path that the tier has,
    `segment` where it was put; `refused` is the first place that was not let in, `shade` the ghosts
    from there on."""

    __slots__ = (
        "_best", "_ends", "_traits", "deepest", "keys", "known", "refused", "segment", "shade",
    )  # fmt: skip

    def __init__(
        self, above: Any, keys: Sequence[ChunkKey], returning: list[tuple[Traits, int]],
        fresh: Traits | None,
    ) -> None:  # fmt: skip
        """`returning`: the traits of ghosts, each with the place where they end. `fresh`: those of
        all after them, None when there are none."""
        self._traits = [traits for traits, _ in returning]
        self._ends = [end for _, end in returning]
        self.known = self._ends[-1] if self._ends else 0
        if fresh is not None:
            self._traits.append(fresh)
            self._ends.append(len(keys))
        self._best: list[Traits] | None = None
        self.deepest = above
        self.keys = keys
        self.refused = len(keys)
        self.segment: Segment[Traits] | None = None
        self.shade: Shade | None = None

    @property
    def kinds(self) -> frozenset[int]:
        return frozenset(traits.kind for traits in self._traits)

    def traits_at(self, place: int) -> Traits:
        return self._traits[bisect_right(self._ends, place)]

    def best_from(self, place: int, worth: Callable[[Traits], float]) -> Traits:
        """The traits of the greatest worth of a chunk and all after it. What they are worth is
        asked once."""
        if self._best is None:
            best = accumulate(reversed(self._traits), lambda *two: max(two, key=worth))
            self._best = list(best)[::-1]
        return self._best[bisect_right(self._ends, place)]


def turn_asked(
    covered: list[tuple[Segment[Traits], int]], length: int, returning: list[tuple[Shade, int]]
) -> int:
    """The turn of a request: one more than of the request that ended where this one goes on."""
    if returning:
        shade, ghosts = returning[-1]
        return shade.ends + 1 if shade.ends and ghosts == shade.count else 1
    if covered:
        segment = covered[-1][0]
        start = covered[-2][1] if len(covered) > 1 else 0
        return segment.ends + 1 if segment.ends and length - start == segment.count else 1
    return 0


def turn_below(above: Any) -> int:
    """The turn of what continues a chunk: that of the request that asked for the chunk last, if it
    asked for no more."""
    segment: Segment[Traits] | None = above.mark
    if segment is None or segment.tail is not above:
        return 1
    return segment.traits.turn
