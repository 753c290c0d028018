"""Two tiers, RAM and a disk ten times as large: what each serves, and what the disk has to take.

As in the service, a hit on disk is copied to RAM and stays on disk, and a chunk goes to disk

demote          when RAM gives it up, or would not have it at all
write_through   when it is stored
second_touch    when it is asked for again, held or not
reuse           as demote, if its policy takes it to be asked for again with a probability
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from kvtier.bench.trace.replay import Held, Keys, Progress, make_index, wanted
from kvtier.bench.trace.requests import Trace
from kvtier.chunks import ChunkKey
from kvtier.tiers.base import Coming
from kvtier.tiers.policies.learner import HazardLearner
from kvtier.tiers.policies.registry import make_family
from kvtier.tiers.policies.traits import Arrival
from kvtier.tiers.tree import Node, Replica, TierId

DISK_TIMES_RAM = 10


class Mode(Enum):
    """When a chunk is written to disk."""

    DEMOTE = "demote"
    WRITE_THROUGH = "write_through"
    SECOND_TOUCH = "second_touch"
    REUSE = "reuse"


@dataclass(frozen=True, slots=True)
class TierResult:
    """Percent of the chunks that were asked for."""

    policy: str
    mode: str
    ram_chunks: int
    disk_chunks: int
    ram_hit_percent: float
    disk_hit_percent: float
    written_percent: float


class TwoTiers:
    """A replay under way. `least_reuse` counts with Mode.REUSE only."""

    def __init__(
        self, trace: Trace, policy: str, ram_chunks: int, mode: Mode, least_reuse: float
    ) -> None:
        families = {tier: make_family(policy) for tier in TierId}
        self._index, self._branch = make_index(families, [TierId.CPU, TierId.DISK])
        self._ram = Held(self._index, self._branch, TierId.CPU, ram_chunks)
        self._disk = Held(self._index, self._branch, TierId.DISK, DISK_TIMES_RAM * ram_chunks)
        self._ram.evicted = self._given_up
        self._learners = [families[tier].learner for tier in (TierId.CPU, TierId.DISK)]
        self._trace = trace
        self._policy = policy
        self._ram_chunks = ram_chunks
        self._mode = mode
        self._least_reuse = least_reuse
        self._missed: set[ChunkKey] = set()  # asked for before, and held by nothing then
        self._now_s = 0.0
        self._ram_hits = self._disk_hits = self._written = 0

    def run(self, progress: Progress) -> TierResult:
        keys = Keys(self._trace.unique)
        for request, now_s in enumerate(self._trace.times_s.tolist()):
            self._now_s = now_s
            self._request(keys.of(wanted(self._trace, request, self._policy)))
            for learner in self._learners:
                if learner.due:
                    learner.learn()
            progress(request + 1)
        share = 100 / self._trace.references
        return TierResult(
            self._policy,
            self._mode.value,
            self._ram_chunks,
            DISK_TIMES_RAM * self._ram_chunks,
            share * self._ram_hits,
            share * self._disk_hits,
            share * self._written,
        )

    def _request(self, needs: list[ChunkKey]) -> None:
        run = self._index.match(self._branch, needs)
        in_ram = self._index.leading(run, [TierId.CPU])
        self._ram_hits += in_ram
        self._disk_hits += len(run) - in_ram
        self._index.ask(self._branch, run, needs[len(run) :], self._now_s)
        if self._mode is Mode.SECOND_TOUCH:
            self._write([node for node in run if node.ready(TierId.DISK) is None])
        pinned = [replica for node in run for replica in node.replicas if replica is not None]
        for replica in pinned:
            self._index.pin(replica)
        self._store(run, in_ram, needs)
        for replica in pinned:
            self._index.unpin(replica)

    def _store(self, run: list[Node], in_ram: int, needs: Sequence[ChunkKey]) -> None:
        """Bring what the disk has, and what nobody has, to RAM; what RAM refuses goes on to disk
        where the mode has it there."""
        parent = run[in_ram - 1] if in_ram else None
        rest = needs[in_ram:]
        if not rest:
            return
        begun: list[Replica] = []
        parent_key = parent.key if parent is not None else self._branch.digest
        coming = self._ram.coming(parent, rest, self._now_s)
        for key, one in zip(rest, coming, strict=True):
            if not self._ram.make_room(one, self._now_s):
                break
            node = self._index.enter(self._branch, key, parent_key, self._now_s)
            begun.append(self._index.begin(node, TierId.CPU, None, one))
            parent_key = key
        for replica in begun:
            self._index.commit(replica)
        if self._mode is Mode.WRITE_THROUGH:
            self._write([r.node for r in begun if r.node.ready(TierId.DISK) is None])
        if self._mode is Mode.SECOND_TOUCH:
            self._write([r.node for r in begun if self._is_second(r.node)])
        held = max(in_ram + len(begun), len(run))
        passed = self._to_pass_on(coming[held - in_ram :], needs[held:])
        if passed:
            parent_key = needs[held - 1] if held else self._branch.digest
            self._write_unheld(parent_key, passed)
        self._missed.update(needs[len(run) :])

    def _is_second(self, node: Node) -> bool:
        return node.key in self._missed and node.ready(TierId.DISK) is None

    def _to_pass_on(
        self, refused: Sequence[Coming], keys: Sequence[ChunkKey]
    ) -> Sequence[ChunkKey]:
        """Which of the chunks that RAM refuses are for the disk."""
        wanted = 0
        for coming, key in zip(refused, keys, strict=True):
            if self._mode is Mode.SECOND_TOUCH and key not in self._missed:
                break
            if self._mode is Mode.REUSE and self._chance(coming) < self._least_reuse:
                break
            wanted += 1
        return keys[:wanted]

    def _chance(self, coming: Coming) -> float:
        """That a chunk is asked for again which has just been, as its policy sees it."""
        arrival, learner = coming.arrival, self._learners[0]
        if not isinstance(learner, HazardLearner) or not isinstance(arrival, Arrival):
            return 1.0
        return learner.reach[arrival.traits_at(coming.place).kind][0]

    def _given_up(self, victim: Replica) -> None:
        """RAM is about to drop a chunk."""
        node = victim.node
        if node.ready(TierId.DISK) is not None or self._mode is Mode.SECOND_TOUCH:
            return
        reuse = self._ram.policy.reuse(victim, self._now_s)
        if self._mode is not Mode.REUSE or reuse >= self._least_reuse:
            unsaved = [above for above in node.path() if above.ready(TierId.DISK) is None]
            self._write(unsaved)

    def _write(self, nodes: Sequence[Node]) -> None:
        """Copy chunks of one path to disk, in its order."""
        start = 0
        for end in range(1, len(nodes) + 1):
            if end == len(nodes) or nodes[end].parent is not nodes[end - 1]:
                self._write_run(nodes[start:end])
                start = end

    def _write_run(self, nodes: Sequence[Node]) -> None:
        keys = [node.key for node in nodes]
        for node, coming in zip(nodes, self._coming(nodes[0].parent, keys), strict=True):
            if not self._disk.make_room(coming, self._now_s):
                return
            replica = self._index.begin(node, TierId.DISK, None, coming)
            self._index.commit(replica)
            self._written += 1

    def _write_unheld(self, parent_key: ChunkKey, keys: Sequence[ChunkKey]) -> None:
        parent = self._branch.nodes.get(parent_key)
        for key, coming in zip(keys, self._coming(parent, keys), strict=True):
            if not self._disk.make_room(coming, self._now_s):
                return
            node = self._index.enter(self._branch, key, parent_key, self._now_s)
            self._index.commit(self._index.begin(node, TierId.DISK, None, coming))
            self._written += 1
            parent_key = key

    def _coming(self, parent: Node | None, keys: Sequence[ChunkKey]) -> list[Coming]:
        return self._disk.coming(parent, keys, self._now_s)
