"""What the index is made of: chunks in a tree, their replicas in the tiers, and whose they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

from kvtier.chunks import ChunkKey
from kvtier.spaces import Space
from kvtier.tiers.arena import Slot
from kvtier.tiers.base import Policy, Record


class TierId(IntEnum):
    """The tiers, fastest first."""

    GPU = 0
    CPU = 1
    DISK = 2


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
        node = self.node
        if self.state is not State.READY or self.pins or node.children_in(self.tier):
            return False
        return node.ready_count > 1 or node.first_child is None


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
        self.nodes: dict[ChunkKey, Node] = {}


# By TierId. Single slots, not lists: there are millions of nodes.
_REPLICA = ("in_gpu", "in_cpu", "in_disk")
_CHILDREN = ("gpu_children", "cpu_children", "disk_children")


class Node:
    """One chunk in the tree. Siblings form a linked list, so that any child leaves in O(1)."""

    __slots__ = (
        "branch", "cpu_children", "created_s", "disk_children", "first_child", "gpu_children",
        "in_cpu", "in_disk", "in_gpu", "key", "next", "parent", "previous", "ready_count",
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
        self.ready_count = 0  # tiers with a READY replica
        self.gpu_children = 0  # children with a replica there
        self.cpu_children = 0
        self.disk_children = 0
        self.first_child: Node | None = None
        self.next: Node | None = None
        self.previous: Node | None = None

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
        replica: Replica | None = getattr(self, _REPLICA[tier])
        return replica if replica is not None and replica.state is State.READY else None

    def children_in(self, tier: TierId) -> int:
        """How many of its children have a replica in a tier."""
        count: int = getattr(self, _CHILDREN[tier])
        return count

    def set_replica(self, tier: TierId, replica: Replica | None) -> None:
        """For the index alone: enter or remove a replica, and count it with the parent."""
        setattr(self, _REPLICA[tier], replica)
        if self.parent is not None:
            name = _CHILDREN[tier]
            change = 1 if replica is not None else -1
            setattr(self.parent, name, getattr(self.parent, name) + change)

    @property
    def parent_key(self) -> ChunkKey:
        return self.parent.key if self.parent is not None else self.branch.digest

    @property
    def held(self) -> bool:
        """Whether any tier can serve this chunk."""
        return self.ready_count > 0

    def path(self) -> list["Node"]:
        """From the first chunk of the prompt to this one."""
        found: list[Node] = [self]
        while (parent := found[-1].parent) is not None:
            found.append(parent)
        found.reverse()
        return found

    def children(self) -> Iterator["Node"]:
        child = self.first_child
        while child is not None:
            following = child.next
            yield child
            child = following

    def subtree(self) -> list["Node"]:
        """This chunk and everything under it, children after their parents."""
        found: list[Node] = [self]
        for node in found:
            found.extend(node.children())
        return found


def leading_replicas(run: Sequence[Node], tier: TierId) -> list[Replica]:
    """A tier's readable replicas of the leading chunks that it has, as far as each continues the
    one before it: what a client names need not."""
    path: list[Replica] = []
    slot, ready = _REPLICA[tier], State.READY
    last: Node | None = None
    for node in run:  # on the way of every request
        replica: Replica | None = getattr(node, slot)
        if replica is None or replica.state is not ready or node.parent is not last:
            break
        path.append(replica)
        last = node
    return path
