"""Least recently used first."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Generic, TypeVar

ChunkT = TypeVar("ChunkT", bound=Hashable)

_LOOK_AHEAD = 32


class Lru(Generic[ChunkT]):
    """Gives up the chunk that was added or touched longest ago; each call costs O(1) per chunk."""

    def __init__(self) -> None:
        # Not a plain dict: one that is emptied from the front is scanned over its dead entries.
        self._order: OrderedDict[ChunkT, None] = OrderedDict()

    def added(self, chunk: ChunkT) -> None:
        self._order[chunk] = None

    def touched(self, chunk: ChunkT) -> None:
        self._order.move_to_end(chunk)

    def removed(self, chunk: ChunkT) -> None:
        del self._order[chunk]

    def victims(self) -> Iterator[ChunkT]:
        passed = 0  # chunks the caller looked at and left
        while batch := list(islice(self._order, passed, passed + _LOOK_AHEAD)):
            for chunk in batch:
                yield chunk
                passed += chunk in self._order
