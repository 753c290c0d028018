"""Which of the engine's blocks an offload may still be reading.

The engine frees and hands out blocks as it likes; nothing holds them for kvtier. Instead, whoever
is about to write a block that an offload was told to read makes the workers wait for that offload,
or give it up. So an offload never costs the engine memory, and never reads what is overwritten.
"""

from collections.abc import Iterable


class Fence:
    """Block ids by the last offload that reads them. It learns of no completion: a fence for an
    offload that is long done costs its worker one comparison."""

    def __init__(self) -> None:
        self._readers: dict[int, int] = {}

    def reading(self, number: int, blocks: Iterable[int]) -> None:
        """Offload `number` is about to read these blocks."""
        for block in blocks:
            self._readers[block] = number

    def written(self, blocks: Iterable[int]) -> set[int]:
        """These blocks are about to be written: the offloads that must have left them."""
        readers = self._readers
        if not readers:
            return set()
        return {readers.pop(block) for block in blocks if block in readers}
