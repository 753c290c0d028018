"""Where chunks go: the one place that decides what is written, kept, promoted and given up.

after a commit   RAM has it; it is written to disk behind
on a hit         it becomes the most recent of its path; from disk, it is promoted to RAM, and from
                 RAM to VRAM, where there is some and the engine that asked can reach it
on pressure      a tier drops the policy's first victim that no lease holds and no chunk hangs on;
                 copies in other tiers stay. What VRAM alone has is brought down to RAM first
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from kvtier.kernels.shared_memory import SharedMemory
from kvtier.metrics import Counters
from kvtier.service.history import History, Loss, LossRecord
from kvtier.service.vram import Vram
from kvtier.tiers.arena import Arena, Slab, Slot, slot_bytes_of
from kvtier.tiers.base import Store
from kvtier.tiers.index import Index, Node, Replica, State, TierId
from kvtier.tiers.policies.lru import Lru

# What VRAM alone has is brought down so many chunks at a time, while room is looked for.
_MOST_LONELY = 8


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
    """Owns the index and gives tiers their room. `on_commit` is told of chunks new in RAM,
    `on_lonely` of a chunk that VRAM would give up if another tier had it."""

    def __init__(
        self,
        memory: Memory,
        store: Store | None,
        history: History,
        counters: Counters,
        clock: Callable[[], float] = time.time,
        vram: Vram | None = None,
    ) -> None:
        self.memory = memory
        self.vram = vram
        self.store = store
        self.counters = counters
        self.clock = clock
        self.history = history
        policies = {tier: Lru[Node]() for tier in TierId}
        self.index = Index(policies, self._release)
        self._residents: dict[Slab, dict[Replica, None]] = {}
        self.on_commit: Callable[[Iterable[Node]], None] = lambda nodes: None
        self.on_lonely: Callable[[Node], object] = lambda node: None

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

    # ── RAM and VRAM ──────────────────────────────────────────────────────────────────────────────

    def begin_in(
        self, tier: TierId, nbytes: int, begin: Callable[[Slot], Replica]
    ) -> Replica | None:
        """Enter a replica in a slot of an arena, making room as needed; None when nothing more may
        go."""
        slot = self._room(tier, nbytes)
        if slot is None:
            return None
        replica = begin(slot)
        self._residents.setdefault(slot.slab, {})[replica] = None
        return replica

    def _arena(self, tier: TierId) -> Arena:
        if tier is TierId.CPU:
            return self.memory.arena
        assert self.vram is not None
        return self.vram.arena

    def _room(self, tier: TierId, nbytes: int) -> Slot | None:
        arena = self._arena(tier)
        slot = arena.allocate(nbytes)
        if slot is not None or not arena.could_fit(nbytes):
            return slot
        stuck: set[Slab] = set()
        for victim in self._victims(tier):
            slab = victim.slot.slab
            if slab in stuck:
                continue
            if slab.slot_bytes == slot_bytes_of(nbytes):
                self.evict(victim)
            elif not self._empty_slab(slab, tier):
                stuck.add(slab)
                continue
            slot = arena.allocate(nbytes)
            if slot is not None:
                return slot
        return None

    def _victims(self, tier: TierId) -> Iterator[Replica]:
        """What a tier may give up; VRAM only what another tier has as well."""
        lonely = 0
        for victim in self.index.victims(tier):
            if tier is not TierId.GPU or victim.node.ready_count > 1:
                yield victim
                continue
            self.on_lonely(victim.node)
            lonely += 1
            if lonely == _MOST_LONELY:
                return

    def _empty_slab(self, slab: Slab, tier: TierId) -> bool:
        """Move a slab to another layout by evicting all in it; False when something there is
        leased, or nowhere else."""
        doomed: dict[Replica, None] = {}
        for resident in self._residents[slab]:
            for node in resident.node.subtree():
                replica = node.replicas[tier]
                if replica is not None:
                    doomed.pop(replica, None)  # a child always comes after its parent
                    doomed[replica] = None
        if any(replica.pins or replica.state is not State.READY for replica in doomed):
            return False
        for replica in reversed(doomed):
            if not self.index.is_evictable(replica):
                return False  # elsewhere something hangs on it that this tier alone holds up
            if tier is TierId.GPU and replica.node.ready_count == 1:
                return False
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
        self.counters.add_evicted(tier.name.lower())
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
        if replica.tier is not TierId.DISK:
            residents = self._residents[replica.slot.slab]
            residents.pop(replica, None)
            if not residents:
                del self._residents[replica.slot.slab]
            self._arena(replica.tier).free(replica.slot)
        elif replica.place is not None:
            assert self.store is not None
            self.store.delete(replica.record)
