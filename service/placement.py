"""Where chunks go: the one place that decides what is written, kept, promoted and given up.

after a commit   RAM has it; it is written to disk behind
on a hit         it becomes the most recent of its path; from disk, it is promoted to RAM
on pressure      RAM drops the policy's first victim that no lease holds and no chunk hangs on
                 (the disk copy, if there is one, stays); disk likewise, and forgets it
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvtier.kernels.shared_memory import SharedMemory
from kvtier.metrics import Counters
from kvtier.service.history import History, Loss, LossRecord
from kvtier.tiers.arena import Arena, Slab, Slot, slot_bytes_of
from kvtier.tiers.base import Store
from kvtier.tiers.index import Index, Node, Replica, State, TierId
from kvtier.tiers.policies.lru import Lru


@dataclass(slots=True, eq=False)
class Memory:
    """The CPU tier's bytes and how they are cut."""

    region: SharedMemory
    arena: Arena = field(init=False)

    def __post_init__(self) -> None:
        self.arena = Arena(self.region.nbytes)

    def view(self, slot: Slot) -> memoryview:
        """The bytes of a slot, writable."""
        return self.region.view[slot.offset : slot.offset + slot.nbytes]


class Placement:
    """Owns the index and gives tiers their room. `on_commit` is told of chunks new in RAM."""

    def __init__(
        self,
        memory: Memory,
        store: Store | None,
        history: History,
        counters: Counters,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.memory = memory
        self.store = store
        self.counters = counters
        self.clock = clock
        self.history = history
        policies = {TierId.CPU: Lru[Node](), TierId.DISK: Lru[Node]()}
        self.index = Index(policies, self._release)
        self._residents: dict[Slab, dict[Replica, None]] = {}
        self.on_commit: Callable[[Iterable[Node]], None] = lambda nodes: None

    # ── after a commit, on a hit ──────────────────────────────────────────────────────────────────

    def committed(self, nodes: list[Node]) -> None:
        """Chunks of one prefix were committed to RAM, in prompt order."""
        if nodes:
            self.index.touch(nodes[-1].path())
            self.on_commit(nodes)

    def hit(self, run: list[Node]) -> None:
        """Held chunks of one prefix are asked for, in prompt order."""
        if run:
            self.index.touch(run[-1].path())

    # ── RAM ───────────────────────────────────────────────────────────────────────────────────────

    def begin_in_ram(self, nbytes: int, begin: Callable[[Slot], Replica]) -> Replica | None:
        """Enter a replica in a slot of RAM, making room as needed; None when nothing more may
        go."""
        slot = self._room_in_ram(nbytes)
        if slot is None:
            return None
        replica = begin(slot)
        self._residents.setdefault(slot.slab, {})[replica] = None
        return replica

    def _room_in_ram(self, nbytes: int) -> Slot | None:
        arena = self.memory.arena
        slot = arena.allocate(nbytes)
        if slot is not None or not arena.could_fit(nbytes):
            return slot
        stuck: set[Slab] = set()
        for victim in self.index.victims(TierId.CPU):
            slab = victim.slot.slab
            if slab in stuck:
                continue
            if slab.slot_bytes == slot_bytes_of(nbytes):
                self.evict(victim)
            elif not self._empty_slab(slab):
                stuck.add(slab)
                continue
            slot = arena.allocate(nbytes)
            if slot is not None:
                return slot
        return None

    def _empty_slab(self, slab: Slab) -> bool:
        """Move a slab to another layout by evicting all in it; False when something there is
        leased."""
        doomed: dict[Replica, None] = {}
        for resident in self._residents[slab]:
            for node in resident.node.subtree():
                replica = node.replicas[TierId.CPU]
                if replica is not None:
                    doomed.pop(replica, None)  # a child always comes after its parent
                    doomed[replica] = None
        if any(replica.pins or replica.state is not State.READY for replica in doomed):
            return False
        for replica in reversed(doomed):
            if not self.index.is_evictable(replica):
                return False  # on disk something hangs on it that RAM alone holds up
            self.evict(replica)
        return True

    # ── disk ──────────────────────────────────────────────────────────────────────────────────────

    def room_on_disk(self, nbytes: int) -> bool:
        """Make room for one more chunk in the store beside `nbytes` already promised to others."""
        store = self.store
        assert store is not None
        if nbytes > store.capacity_bytes:
            return False
        for victim in self.index.victims(TierId.DISK):
            if store.used_bytes + nbytes <= store.capacity_bytes:
                return True
            self.evict(victim)
        return store.used_bytes + nbytes <= store.capacity_bytes

    # ── giving up ─────────────────────────────────────────────────────────────────────────────────

    def evict(self, replica: Replica) -> None:
        """Drop one evictable replica because its tier needs the room."""
        node, tier = replica.node, replica.tier
        self.index.drop(replica)
        if tier is TierId.CPU:
            self.counters.evicted_cpu += 1
        else:
            self.counters.evicted_disk += 1
        if not node.held:
            detail = f"the {tier.name.lower()} tier needed its room"
            self._note(node, Loss.EVICTED, detail)

    def lose(self, node: Node, loss: Loss, detail: str) -> int:
        """Remove a chunk and all that continues it; returns how many chunks went."""
        dropped = self.index.drop_subtree(node)
        for member in dropped:
            cause = "" if member is node else "; it continued that chunk"
            self._note(member, loss, detail + cause)
        return len(dropped)

    def _note(self, node: Node, loss: Loss, detail: str) -> None:
        self.history.note(node.branch.digest, node.key, LossRecord(loss, self.clock(), detail))

    def _release(self, replica: Replica) -> None:
        if replica.tier is TierId.CPU:
            residents = self._residents[replica.slot.slab]
            residents.pop(replica, None)
            if not residents:
                del self._residents[replica.slot.slab]
            self.memory.arena.free(replica.slot)
        elif replica.place is not None:
            assert self.store is not None
            self.store.delete(replica.record)
