"""Steps of an event loop."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, Self, TypeVar

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


async def turn() -> None:
    """Return once everything that was ready to run has run."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    loop.call_soon(done.set_result, None)
    await done


class Turns:
    """Counts the turns of the loop while it is entered, and what is done in each: `notes` returns a
    function that does the same and notes that."""

    def __init__(self) -> None:
        self._now = 0
        self._done: Counter[int] = Counter()

    async def __aenter__(self) -> Self:
        self._counting = asyncio.create_task(self._count())
        await turn()
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._counting.cancel()
        await asyncio.gather(self._counting, return_exceptions=True)

    async def _count(self) -> None:
        while True:
            self._now += 1
            await asyncio.sleep(0)

    def notes(self, work: Callable[ParamsT, ResultT]) -> Callable[ParamsT, ResultT]:
        def noted(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
            self._done[self._now] += 1
            return work(*args, **kwargs)

        return noted

    @property
    def most(self) -> int:
        """The most that was done in one turn."""
        return max(self._done.values(), default=0)

    @property
    def done(self) -> int:
        """All that was done."""
        return self._done.total()
