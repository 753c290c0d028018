"""Runs of chunks that a policy treats alike, and queues of them.

A tier holds millions of chunks, but what is asked for together stays together: the chunks of one
path that were last touched by the same request form a *segment*. A chunk's `mark` is its segment,
and a segment knows only its last chunk, its *tail*, and how many there are: the rest are above the
tail. So a policy's work for a request, and its memory, go by segments and not by chunks.

What a request touches of a segment is always a leading part of it: a path comes from the root.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from kvtier.tiers.base import Entry

TraitsT = TypeVar("TraitsT")


class Link:
    """A place in a queue."""

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        self.older: Any = None
        self.newer: Any = None


LinkT = TypeVar("LinkT", bound=Link)


class Queue(Generic[LinkT]):
    """Links from the oldest to the newest; each is in one queue at most."""

    __slots__ = ("newest", "oldest")

    def __init__(self) -> None:
        self.oldest: LinkT | None = None
        self.newest: LinkT | None = None

    def append(self, link: LinkT) -> None:
        """Enter a link as the newest."""
        newest = self.newest
        link.older, link.newer = newest, None
        if newest is None:
            self.oldest = link
        else:
            newest.newer = link
        self.newest = link

    def insert(self, link: LinkT, newer: LinkT) -> None:
        """Enter a link as the next older one of another."""
        older = newer.older
        link.older, link.newer = older, newer
        newer.older = link
        if older is None:
            self.oldest = link
        else:
            older.newer = link

    def remove(self, link: LinkT) -> None:
        older, newer = link.older, link.newer
        if older is None:
            self.oldest = newer
        else:
            older.newer = newer
        if newer is None:
            self.newest = older
        else:
            newer.older = older
        link.older = link.newer = None


class Segment(Link, Generic[TraitsT]):
    """`count` chunks, each the one above the next; the last is `tail`. `ends` is the turn of the
    request that ended here, 0 when something continues it or nothing is known. `shade` are the
    ghosts that were below the tail."""

    __slots__ = ("count", "ends", "shade", "tail", "traits")

    def __init__(self, traits: TraitsT) -> None:
        super().__init__()
        self.traits = traits
        self.tail: Any = None
        self.count = 0
        self.ends = 0
        self.shade: Any = None

    def push(self, entry: Entry) -> None:
        """Append the chunk below the tail."""
        entry.mark = self
        self.tail = entry
        self.count += 1

    def pop(self) -> None:
        """Take the tail off."""
        entry = self.tail
        entry.mark = None
        self.count -= 1
        self.tail = entry.above if self.count else None


SegmentT = TypeVar("SegmentT", bound=Segment[Any])


def cover(path: Sequence[Entry]) -> list[tuple[Any, int]]:
    """The segments of a path, in its order, each with where on the path it ends."""
    covered = []
    start = 0
    while start < len(path) and (segment := path[start].mark) is not None:
        end = start + segment.count
        if end > len(path) or path[end - 1] is not segment.tail:
            end = bisect_left(
                path, True, start, min(end, len(path)), key=lambda entry: entry.mark is not segment
            )
        covered.append((segment, end))
        start = end
    return covered


def split(queue: Queue[SegmentT], segment: SegmentT, part: Sequence[Entry]) -> SegmentT:
    """Cut the leading chunks `part` off a segment; what is left keeps its place in the queue.
    Returns the segment of `part`, which is in no queue. The smaller side gets a new segment."""
    left = segment.count - len(part)
    other = type(segment)(segment.traits)
    if len(part) <= left:
        for entry in part:
            entry.mark = other
        other.tail, other.count = part[-1], len(part)
        segment.count = left
        return other
    _mark_upwards(segment.tail, left, other)
    other.tail, other.count = segment.tail, left
    other.ends, other.shade = segment.ends, segment.shade
    segment.tail, segment.count = part[-1], len(part)
    segment.ends, segment.shade = 0, None
    queue.insert(other, segment)
    queue.remove(segment)
    return segment


def join(upper: SegmentT, lower: SegmentT) -> SegmentT:
    """Make one segment of two, the second below the first's tail; neither is in a queue. The
    larger one goes on, with the upper one's traits."""
    if lower.count <= upper.count:
        _mark_upwards(lower.tail, lower.count, upper)
        upper.tail, upper.ends, upper.shade = lower.tail, lower.ends, lower.shade
        upper.count += lower.count
        lower.tail, lower.count = None, 0  # an arrival may know it still
        return upper
    _mark_upwards(upper.tail, upper.count, lower)
    lower.traits = upper.traits
    lower.count += upper.count
    upper.tail, upper.count = None, 0
    return lower


def cut_below(queue: Queue[SegmentT], entry: Entry) -> None:
    """Make a chunk the tail of its segment: what is below it becomes a segment of its own, of the
    same age."""
    segment: SegmentT = entry.mark
    below = 0
    current = segment.tail
    while current is not entry:
        below += 1
        current = current.above
    lower = type(segment)(segment.traits)
    _mark_upwards(segment.tail, below, lower)
    lower.tail, lower.count = segment.tail, below
    lower.ends, lower.shade = segment.ends, segment.shade
    segment.tail = entry
    segment.count -= below
    segment.ends, segment.shade = 0, None
    queue.insert(lower, segment)


def _mark_upwards(tail: Any, count: int, segment: Any) -> None:
    entry = tail
    for _ in range(count):
        entry.mark = segment
        entry = entry.above
