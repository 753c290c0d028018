"""Lists of single chunks, for policies that judge each chunk by itself."""

from collections.abc import Iterator
from typing import Any

from kvtier.tiers.base import Coming, Entry
from kvtier.tiers.policies.segments import Link, Queue


class Place(Link):
    """A chunk's place in one of a policy's lists. `hits` counts how often it was asked for."""

    __slots__ = ("entry", "hits", "place_list")

    def __init__(self, entry: Any) -> None:
        super().__init__()
        self.entry = entry
        self.hits = 0
        self.place_list: PlaceList | None = None


class PlaceList(Queue[Place]):
    """Places from the oldest to the newest, counted."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def take(self, place: Place) -> None:
        """Enter a place that is in no list as the newest."""
        self.append(place)
        self._own(place)

    def take_older(self, place: Place, newer: Place) -> None:
        """Enter a place that is in no list as the next older one of another."""
        self.insert(place, newer)
        self._own(place)

    def _own(self, place: Place) -> None:
        place.place_list = self
        self.count += 1

    def give(self, place: Place) -> None:
        self.remove(place)
        place.place_list = None
        self.count -= 1

    def evictable(self) -> Iterator[Place]:
        """Places whose chunk may go, from the oldest; the caller may take out the one it was
        given."""
        place = self.oldest
        while place is not None:
            newer = place.newer
            if place.entry.evictable:
                yield place
            place = newer


class Arrival:
    """Chunks on their way: `deepest` is the last of their path that the tier has, `last` the place
    of the one that was added last."""

    __slots__ = ("deepest", "last")

    def __init__(self, above: Any) -> None:
        self.deepest = above
        self.last: Place | None = None

    def admits(self, over: Entry) -> bool:
        """What is above a chunk cannot go for it."""
        return over is not self.deepest

    def enter(self, entry: Entry, into: PlaceList) -> None:
        """Of one arrival, the last chunk is the oldest of a list."""
        place = entry.mark = Place(entry)
        if self.last is not None and self.last.place_list is into:
            into.take_older(place, self.last)
        else:
            into.take(place)
        self.deepest, self.last = entry, place


def arrival_of(coming: Coming) -> Arrival:
    arrival: Arrival = coming.arrival
    return arrival
