"""S3-FIFO (Yang et al., SOSP 2023): a small queue for what is new, and one for what was used.

A chunk that was asked for twice in the small queue, or whose ghost was, belongs in the main one,
where it gets another round for each time it was asked for, up to three.
"""

from collections.abc import Iterator, Sequence
from typing import Generic

from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming, EntryT
from kvtier.tiers.policies.fingerprints import Ghosts
from kvtier.tiers.policies.nodes import Arrival, Place, PlaceList, arrival_of

_SMALL_PART = 10  # the small queue is a tenth of all
_MOST_HITS = 3
_HITS_TO_STAY = 2
_LOOK = 64  # chunks moved on in the main queue, for one victim


class S3Fifo(Generic[EntryT]):
    def __init__(self) -> None:
        self._small = PlaceList()
        self._main = PlaceList()
        self._ghosts = Ghosts()
        self._most = 0

    def asked(self, path: Sequence[EntryT], beyond: Sequence[ChunkKey], now_s: float) -> None:
        for entry in path:
            place: Place | None = entry.mark
            if place is not None:
                place.hits = min(place.hits + 1, _MOST_HITS)

    def hinted(self, path: Sequence[EntryT], label: int, now_s: float) -> None: ...

    def arrival(
        self, above: EntryT | None, keys: Sequence[ChunkKey], now_s: float, label: int = 0
    ) -> Arrival:
        return Arrival(above)

    def admits(self, coming: Coming, over: EntryT) -> bool:
        return arrival_of(coming).admits(over)

    def added(self, entry: EntryT, coming: Coming) -> None:
        returns = self._ghosts.discard(entry.key)
        arrival_of(coming).enter(entry, self._main if returns else self._small)
        self._most = max(self._most, self._small.count + self._main.count)

    def removed(self, entry: EntryT, *, evicted: bool) -> None:
        place: Place | None = entry.mark
        if place is None:
            return
        entry.mark = None
        assert place.place_list is not None
        if evicted and place.place_list is self._small:
            self._ghosts.add(entry.key)
            self._ghosts.trim(self._most)
        place.place_list.give(place)

    def victims(self, now_s: float) -> Iterator[EntryT]:
        self._settle()
        total = self._small.count + self._main.count
        first, second = self._small, self._main
        if self._small.count * _SMALL_PART < total:
            first, second = second, first
        for places in (first, second):
            for place in places.evictable():
                entry: EntryT = place.entry
                yield entry

    def _settle(self) -> None:
        """Move on what is not to go, or cannot, until the first of each queue may."""
        place = self._small.oldest
        while place is not None and place.hits >= _HITS_TO_STAY:
            self._small.give(place)
            place.hits = 0
            self._main.take(place)
            place = self._small.oldest
        for _ in range(_LOOK):
            place = self._main.oldest
            if place is None or (not place.hits and place.entry.evictable):
                return
            self._main.give(place)
            place.hits = max(place.hits - 1, 0)
            self._main.take(place)

    def reuse(self, entry: EntryT, now_s: float) -> float:
        return 1.0

    def label(self, entry: EntryT) -> int:
        return 0

    def likely(self, coming: Coming) -> float:
        return 1.0

    def closed(self) -> None: ...
