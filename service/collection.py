"""When the interpreter looks for garbage among all that the service holds: when nobody is waiting.

A full collection visits every object of the index in one go, and it would come by itself whenever a
quarter of them is new. It finds next to nothing: what the service drops is freed at once by
counting references, but for a few objects of each session that ends. So none comes by itself.
"""

import asyncio
import gc
from collections.abc import Callable

_INTERVAL_S = 30.0
_MOST_TICKS = 120  # an hour in which nobody paused
_NEVER = 1 << 30


class IdleCollection:
    """Collects once nothing has happened from one tick to the next, or else after an hour.
    `activity` is equal as long as nothing happens."""

    def __init__(
        self, activity: Callable[[], object], collect: Callable[[], object] = gc.collect
    ) -> None:
        self._activity = activity
        self._collect = collect
        self._before = self._collected = activity()
        self._ticks = 0
        self._thresholds = gc.get_threshold()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take over from the interpreter; needs the running loop."""
        young, middle, _ = self._thresholds
        gc.set_threshold(young, middle, _NEVER)
        self._task = asyncio.create_task(self._run(), name="kvtier-collection")

    def close(self) -> None:
        """Leave it to the interpreter again."""
        gc.set_threshold(*self._thresholds)
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self.tick()

    def tick(self) -> None:
        """Collect, if this is a good time."""
        now = self._activity()
        paused, self._before = now == self._before, now
        if now == self._collected:
            return
        self._ticks += 1
        if paused or self._ticks == _MOST_TICKS:
            self._collect()
            self._collected, self._ticks = now, 0
