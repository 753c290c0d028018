"""What GIX takes chunks to be, and how turns of a conversation are counted.

A *turn* is counted along a conversation: 0 is a prompt of which nothing was known, 1 one that
branches off what is known, and each request that continues the end of an earlier one is the next.
"""

from collections.abc import Sequence
from typing import Any

from kvtier.chunks import ChunkKey
from kvtier.tiers.policies.cohorts import Cohort
from kvtier.tiers.policies.segments import Segment
from kvtier.tiers.policies.shades import Shade


class Traits:
    """What chunks are taken to be: one object for all of a request's chunks of one class."""

    __slots__ = ("cohort", "kind", "since_s", "touches", "turn")

    def __init__(self, kind: int, since_s: float, turn: int, touches: int, cohort: Cohort) -> None:
        self.kind = kind
        self.since_s = since_s
        self.turn = turn
        self.touches = touches
        self.cohort = cohort

    def count(self, change: int) -> None:
        """So many chunks more, or less, are waiting to be asked for again."""
        if self.cohort.into is not None:
            self.cohort = self.cohort.current()
        self.cohort.count += change


class Arrival:
    """Chunks on their way. `returning` are the traits of those that are ghosts, each with the place
    where they end, `known` the last of these places; `traits` are those of the others. `deepest` is
    the last of their path that the tier has, `segment` where it was put; `refused` is the first
    place that was not let in, `shade` the ghosts from there on."""

    __slots__ = (
        "deepest", "keys", "known", "refused", "returning", "segment", "shade", "traits",
    )  # fmt: skip

    def __init__(
        self, above: Any, keys: Sequence[ChunkKey], returning: list[tuple[Traits, int]],
        traits: Traits | None,
    ) -> None:  # fmt: skip
        self.deepest = above
        self.keys = keys
        self.known = returning[-1][1] if returning else 0
        self.refused = len(keys)
        self.returning = returning
        self.segment: Segment[Traits] | None = None
        self.shade: Shade[Traits] | None = None
        self.traits = traits

    def traits_at(self, place: int) -> Traits:
        for traits, end in self.returning:
            if place < end:
                return traits
        assert self.traits is not None, "an arrival has only the places of its keys"
        return self.traits

    def traits_from(self, place: int) -> list[Traits]:
        """Of a chunk and of all after it."""
        coming = [traits for traits, end in self.returning if place < end]
        return coming if self.traits is None else [*coming, self.traits]


def ending(traits: Traits) -> int:
    """What a run says of its end, when a request of that turn ends there."""
    return max(traits.turn, 1)


def turn_asked(
    covered: list[tuple[Segment[Traits], int]], length: int,
    returning: list[tuple[Shade[Traits], int]],
) -> int:  # fmt: skip
    """The turn of a request: one more than of the request that ended where this one goes on."""
    if returning:
        shade, ghosts = returning[-1]
        return shade.ends + 1 if shade.ends and ghosts == len(shade.prints) else 1
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
