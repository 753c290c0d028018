"""Where chunks go: the one place that decides what is written, kept, promoted and given up.

after a commit   RAM has it; when it is written to disk is `demotion.py`'s affair
on a hit         the policies are told; from disk, it is promoted to RAM, and from RAM to VRAM,
                 where there is some and the engine that asked can reach it
on pressure      a tier drops the policy's first victim that no lease holds and no chunk hangs on;
                 copies in other tiers stay. What VRAM alone has is brought down to RAM first, and
                 what the disk is still to have goes last
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvtier.chunks import ChunkKey
from kvtier.kernels.shared_memory import SharedMemory
from kvtier.metrics import Counters
from kvtier.service.history import History, Loss, Why
from kvtier.service.shares import Losers, Shares
from kvtier.service.vram import Vram
from kvtier.tiers.arena import Arena, Slab, Slot, slot_bytes_of
from kvtier.tiers.base import Coming, Policy, Store
from kvtier.tiers.index import Index
from kvtier.tiers.tree import Branch, Node, Replica, State, Tenant, TierId

# What VRAM alone has is brought down so many chunks at a time, while room is looked for.
_MOST_LONELY = 8
# Victims passed over because the disk is still to have them, while room is looked for.
_MOST_UNSAVED = 8


class Refusal(Enum):
    """Why a chunk gets no room."""

    NO_ROOM = "no room"  # everything else is leased
    NOT_WORTH = "not worth"  # the policy values everything else higher
    QUOTA = "quota"  # its tenant holds all it may


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


@dataclass(frozen=True, slots=True)
class Tiers:
    """The tiers that there are."""

    memory: Memory
    store: Store | None = None
    vram: Vram | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration says of placement; `quota_percent` is of each tier, per tenant."""

    make_policy: Callable[[TierId], Policy[Replica]]
    quota_percent: dict[TierId, int] = field(default_factory=lambda: dict.fromkeys(TierId, 100))


@dataclass(frozen=True, slots=True)
class Claim:
    """A request for room in a tier, for chunks of one branch. It asks for all of them before the
    loop's next turn: `losers` says whose chunks may go."""

    tier: TierId
    branch: Branch
    losers: Losers


class Placement:
    """Owns the index and gives tiers their room. `on_asked` is told of requests, `on_commit` of
    chunks new in RAM, `on_hit` of held ones that are asked for, `on_lonely` of a chunk that VRAM
    would give up if another tier had it. `is_unsaved` says whether the disk is still to have a
    chunk of RAM, `passes` whether it is to have one that RAM does not keep. `make_way` gives up
    some of what nobody waits for on its way to RAM. `on_stored` is told of chunks that a client
    committed, `on_gone` of one that no tier has any more. `before_room` is called before room is
    looked for."""

    def __init__(
        self,
        tiers: Tiers,
        history: History,
        counters: Counters,
        rules: Rules,
        clock: Callable[[], float] = time.time,
    ) -> None:
        memory, vram, store = tiers.memory, tiers.vram, tiers.store
        self.memory = memory
        self.vram = vram
        self.store = store
        self.counters = counters
        self.clock = clock
        self.history = history
        capacity = {TierId.CPU: memory.arena.nbytes}
        if vram is not None:
            capacity[TierId.GPU] = vram.arena.nbytes
        if store is not None:
            capacity[TierId.DISK] = store.capacity_bytes
        self.index = Index(rules.make_policy, self._release, sorted(capacity))
        self.shares = Shares(self.index, capacity, rules.quota_percent, clock)
        self._residents: dict[Slab, list[Replica | None]] = {}  # by slot
        self.on_asked: Callable[[], None] = lambda: None
        self.on_commit: Callable[[Sequence[Node]], None] = lambda nodes: None
        self.on_hit: Callable[[Sequence[Node]], None] = lambda nodes: None
        self.on_lonely: Callable[[Node], object] = lambda node: None
        self.is_unsaved: Callable[[Replica], bool] = lambda replica: False
        self.passes: Callable[[Branch, ChunkKey, Coming], bool] = lambda *refused: False
        self.make_way: Callable[[TierId, Refusal, Tenant], bool] = lambda *refused: False
        self.before_room: Callable[[], object] = lambda: None
        self.on_stored: Callable[[Sequence[Node]], None] = lambda nodes: None
        self.on_gone: Callable[[Node, Loss], None] = lambda node, loss: None

    # ── after a commit, on a hit ──────────────────────────────────────────────────────────────────

    def committed(self, nodes: list[Node]) -> None:
        """Chunks of one prefix were committed to RAM, in prompt order."""
        if nodes:
            self.on_stored(nodes)
            self.on_commit(nodes)

    def asked(
        self, branch: Branch, path: list[Node], run: list[Node], keys: Sequence[ChunkKey]
    ) -> None:
        """A prefix is asked for, in prompt order; `run` are the chunks of it that are held, `path`
        the same from the root on."""
        self.index.ask(branch, path, keys[len(run) :], self.clock())
        self.on_asked()
        if run:
            self.on_hit(run)

    def hinted(self, path: list[Node], label: int) -> None:
        """The engine says something of held chunks that it has just used, from the root on."""
        self.index.hint(path, label, self.clock())

    def coming(self, tier: TierId, nodes: Sequence[Node]) -> list[Coming]:
        """What a tier's policy takes chunks to be that another one holds, each the parent of the
        next. What the engine said of the last one holds for all of them."""
        first = nodes[0]
        keys = [node.key for node in nodes]
        label = _label_of(nodes[-1]) if tier is not TierId.GPU else 0
        return self.index.arrival(first.branch, tier, first.parent, keys, self.clock(), label)

    # ── RAM and VRAM ──────────────────────────────────────────────────────────────────────────────

    def claim(self, tier: TierId, branch: Branch) -> Claim:
        """Ask for room in a tier, until the loop's next turn."""
        return Claim(tier, branch, self.shares.losers(tier, branch.tenant))

    def begin_in(
        self,
        claim: Claim,
        begin: Callable[[Slot], Replica],
        coming: Coming | None,
        *,
        ahead: bool = False,
    ) -> Replica | Refusal:
        """Enter a replica in a slot of an arena, making room as needed. With `coming`, only where
        it is worth more than what goes for it; `ahead`: nothing that is on its way makes way for
        it."""
        tier, tenant = claim.tier, claim.branch.tenant
        slot = self._room(claim, coming)
        while isinstance(slot, Refusal) and not ahead and self.make_way(tier, slot, tenant):
            slot = self._room(claim, coming)
        if isinstance(slot, Refusal):
            return slot
        replica = begin(slot)
        residents = self._residents.get(slot.slab)
        if residents is None:
            residents = self._residents[slot.slab] = [None] * slot.slab.slots
        residents[slot.number] = replica
        return replica

    def _arena(self, tier: TierId) -> Arena:
        if tier is TierId.CPU:
            return self.memory.arena
        assert self.vram is not None
        return self.vram.arena

    def _room(self, claim: Claim, coming: Coming | None) -> Slot | Refusal:
        self.before_room()
        arena, nbytes = self._arena(claim.tier), claim.branch.nbytes
        refusal = self._heed_quota(claim.tier, claim.branch, coming)
        if refusal is not None:
            return refusal
        slot = arena.allocate(nbytes)
        if slot is None and arena.could_fit(nbytes):
            return self._make_room(claim, coming)
        return slot if slot is not None else Refusal.NO_ROOM

    def _make_room(self, claim: Claim, coming: Coming | None) -> Slot | Refusal:
        tier, branch = claim.tier, claim.branch
        arena, slot_bytes = self._arena(tier), slot_bytes_of(branch.nbytes)
        stuck: set[tuple[Slab, bool]] = set()
        for victim in self._victims(claim):
            slab = victim.slot.slab
            unsaved = tier is TierId.GPU or self.is_unsaved(victim)
            if (slab, unsaved) in stuck:
                continue
            if not self._is_worth(coming, branch, victim):
                return Refusal.NOT_WORTH
            if slab.slot_bytes == slot_bytes:
                self.evict(victim, self._why(branch, victim))
            elif not self._empty_slab(slab, tier, unsaved=unsaved):
                stuck.add((slab, unsaved))
                continue
            slot = arena.allocate(branch.nbytes)
            if slot is not None:
                return slot
        return Refusal.NO_ROOM

    def _heed_quota(self, tier: TierId, branch: Branch, coming: Coming | None) -> Refusal | None:
        """Evict a tenant's own chunks until it may hold one more; None when it may."""
        tenant = branch.tenant
        if self.shares.within_quota(tenant, tier, branch.nbytes):
            return None
        for victim in self._victims_of(tenant, tier):
            if not self._is_worth(coming, branch, victim):
                return Refusal.QUOTA
            self.evict(victim, Why.OWN_QUOTA)
            if self.shares.within_quota(tenant, tier, branch.nbytes):
                return None
        return Refusal.QUOTA

    def _is_worth(self, coming: Coming | None, branch: Branch, victim: Replica) -> bool:
        """Whether a victim may go: worth is compared within a tenant; between tenants their shares
        decide."""
        tenant = branch.tenant
        if coming is None or victim.node.branch.tenant is not tenant:
            return True
        return tenant.policies[victim.tier].admits(coming, victim)

    def _victims(self, claim: Claim) -> Iterator[Replica]:
        """What a tier may give up for a chunk."""
        for tenant in claim.losers:
            yield from self._victims_of(tenant, claim.tier)

    def _victims_of(self, tenant: Tenant, tier: TierId) -> Iterator[Replica]:
        """What a tier may give up of a tenant's."""
        if tier is TierId.CPU:
            return self._saved_first(tenant)
        victims = self.index.victims(tenant, tier, self.clock())
        return self._doubled(victims) if tier is TierId.GPU else victims

    def _doubled(self, victims: Iterator[Replica]) -> Iterator[Replica]:
        """Of VRAM's victims those that another tier has as well; others are on their way there."""
        lonely = 0
        for victim in victims:
            if victim.node.ready_count > 1:
                yield victim
                continue
            self.on_lonely(victim.node)
            lonely += 1
            if lonely == _MOST_LONELY:
                return

    def _saved_first(self, tenant: Tenant) -> Iterator[Replica]:
        """RAM's victims; of those near the front, the ones that the disk is still to have come
        last."""
        passed = 0
        for victim in self.index.victims(tenant, TierId.CPU, self.clock()):
            if not self.is_unsaved(victim):
                yield victim
                continue
            passed += 1
            if passed == _MOST_UNSAVED:
                break
        yield from self.index.victims(tenant, TierId.CPU, self.clock())

    def _empty_slab(self, slab: Slab, tier: TierId, *, unsaved: bool) -> bool:
        """Move a slab to another layout by evicting all in it; False when something there is
        leased, or nowhere else, or, without `unsaved`, when the disk is still to have some."""
        residents = list(filter(None, self._residents[slab]))  # some may have left the tree
        doomed = _hanging_on(residents, tier)
        if any(each.pins or each.state is not State.READY for each in (*residents, *doomed)):
            return False
        if not unsaved and [each for each in doomed if self.is_unsaved(each)]:  # all are queued
            return False
        for replica in doomed:
            if not replica.evictable:
                return False  # elsewhere something hangs on it that this tier alone holds up
            if tier is TierId.GPU and replica.node.ready_count == 1:
                return False
            self.evict(replica, Why.LAYOUT)
        return True

    # ── disk ──────────────────────────────────────────────────────────────────────────────────────

    def room_on_disk(self, claim: Claim, nbytes: int, coming: Coming) -> Refusal | None:
        """Make room for one more chunk in the store beside others that were promised theirs, all
        together `nbytes`; None when there is."""
        store, branch = self.store, claim.branch
        assert store is not None
        if nbytes > store.capacity_bytes:
            return Refusal.NO_ROOM
        self.before_room()
        refusal = self._heed_quota(TierId.DISK, branch, coming)
        if refusal is not None or store.used_bytes + nbytes <= store.capacity_bytes:
            return refusal
        for victim in self._victims(claim):
            if not self._is_worth(coming, branch, victim):
                return Refusal.NOT_WORTH
            self.evict(victim, self._why(branch, victim))
            if store.used_bytes + nbytes <= store.capacity_bytes:
                return None
        return Refusal.NO_ROOM

    # ── giving up ─────────────────────────────────────────────────────────────────────────────────

    def evict(self, replica: Replica, why: Why = Why.ROOM) -> None:
        """Drop one evictable replica because its tier needs the room."""
        node, tier = replica.node, replica.tier
        self.index.drop(replica)
        self.counters.add_evicted(tier.name.lower())
        if not node.held:
            self._gone(node, Loss(why, tier))

    def refused(self, branch: Branch, key: ChunkKey, why: Why) -> None:
        """Note that a chunk was offered and not taken."""
        self.history.note(branch.digest, key, Loss(why, TierId.CPU), self.clock())

    def lose(self, node: Node, why: Why, *, continued: bool = False) -> int:
        """Remove a chunk and all that continues it; returns how many chunks went. `continued`: it
        goes itself because of one before it."""
        dropped = self.index.drop_subtree(node)
        for member in dropped:
            self._gone(member, Loss(why, continued=continued or member is not node))
        return len(dropped)

    def lose_vram(self) -> int:
        """VRAM cannot be read any more: drop all that it has. With a chunk that it alone had, all
        that continues that goes; returns how many chunks went."""
        index = self.index
        branches = [index.branch(space) for space in index.spaces]
        nodes = [node for branch in branches for node in branch.nodes if node.in_gpu]
        gone = 0
        for node in nodes:
            replica = node.ready(TierId.GPU)
            if replica is None:  # it was still coming, or went with one before it
                continue
            if node.ready_count > 1:
                index.withdraw(replica)
            else:
                gone += self.lose(node, Why.VANISHED)
        return gone

    def _gone(self, node: Node, loss: Loss) -> None:
        self.history.note(node.branch.digest, node.key, loss, self.clock())
        self.on_gone(node, loss)

    def _why(self, branch: Branch, victim: Replica) -> Why:
        """Why a chunk goes for one of a branch."""
        return Why.ROOM if victim.node.branch.tenant is branch.tenant else Why.SHARE

    def _release(self, replica: Replica) -> None:
        if replica.tier is not TierId.DISK:
            slot = replica.slot
            self._residents[slot.slab][slot.number] = None
            self._arena(replica.tier).free(slot)
            if not slot.slab.used:
                del self._residents[slot.slab]
        elif replica.place is not None:
            assert self.store is not None
            self.store.delete(replica.record)


def _label_of(node: Node) -> int:
    """What the fastest tier below VRAM knows that an engine said of a chunk."""
    for tier in (TierId.CPU, TierId.DISK):
        replica = node.ready(tier)
        if replica is not None:
            return node.branch.tenant.policies[tier].label(replica)
    return 0


def _hanging_on(residents: Sequence[Replica], tier: TierId) -> list[Replica]:
    """These and all that continues them in their tier, children before their parents."""
    found: dict[Node, None] = {}
    for resident in residents:
        below = [resident.node] if resident.node not in found else []
        for node in below:
            below += [child for child in node.children() if child not in found]
        found |= dict.fromkeys(reversed(below))
    return [replica for node in found if (replica := node.replica(tier)) is not None]
