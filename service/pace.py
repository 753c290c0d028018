"""Long work in pieces: the loop belongs to everybody, so others have their turn in between."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import TypeVar

ItemT = TypeVar("ItemT")


class Pace:
    """Counts steps of one piece of work, and gives way after so many: few enough that nobody
    notices them, enough that the turns in between cost little."""

    __slots__ = ("_done", "_steps")

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0

    async def stepped(self, steps: int = 1) -> bool:
        """So many steps are done: True when others had their turn since."""
        self._done += steps
        if self._done < self._steps:
            return False
        self._done = 0
        await asyncio.sleep(0)
        return True


async def in_turns(pieces: Iterable[Sequence[ItemT]], steps: int) -> list[ItemT]:
    """What comes in pieces, each the work of as many steps as it is long."""
    pace = Pace(steps)
    found: list[ItemT] = []
    for piece in pieces:
        found += piece
        await pace.stepped(len(piece))
    return found
