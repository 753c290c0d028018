"""A hash table of few bytes: chains in buckets, about one item to a bucket.

Linear hashing (Litwin, VLDB 1980): with each item that makes it too full one bucket is split, so
there is no moment at which all is moved. A dict of as many items that come and go takes five times
the bytes: it keeps the places of what is gone, and an object for each key.
"""

from typing import Any, Generic, Protocol, TypeVar


class Item(Protocol):
    """What can be found by its `first`: a few bytes, which anybody may have chosen."""

    beside: Any  # the next item of its bucket

    @property
    def first(self) -> bytes: ...


ItemT = TypeVar("ItemT", bound=Item)


class Buckets(Generic[ItemT]):
    """Items by their `first`, which must not change while they are here. No two have the same, and
    nobody can tell which bucket one is in, so nobody can make a chain long."""

    def __init__(self) -> None:
        self._buckets: list[ItemT | None] = [None]
        self._low = 1  # the greatest power of two of buckets
        self._items = 0

    def __len__(self) -> int:
        return self._items

    def get(self, first: bytes) -> ItemT | None:
        item = self._buckets[self._place(first)]
        while item is not None and item.first != first:
            item = item.beside
        return item

    def put(self, item: ItemT) -> ItemT | None:
        """Enter an item. Returns the one whose place it takes, of the same `first`."""
        older = self.get(item.first)
        if older is not None:
            self.remove(older)
        place = self._place(item.first)
        item.beside = self._buckets[place]
        self._buckets[place] = item
        self._items += 1
        if self._items > len(self._buckets):
            self._split()
        return older

    def remove(self, item: ItemT) -> None:
        place = self._place(item.first)
        before, found = None, self._buckets[place]
        while found is not item:
            assert found is not None, "it is not here"
            before, found = found, found.beside
        if before is None:
            self._buckets[place] = item.beside
        else:
            before.beside = item.beside
        item.beside = None
        self._items -= 1

    def _place(self, first: bytes) -> int:
        place = hash(first) & (2 * self._low - 1)  # salted, in each process anew
        return place if place < len(self._buckets) else place - self._low

    def _split(self) -> None:
        """One more bucket, for a part of what is in an earlier one."""
        buckets = self._buckets
        if len(buckets) == 2 * self._low:
            self._low *= 2
        earlier = len(buckets) - self._low
        item, buckets[earlier] = buckets[earlier], None
        buckets.append(None)
        while item is not None:
            beside = item.beside
            place = self._place(item.first)
            item.beside, buckets[place] = buckets[place], item
            item = beside
