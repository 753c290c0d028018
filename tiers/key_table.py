"""Things by key, in parts: so that no insertion holds the loop up, however many there are.

CPython keeps a dict that things come to and go from half empty: when its dead entries have used it
up, it becomes three times as large as what is in it, and all of that is copied at once. A large
table is therefore in parts, by the first byte of the key, and each part is copied to a dict of the
least size before it would grow.
"""

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from kvtier.chunks import ChunkKey

_PARTS = 256  # as many as the first byte of a key has values
_MOST_WHOLE = 4096  # things in a table of one part
# A copy must leave room for one in so many of what is there; else the part may grow.
_LEAST_ROOM = 6


class Keyed(Protocol):
    @property
    def key(self) -> ChunkKey: ...


ItemT = TypeVar("ItemT", bound=Keyed)


class Part(dict[ChunkKey, ItemT]):
    """Some of a table. `room` is how many things can come before it is to be copied."""

    __slots__ = ("room",)

    def __init__(self, old: dict[ChunkKey, ItemT]) -> None:
        super().__init__(old)  # which takes the least size, a power of two filled to two thirds
        size = 8
        while 2 * size // 3 < len(old):
            size *= 2
        self.room = 2 * size // 3 - len(old)
        if self.room * _LEAST_ROOM < len(old):
            self.room = 4 * size // 3 - len(old)


class KeyTable(Generic[ItemT]):
    """`parts[key[0]]` is the part that a key belongs in; of a small table they are all one."""

    __slots__ = ("_whole", "parts")

    def __init__(self) -> None:
        self._whole = True
        self.parts: list[Part[ItemT]] = [Part({})] * _PARTS

    def __len__(self) -> int:
        return sum(map(len, self._different()))

    def __bool__(self) -> bool:
        return any(self._different())

    def __iter__(self) -> Iterator[ItemT]:
        """In no order of meaning; nothing may come or go meanwhile."""
        for part in self._different():
            yield from part.values()

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self.parts[key[0]]

    def __getitem__(self, key: ChunkKey) -> ItemT:
        return self.parts[key[0]][key]

    def get(self, key: ChunkKey) -> ItemT | None:
        return self.parts[key[0]].get(key)

    def add(self, item: ItemT) -> None:
        """Enter a thing whose key is not there."""
        key = item.key
        part = self.parts[key[0]]
        if not part.room:
            self._renew(key[0])
            part = self.parts[key[0]]
        part.room -= 1
        part[key] = item

    def discard(self, item: ItemT) -> bool:
        """Take a thing out; False when it is not there."""
        part = self.parts[item.key[0]]
        if part.get(item.key) is not item:
            return False
        del part[item.key]
        return True

    def _different(self) -> list[Part[ItemT]]:
        return self.parts[:1] if self._whole else self.parts

    def _renew(self, number: int) -> None:
        part = self.parts[number]
        if not self._whole:
            self.parts[number] = Part(part)
        elif len(part) < _MOST_WHOLE:
            self.parts = [Part(part)] * _PARTS
        else:
            self._split(part)

    def _split(self, part: Part[ItemT]) -> None:
        members: list[dict[ChunkKey, ItemT]] = [{} for _ in range(_PARTS)]
        for key, item in part.items():
            members[key[0]][key] = item
        self.parts = [Part(each) for each in members]
        self._whole = False
