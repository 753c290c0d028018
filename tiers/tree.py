"""What the index is made of: chunks in a tree, their replicas in the tiers, and whose they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from operator import attrgetter
from typing import Any, overload

from kvtier.chunks import ChunkKey
from kvtier.spaces import Space
from kvtier.tiers.arena import Slot
from kvtier.tiers.base import Policy, Record
from kvtier.tiers.key_table import KeyTable


class TierId(IntEnum):
    """The tiers, fastest first."""

    GPU = 0
    CPU = 1
    DISK = 2

    @property
    def bit(self) -> int:
        """Itself in a set of tiers, as an integer."""
        return 1 << self


class State(Enum):
    """What a replica is; only a READY one is ever readable."""

    WRITING = 0
    READY = 1
    DETACHED = 2  # left the tree; its bytes stay until the last pin goes


@dataclass(slots=True, eq=False)
class Replica:
    """One tier's copy of a chunk, and an `Entry` of that tier's policy. `place` is a Slot in an
    arena, a Record in a store, or None while a store has not said yet. `mark` is the policy's while
    it is READY, and before that what the policy takes it to be."""

    node: "Node"
    tier: TierId
    place: Slot | Record | None
    mark: Any
    state: State = State.WRITING
    pins: int = 0

    @property
    def slot(self) -> Slot:
        """The slot of a replica in an arena."""
        assert isinstance(self.place, Slot), f"{self.tier.name} replica has no slot"
        return self.place

    @property
    def record(self) -> Record:
        """The record of a replica in a store."""
        assert isinstance(self.place, Record), f"{self.tier.name} replica has no record"
        return self.place

    @property
    def key(self) -> ChunkKey:
        return self.node.key

    @property
    def above(self) -> "Replica | None":
        """The readable replica, in the same tier, of the chunk before this one."""
        parent = self.node.parent
        return parent.ready(self.tier) if parent is not None else None

    @property
    def evictable(self) -> bool:
        """Whether dropping it breaks no lease and leaves every held chunk's ancestors held."""
        if self.state is not State.READY or self.pins:
            return False
        node = self.node
        if node.below is None:
            return True
        return node.ready_count > 1 and not node.children_in(self.tier)


@dataclass(slots=True, eq=False)
class Tenant:
    """Whose chunks they are: what each tier holds of them, and in which order it gives them up."""

    name: str
    policies: tuple[Policy[Replica], ...]  # by TierId
    used_bytes: list[int] = field(default_factory=lambda: [0] * len(TierId))  # pinned ones included
    branches: int = 0
    asked_s: float = 0.0  # when it asked for anything last


class Branch:
    """One space's tree: its chunks by key. `nbytes` are those of one chunk."""

    __slots__ = ("__weakref__", "digest", "nbytes", "nodes", "space", "tenant")

    def __init__(self, space: Space, tenant: Tenant) -> None:
        self.space = space
        self.tenant = tenant
        self.nbytes = space.layout.nbytes
        self.digest = ChunkKey(space.digest)  # the parent of every prompt's first chunk
        self.nodes: KeyTable[Node] = KeyTable()


_REPLICA = ("in_gpu", "in_cpu", "in_disk")  # by TierId


class Fork:
    """The children of a chunk that has several. `in_tier` counts, by TierId, those with a replica
    there."""

    __slots__ = ("children", "in_tier")
    key = None  # it is no chunk

    def __init__(self, children: Sequence["Node"]) -> None:
        self.children = dict.fromkeys(children)  # in the order in which they came
        self.in_tier = [
            sum(map(bool, tier)) for tier in zip(*(c.replicas for c in children), strict=True)
        ]


class Node:
    """One chunk in the tree. There are millions, and nearly all have one child or none: `below` is
    that child, or a Fork."""

    __slots__ = (
        "below", "branch", "created_s", "in_cpu", "in_disk", "in_gpu", "key", "parent",
        "ready_in",
    )  # fmt: skip

    def __init__(
        self, branch: Branch, key: ChunkKey, parent: "Node | None", created_s: float
    ) -> None:
        self.branch = branch
        self.key = key
        self.parent = parent
        self.created_s = created_s
        self.in_gpu: Replica | None = None
        self.in_cpu: Replica | None = None
        self.in_disk: Replica | None = None
        self.ready_in = 0  # bits of the tiers with a READY replica
        self.below: Node | Fork | None = None

    @property
    def replicas(self) -> tuple[Replica | None, Replica | None, Replica | None]:
        """By TierId."""
        return self.in_gpu, self.in_cpu, self.in_disk

    def replica(self, tier: TierId) -> Replica | None:
        """The tier's replica, readable or not."""
        found: Replica | None = getattr(self, _REPLICA[tier])
        return found

    def ready(self, tier: TierId) -> Replica | None:
        """The readable replica in a tier."""
        return self.replica(tier) if self.ready_in & tier.bit else None

    def children_in(self, tier: TierId) -> int:
        """How many of its children have a replica in a tier."""
        below = self.below
        if below is None:
            return 0
        if isinstance(below, Fork):
            return below.in_tier[tier]
        return 0 if below.replica(tier) is None else 1

    def set_replica(self, tier: TierId, replica: Replica | None) -> None:
        """For the index alone: enter or remove a replica."""
        setattr(self, _REPLICA[tier], replica)
        if self.parent is not None and isinstance(self.parent.below, Fork):
            self.parent.below.in_tier[tier] += 1 if replica is not None else -1

    def link(self) -> None:
        """For the index alone: be one of its parent's children. It has no replicas yet."""
        parent = self.parent
        if parent is None:
            return
        below = parent.below
        if below is None:
            parent.below = self
        elif isinstance(below, Fork):
            below.children[self] = None
        else:
            parent.below = Fork([below, self])

    def unlink(self) -> None:
        """For the index alone: leave its parent's children. It has no replicas any more."""
        parent = self.parent
        if parent is None:
            return
        below = parent.below
        if isinstance(below, Fork):
            del below.children[self]
            if len(below.children) == 1:
                [parent.below] = below.children
        else:
            parent.below = None

    @property
    def parent_key(self) -> ChunkKey:
        return self.parent.key if self.parent is not None else self.branch.digest

    @property
    def held(self) -> bool:
        """Whether any tier can serve this chunk."""
        return self.ready_in > 0

    @property
    def ready_count(self) -> int:
        """How many tiers can serve this chunk."""
        return self.ready_in.bit_count()

    def path(self) -> list["Node"]:
        """From the first chunk of the prompt to this one."""
        found: list[Node] = [self]
        while (parent := found[-1].parent) is not None:
            found.append(parent)
        found.reverse()
        return found

    def children(self) -> list["Node"]:
        below = self.below
        if below is None:
            return []
        return list(below.children) if isinstance(below, Fork) else [below]

    def subtree(self) -> list["Node"]:
        """This chunk and everything under it, children after their parents."""
        found: list[Node] = [self]
        for node in found:
            found.extend(node.children())
        return found


class Path(Sequence[Replica]):
    """A tier's replicas of a path's chunks. A replica is looked up when it is asked for: of the
    many that a request names, a policy looks at few."""

    __slots__ = ("_nodes", "_slot")

    def __init__(self, nodes: Sequence[Node], tier: TierId) -> None:
        self._nodes = nodes
        self._slot = attrgetter(_REPLICA[tier])

    def __len__(self) -> int:
        return len(self._nodes)

    @overload
    def __getitem__(self, place: int) -> Replica: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Replica]: ...
    def __getitem__(self, place: int | slice) -> Replica | Sequence[Replica]:
        if isinstance(place, slice):
            return list(map(self._slot, self._nodes[place]))
        found: Replica = self._slot(self._nodes[place])
        return found


def leading_replicas(run: Sequence[Node], tier: TierId) -> Path:
    """A tier's readable replicas of the leading chunks that it has, as far as each continues the
    one before it: what a client names need not."""
    bit = tier.bit
    count = 0
    last: Node | None = None
    for node in run:  # on the way of every request
        if not node.ready_in & bit or node.parent is not last:
            break
        count += 1
        last = node
    return Path(run[:count], tier)
