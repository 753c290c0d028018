"""ARC (Megiddo and Modha, FAST 2003): what was asked for once, and what was more often.

Each has a list by recency, and ghosts of what fell off it. A ghost that is asked for says that its
list should have been longer: `_once_part` is how many chunks the first one is to keep.
"""

from collections.abc import Iterator, Sequence
from typing import Generic

from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming, EntryT
from kvtier.tiers.policies.fingerprints import Ghosts
from kvtier.tiers.policies.nodes import Arrival, Place, PlaceList, arrival_of


class Arc(Generic[EntryT]):
    def __init__(self) -> None:
        self._once = PlaceList()
        self._often = PlaceList()
        self._once_gone = Ghosts()
        self._often_gone = Ghosts()
        self._once_part = 0.0
        self._most = 0

    def asked(self, path: Sequence[EntryT], beyond: Sequence[ChunkKey], now_s: float) -> None:
        for entry in reversed(path):  # the last of a path is the first to go
            place: Place | None = entry.mark
            if place is not None and place.place_list is not None:
                place.place_list.give(place)
                self._often.take(place)
        for key in beyond:
            once, often = len(self._once_gone), len(self._often_gone)
            if key in self._once_gone:
                self._once_part = min(self._once_part + max(often / once, 1.0), self._most)
            elif key in self._often_gone:
                self._once_part = max(self._once_part - max(once / often, 1.0), 0.0)
            else:
                return

    def hinted(self, path: Sequence[EntryT], label: int, now_s: float) -> None: ...

    def arrival(
        self, above: EntryT | None, keys: Sequence[ChunkKey], now_s: float, label: int = 0
    ) -> Arrival:
        return Arrival(above)

    def admits(self, coming: Coming, over: EntryT) -> bool:
        return arrival_of(coming).admits(over)

    def added(self, entry: EntryT, coming: Coming) -> None:
        returns = self._once_gone.discard(entry.key) or self._often_gone.discard(entry.key)
        arrival_of(coming).enter(entry, self._often if returns else self._once)
        self._most = max(self._most, self._once.count + self._often.count)

    def removed(self, entry: EntryT, *, evicted: bool) -> None:
        place: Place | None = entry.mark
        if place is None:
            return
        entry.mark = None
        assert place.place_list is not None
        gone = self._once_gone if place.place_list is self._once else self._often_gone
        place.place_list.give(place)
        if evicted:
            gone.add(entry.key)
            self._once_gone.trim(self._most - self._once.count)
            self._often_gone.trim(2 * self._most - len(self._once_gone) - self._resident)

    @property
    def _resident(self) -> int:
        return self._once.count + self._often.count

    def victims(self, now_s: float) -> Iterator[EntryT]:
        once, often = self._once.evictable(), self._often.evictable()
        while True:
            first, second = (once, often) if self._once.count > self._once_part else (often, once)
            place = next(first, None) or next(second, None)
            if place is None:
                return
            entry: EntryT = place.entry
            yield entry

    def reuse(self, entry: EntryT, now_s: float) -> float:
        return 1.0

    def label(self, entry: EntryT) -> int:
        return 0

    def likely(self, coming: Coming) -> float:
        return 1.0

    def closed(self) -> None: ...
