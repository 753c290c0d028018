"""Chunks that go with all that continues them, however many these are: leaf by leaf, while others
have their turns. What was begun is carried out, whoever asked for it and has gone since."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from kvtier.service.history import Why
from kvtier.service.pace import Pace
from kvtier.service.placement import Placement
from kvtier.tiers.tree import Node

# Between two turns of the loop: finding a chunk is one step, losing it takes longer.
_STEPS = 4096
_STEPS_TO_LOSE = 32
# What is too old goes at once, where it is no more than that.
_FEW = _STEPS // _STEPS_TO_LOSE
ResultT = TypeVar("ResultT")


class Removals:
    """All removals under way. What is stored while one is may go as well, where it continues a
    chunk that goes."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._under_way: set[asyncio.Task[Any]] = set()
        self._expiring: set[Node] = set()

    async def remove(self, nodes: Sequence[Node]) -> int:
        """Remove chunks of one space, in prompt order, and all that continues them, because a
        client wants it; returns how many went."""
        return await asyncio.shield(self._begin(self._remove(nodes, Why.REMOVED)))

    def expire(self, node: Node) -> None:
        """Remove a chunk that is too old, and all that continues it: at once or, where that is
        much, soon. Needs the running loop."""
        if node in self._expiring:
            return
        if _is_small(node):
            self._count_expired(self._placement.lose(node, Why.AGE))
        else:
            self._expiring.add(node)
            self._begin(self._expire(node))

    async def close(self) -> None:
        """Return when all that was begun is carried out."""
        if self._under_way:
            await asyncio.wait(self._under_way)

    def _begin(self, work: Coroutine[Any, Any, ResultT]) -> asyncio.Task[ResultT]:
        task = asyncio.create_task(work, name="kvtier-removal")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _expire(self, node: Node) -> None:
        try:
            self._count_expired(await self._remove([node], Why.AGE))
        finally:
            self._expiring.discard(node)

    def _count_expired(self, chunks: int) -> None:
        self._placement.counters.expired_chunks += chunks

    async def _remove(self, nodes: Sequence[Node], why: Why) -> int:
        pace = Pace(_STEPS)
        return sum([await self._remove_below(node, why, pace) for node in reversed(nodes)])

    async def _remove_below(self, top: Node, why: Why, pace: Pace) -> int:
        """Remove a chunk and all under it, children before their parents. Who joins one that was
        found already goes with it."""
        found = [top]
        for node in found:
            children = node.children()
            found += children
            await pace.stepped(1 + len(children))
        gone = 0
        while found:
            node = found.pop()  # which frees each in its turn
            gone += self._placement.lose(node, why, continued=node is not top)
            await pace.stepped(_STEPS_TO_LOSE)
        return gone


def _is_small(top: Node) -> bool:
    """Whether few chunks are below one."""
    found = [top]
    for node in found:
        found += node.children()
        if len(found) > _FEW:
            return False
    return True
