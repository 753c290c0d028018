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
from kvtier.tiers.policies.registry import make_family
from kvtier.tiers.tree import Branch, Node, TierId

_SPACE = Space("kvtier-trace", Layout(dtype="int8", layers=1, heads=1, head_dim=1))
_KEY_BYTES = 32
_TIER = TierId.CPU

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


class _Ram:
    """The tier of an index: room for `capacity` chunks under a policy."""

    def __init__(self, index: Index, branch: Branch, capacity: int) -> None:
        self._index = index
        self._branch = branch
        self._capacity = capacity
        self._begun = 0
        self._policy = branch.tenant.policies[_TIER]

    def store(self, run: list[Node], rest: list[ChunkKey], now_s: float, label: int) -> None:
        """Store what follows a held run, as far as there is room that it is worth."""
        if not rest:
            return
        index, branch = self._index, self._branch
        parent = run[-1] if run else None
        above = parent.ready(_TIER) if parent is not None else None
        if above is not None:
            index.pin(above)  # the room must not be its own parent's
        begun = []
        parent_key = parent.key if parent is not None else branch.digest
        comings = index.arrival(branch, _TIER, parent, rest, now_s, label)
        for key, coming in zip(rest, comings, strict=True):
            if not self._make_room(coming, now_s):
                break
            node = index.enter(branch, key, parent_key, now_s)
            begun.append(index.begin(node, _TIER, None, coming))
            parent_key = key
        for replica in begun:
            index.commit(replica)
        if above is not None:
            index.unpin(above)

    def _make_room(self, coming: Coming, now_s: float) -> bool:
        """Whether there is room for a chunk, or a victim to give it up. It is then taken."""
        if self._begun < self._capacity:
            self._begun += 1
            return True
        victim = next(self._index.victims(self._branch.tenant, _TIER, now_s), None)
        if victim is None or not self._policy.admits(coming, victim):
            return False
        self._index.drop(victim)
        return True


def learns(policy: str) -> bool:
    """Whether a policy learns when chunks come again, and stores whole ones only."""
    return policy.startswith("gix")


def wanted(trace: Trace, request: int, policy: str) -> list[int]:
    """The chunks of a request that are looked up and stored."""
    chunks = trace.needs(request)
    if learns(policy) and trace.partly[chunks[-1]]:
        chunks.pop()
    return chunks


def replay(
    trace: Trace,
    policy: str,
    capacity: int,
    progress: Progress,
    labels: Sequence[int] | None = None,
) -> Replayed:
    """Replay a trace with room for so many chunks in RAM. `labels`: what the engine says of each
    request's chunks, 0 for nothing; as in the service it is told of those that are held once they
    are asked for, and of the others as they come."""
    keys = Keys(trace.unique)
    family = make_family(policy)
    index = Index(lambda tier: family.policy(), lambda replica: None, [_TIER])
    branch = index.branch(_SPACE)
    ram = _Ram(index, branch, capacity)
    hits = np.zeros(trace.requests, np.int64)
    busy_s = 0.0
    for request, now_s in enumerate(trace.times_s.tolist()):
        needs = keys.of(wanted(trace, request, policy))
        label = labels[request] if labels is not None else 0
        start_s = time.perf_counter()
        run = index.match(branch, needs)
        index.ask(branch, run, needs[len(run) :], now_s)
        if label:
            index.hint(run, label, now_s)
        ram.store(run, needs[len(run) :], now_s, label)
        busy_s += time.perf_counter() - start_s
        hits[request] = len(run)
        if family.learner.due:
            family.learner.learn()
        progress(request + 1)
    weight = bytes_of(index, but=family.learner) / max(index.chunks[_TIER], 1)
    return Replayed(hits, 1e6 * busy_s / trace.requests, weight)


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
