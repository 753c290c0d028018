"""Replays a trace through the real index and a real policy; no bytes are moved.

As in a service, a request is looked up, and what is missing of it is stored head first: a chunk
that finds no room takes that of the policy's first victim, or is refused with all that follows it.
What GIX is asked to store are whole chunks. The other policies also store the unfilled end of a
prompt, as the published results for them do.
"""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from kvtier.bench.trace.requests import Ints, Trace
from kvtier.chunks import ChunkKey
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import Coming
from kvtier.tiers.index import Index
from kvtier.tiers.policies.registry import Family, make_family
from kvtier.tiers.tree import Branch, Node, Replica, TierId

_SPACE = Space("kvtier-trace", Layout(dtype="int8", layers=1, heads=1, head_dim=1))
_KEY_BYTES = 32

Progress = Callable[[int], None]
"""Told how many requests are done."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a replay. `hits` is by request, in chunks."""

    hits: Ints
    us_per_request: float
    index_bytes_per_chunk: float


class Keys:
    """A key for each chunk: a new object each time, as from a wire."""

    def __init__(self, unique: int) -> None:
        self._random = np.random.default_rng(1).bytes(_KEY_BYTES * unique)

    def of(self, chunks: Sequence[int]) -> list[ChunkKey]:
        random = self._random
        return [ChunkKey(random[_KEY_BYTES * n : _KEY_BYTES * (n + 1)]) for n in chunks]


class Held:
    """One tier of an index: `capacity` chunks under a policy."""

    def __init__(self, index: Index, branch: Branch, tier: TierId, capacity: int) -> None:
        self._index = index
        self._branch = branch
        self.tier = tier
        self._capacity = capacity
        self._begun = 0
        self.policy = branch.tenant.policies[tier]
        self.evicted: Callable[[Replica], None] = lambda victim: None

    def coming(self, parent: Node | None, keys: Sequence[ChunkKey], now_s: float) -> list[Coming]:
        return self._index.arrival(self._branch, self.tier, parent, keys, now_s)

    def make_room(self, coming: Coming, now_s: float) -> bool:
        """Whether there is room for a chunk, or a victim to give it up. It is then taken."""
        if self._begun < self._capacity:
            self._begun += 1
            return True
        victim = next(self._index.victims(self._branch.tenant, self.tier, now_s), None)
        if victim is None or not self.policy.admits(coming, victim):
            return False
        self.evicted(victim)
        self._index.drop(victim)
        return True


def make_index(families: dict[TierId, Family], tiers: Sequence[TierId]) -> tuple[Index, Branch]:
    index = Index(lambda tier: families[tier].policy(), lambda replica: None, tiers)
    return index, index.branch(_SPACE)


def stores_whole_chunks(policy: str) -> bool:
    return policy.startswith("gix")


def wanted(trace: Trace, request: int, policy: str) -> list[int]:
    """The chunks of a request that are looked up and stored."""
    chunks = trace.needs(request)
    if stores_whole_chunks(policy) and trace.partly[chunks[-1]]:
        chunks.pop()
    return chunks


def replay(trace: Trace, policy: str, capacity: int, progress: Progress) -> Replayed:
    """Replay a trace with room for so many chunks in RAM."""
    keys = Keys(trace.unique)
    families = {tier: make_family(policy) for tier in TierId}
    index, branch = make_index(families, [TierId.CPU])
    learner = families[TierId.CPU].learner
    held = Held(index, branch, TierId.CPU, capacity)
    hits = np.zeros(trace.requests, np.int64)
    busy_s = 0.0
    for request, now_s in enumerate(trace.times_s.tolist()):
        needs = keys.of(wanted(trace, request, policy))
        start_s = time.perf_counter()
        run = index.match(branch, needs)
        index.ask(branch, run, needs[len(run) :], now_s)
        _store(index, branch, held, run, needs[len(run) :], now_s)
        busy_s += time.perf_counter() - start_s
        hits[request] = len(run)
        if learner.due:
            learner.learn()
        progress(request + 1)
    chunks = max(index.chunks[TierId.CPU], 1)
    return Replayed(hits, 1e6 * busy_s / trace.requests, bytes_of(index, but=learner) / chunks)


def _store(
    index: Index, branch: Branch, held: Held, run: list[Node], rest: list[ChunkKey], now_s: float
) -> None:
    if not rest:
        return
    parent = run[-1] if run else None
    above = parent.ready(held.tier) if parent is not None else None
    if above is not None:
        index.pin(above)  # the room must not be its own parent's
    begun = []
    parent_key = parent.key if parent is not None else branch.digest
    for key, coming in zip(rest, held.coming(parent, rest, now_s), strict=True):
        if not held.make_room(coming, now_s):
            break
        node = index.enter(branch, key, parent_key, now_s)
        begun.append(index.begin(node, held.tier, None, coming))
        parent_key = key
    for replica in begun:
        index.commit(replica)
    if above is not None:
        index.unpin(above)


def bytes_of(root: object, but: object) -> int:
    """The bytes of all objects that can be reached from one, without another and what both share
    with the code."""
    shared = (type, ModuleType, FunctionType, MethodType)
    known = {id(root), id(but)}
    ahead: list[Any] = [root]
    total = 0
    while ahead:
        found = ahead.pop()
        total += sys.getsizeof(found)
        for other in gc.get_referents(found):
            if id(other) not in known and not isinstance(other, shared):
                known.add(id(other))
                ahead.append(other)
    return total
