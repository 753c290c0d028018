"""Ghosts that are judged one by one: 8 bytes of each key, in the order in which they went."""

from collections import OrderedDict

from kvtier.chunks import ChunkKey

_BYTES = 8


class Ghosts:
    """Keys that are gone, the first gone first."""

    def __init__(self) -> None:
        # Not a plain dict: one that is emptied from the front is scanned over its dead entries.
        self._prints: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prints)

    def __contains__(self, key: ChunkKey) -> bool:
        return _print(key) in self._prints

    def add(self, key: ChunkKey) -> None:
        self._prints[_print(key)] = None

    def discard(self, key: ChunkKey) -> bool:
        """Whether it was there."""
        return self._prints.pop(_print(key), 0) is None

    def trim(self, most: int) -> None:
        """Keep so many, the last gone."""
        while len(self._prints) > most:
            self._prints.popitem(last=False)


def _print(key: ChunkKey) -> int:
    return int.from_bytes(key[:_BYTES], "little")
