"""One policy at one capacity, replayed over sampled chunks: a miniature of a tier.

It stores what is asked for and missing, gives up what the policy names, and keeps the index's
promise: only leaves go. No bytes are held, only sizes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming, Policy
from kvtier.tiers.policies.registry import Family


class Chunk:
    """A chunk of a replay, and an `Entry` of its policy."""

    __slots__ = ("above", "children", "key", "mark", "nbytes", "pinned")

    def __init__(self, key: ChunkKey, above: "Chunk | None", nbytes: int) -> None:
        self.key = key
        self.above = above
        self.nbytes = nbytes  # what it stands for
        self.children = 0
        self.pinned = False
        self.mark: Any = None

    @property
    def evictable(self) -> bool:
        return not self.children and not self.pinned

    def path(self) -> list["Chunk"]:
        """From the first sampled chunk of the prompt to this one."""
        found: list[Chunk] = [self]
        while (above := found[-1].above) is not None:
            found.append(above)
        found.reverse()
        return found


MakeFamily = Callable[[int], Family]
"""Makes the policy in use anew, knowing nothing, for chunks that stand for so many."""


class Replay:
    """A tier of a given capacity in bytes."""

    def __init__(self, capacity_bytes: int, family: Family) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.learner = family.learner
        self._policy: Policy[Chunk] = family.policy()
        self._held: dict[ChunkKey, Chunk] = {}

    def __len__(self) -> int:
        return len(self._held)

    def ask(self, keys: Sequence[ChunkKey], sizes: Sequence[int], now_s: float) -> int:
        """A prompt's sampled keys are asked for and then stored; returns how many were hits.

        What comes before a held chunk was a hit as well: chunks that became popular of late are
        missing above those that were there before.
        """
        hits = self._known(keys)
        path = self._held[keys[hits - 1]].path() if hits else []
        self._policy.asked(path, keys[hits:], now_s)
        self._store(path[-1] if path else None, keys[hits:], sizes[hits:], now_s)
        return hits

    def offer(self, keys: Sequence[ChunkKey], sizes: Sequence[int], now_s: float) -> None:
        """A prompt's sampled keys are stored, where they are missing, and not asked for."""
        known = self._known(keys)
        above = self._held[keys[known - 1]] if known else None
        self._store(above, keys[known:], sizes[known:], now_s)

    def _known(self, keys: Sequence[ChunkKey]) -> int:
        """How far a prompt is held."""
        held, known = self._held, len(keys)
        while known and keys[known - 1] not in held:
            known -= 1
        return known

    def _store(
        self, above: Chunk | None, keys: Sequence[ChunkKey], sizes: Sequence[int], now_s: float
    ) -> None:
        if not keys:
            return
        arrival = self._policy.arrival(above, keys, now_s)
        comings = [Coming(arrival, place) for place in range(len(keys))]
        if above is not None:
            above.pinned = True  # the room must not be its own parent's
        admitted = self._make_room(comings, sizes, now_s)
        if above is not None:
            above.pinned = False
        for place in range(admitted):
            chunk = Chunk(keys[place], above, sizes[place])
            self._held[chunk.key] = chunk
            if above is not None:
                above.children += 1
            self._policy.added(chunk, comings[place])
            above = chunk

    def _make_room(self, comings: Sequence[Coming], sizes: Sequence[int], now_s: float) -> int:
        """Give up what the policy names; returns how many of the coming chunks have room."""
        victims = self._policy.victims(now_s)
        for place, size in enumerate(sizes):
            while self.used_bytes + size > self.capacity_bytes:
                victim = next(victims, None)
                if victim is None or not self._policy.admits(comings[place], victim):
                    return place
                if victim.evictable:
                    self._drop(victim)
            self.used_bytes += size
        return len(sizes)

    def _drop(self, chunk: Chunk) -> None:
        del self._held[chunk.key]
        self.used_bytes -= chunk.nbytes
        if chunk.above is not None:
            chunk.above.children -= 1
        self._policy.removed(chunk, evicted=True)
