"""Least recently used first, and of one request the last chunk first."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic

from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming, EntryT
from kvtier.tiers.policies.segments import Queue, Segment, cover, cut_below, join, split


class Arrival:
    """Chunks on their way: `deepest` is the last of their path that the tier has."""

    __slots__ = ("deepest",)

    def __init__(self, above: Any) -> None:
        self.deepest = above


class Lru(Generic[EntryT]):
    """One queue of segments. Nothing costs more than a segment does, but marking chunks that are
    new, and where paths part or join the smaller side."""

    def __init__(self) -> None:
        self._queue: Queue[Segment[None]] = Queue()

    def asked(self, path: Sequence[EntryT], beyond: Sequence[ChunkKey], now_s: float) -> None:
        used: Segment[None] | None = None
        start = 0
        for segment, end in cover(path):
            if end - start < segment.count:
                part = split(self._queue, segment, path[start:end])
            else:
                part = segment
                self._queue.remove(part)
            used = part if used is None else join(used, part)
            start = end
        if used is not None:
            self._queue.append(used)

    def hinted(self, path: Sequence[EntryT], label: int, now_s: float) -> None: ...

    def arrival(
        self, above: EntryT | None, keys: Sequence[ChunkKey], now_s: float, label: int = 0
    ) -> Arrival:
        return Arrival(above)

    def admits(self, coming: Coming, over: EntryT) -> bool:
        return over is not coming.arrival.deepest

    def added(self, entry: EntryT, coming: Coming) -> None:
        coming.arrival.deepest = entry
        newest, above = self._queue.newest, entry.above
        if newest is None or above is None or newest.tail is not above:
            newest = Segment(None)
            self._queue.append(newest)
        newest.push(entry)

    def removed(self, entry: EntryT, *, evicted: bool) -> None:
        segment: Segment[None] | None = entry.mark
        if segment is None:
            return
        if segment.tail is not entry:
            cut_below(self._queue, entry)
        segment.pop()
        if not segment.count:
            self._queue.remove(segment)

    def victims(self, now_s: float) -> Iterator[EntryT]:
        segment = self._queue.oldest
        while segment is not None:
            newer = segment.newer
            while segment.count and segment.tail.evictable:
                entry: EntryT = segment.tail
                yield entry
                if segment.tail is entry:
                    break  # it was left where it is
            segment = segment.newer if segment.count else newer

    def reuse(self, entry: EntryT, now_s: float) -> float:
        return 1.0

    def label(self, entry: EntryT) -> int:
        return 0

    def likely(self, coming: Coming) -> float:
        return 1.0

    def closed(self) -> None: ...
