"""Who holds what: the tree of chunks, their replicas in the tiers, and what may be given up.

Pure and synchronous: no I/O, no locks, no clock. It is touched by the event loop's thread alone.

A chunk is *held* when a tier has a READY replica of it. The tree keeps two promises:

- a held chunk's ancestors are held: eviction takes leaves, and what removes an inner chunk removes
  everything under it;
- a replica is released to its tier exactly once, when it has left the tree and nobody has it
  pinned: removing a pinned replica detaches it, and the last unpin releases it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from kvtier.chunks import ChunkKey
from kvtier.spaces import Space
from kvtier.tiers.arena import Slot
from kvtier.tiers.base import Policy, Record


class TierId(IntEnum):
    """The tiers, fastest first; the value is the position in `Node.replicas`."""

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
    """One tier's copy of a chunk. `place` is a Slot in an arena, a Record in a store, or None while
    a store has not said yet."""

    node: "Node"
    tier: TierId
    place: Slot | Record | None
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


class Branch:
    """One space's tree: its chunks by key."""

    __slots__ = ("digest", "nodes", "space")

    def __init__(self, space: Space) -> None:
        self.space = space
        self.digest = ChunkKey(space.digest)  # the parent of every prompt's first chunk
        self.nodes: dict[ChunkKey, Node] = {}


class Node:
    """One chunk in the tree. Siblings form a linked list, so that any child leaves in O(1)."""

    __slots__ = (
        "branch", "children_in", "created_s", "first_child", "key", "next", "parent", "previous",
        "ready_count", "replicas",
    )  # fmt: skip

    def __init__(
        self, branch: Branch, key: ChunkKey, parent: "Node | None", created_s: float
    ) -> None:
        self.branch = branch
        self.key = key
        self.parent = parent
        self.created_s = created_s
        self.replicas: list[Replica | None] = [None] * len(TierId)
        self.ready_count = 0  # tiers with a READY replica
        self.children_in = [0] * len(TierId)  # children with a replica in each tier
        self.first_child: Node | None = None
        self.next: Node | None = None
        self.previous: Node | None = None

    def ready(self, tier: TierId) -> Replica | None:
        """The readable replica in a tier."""
        replica = self.replicas[tier]
        return replica if replica is not None and replica.state is State.READY else None

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


class Index:
    """The chunks of all spaces. `release` gets each replica that its tier may reuse."""

    def __init__(
        self, policies: Mapping[TierId, Policy[Node]], release: Callable[[Replica], None]
    ) -> None:
        self._policies = policies
        self._release = release
        self._branches: dict[bytes, Branch] = {}
        self.chunks = [0] * len(TierId)  # READY replicas per tier

    # ── spaces ────────────────────────────────────────────────────────────────────────────────────

    @property
    def spaces(self) -> list[Space]:
        return [branch.space for branch in self._branches.values()]

    def branch(self, space: Space) -> Branch:
        """The space's tree, made when it is new."""
        digest = ChunkKey(space.digest)
        branch = self._branches.get(digest)
        if branch is None:
            branch = self._branches[digest] = Branch(space)
        return branch

    def known(self, digest: bytes) -> Branch | None:
        return self._branches.get(digest)

    def forget_if_empty(self, branch: Branch) -> bool:
        """Drop a space that holds nothing; False when it holds something."""
        if branch.nodes:
            return False
        self._branches.pop(branch.digest, None)
        return True

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    def match(
        self, branch: Branch, keys: Sequence[ChunkKey], newer_than_s: float = 0.0
    ) -> list[Node]:
        """The longest leading run of held chunks created after the given time."""
        run = []
        nodes = branch.nodes
        for key in keys:
            node = nodes.get(key)
            if node is None or not node.ready_count or node.created_s < newer_than_s:
                break
            run.append(node)
        return run

    def leading(self, run: Sequence[Node], tiers: Sequence[TierId]) -> int:
        """How many leading chunks of a run these tiers can serve."""
        count = 0
        for node in run:
            if not any(node.ready(tier) for tier in tiers):
                break
            count += 1
        return count

    def touch(self, run: Sequence[Node]) -> None:
        """Note the use of a run of chunks, last one first: a parent is never older than its child,
        so that an order by recency gives up leaves first."""
        for node in reversed(run):
            for tier, policy in self._policies.items():
                if node.ready(tier):
                    policy.touched(node)

    def pin(self, replica: Replica) -> None:
        """Keep a replica's bytes where they are until the matching `unpin`."""
        replica.pins += 1

    def unpin(self, replica: Replica) -> None:
        replica.pins -= 1
        if replica.pins == 0 and replica.state is State.DETACHED:
            self._release(replica)

    # ── writing ───────────────────────────────────────────────────────────────────────────────────

    def begin(
        self,
        branch: Branch,
        key: ChunkKey,
        parent: ChunkKey,
        created_s: float,
        tier: TierId,
        place: Slot | Record | None,
    ) -> Replica:
        """Enter a replica about to be written. The parent is in the tree, or is the root."""
        node = branch.nodes.get(key)
        if node is None:
            node = Node(branch, key, branch.nodes.get(parent), created_s)
            assert node.parent is not None or parent == branch.digest, "parent is not in the tree"
            branch.nodes[key] = node
            self._link(node)
        elif not any(node.replicas):
            node.created_s = created_s  # it was only the place of a lost parent
        return self.begin_copy(node, tier, place)

    def begin_copy(self, node: Node, tier: TierId, place: Slot | Record | None) -> Replica:
        """Enter a replica, about to be written, of a chunk that another tier holds."""
        assert node.replicas[tier] is None, f"{tier.name} already has this chunk"
        replica = Replica(node, tier, place)
        node.replicas[tier] = replica
        if node.parent is not None:
            node.parent.children_in[tier] += 1
        return replica

    def commit(self, replica: Replica) -> bool:
        """Make a written replica readable; False (nothing changed) when its parent is not held."""
        node = replica.node
        assert replica.state is State.WRITING, f"commit of a {replica.state.name} replica"
        if node.parent is not None and not node.parent.held:
            return False
        replica.state = State.READY
        self.chunks[replica.tier] += 1
        node.ready_count += 1
        self._policies[replica.tier].added(node)
        return True

    def abort(self, replica: Replica) -> None:
        """Take back a replica that was begun and not committed."""
        assert replica.state is State.WRITING, f"abort of a {replica.state.name} replica"
        self._detach(replica)

    # ── giving up ─────────────────────────────────────────────────────────────────────────────────

    def victims(self, tier: TierId) -> Iterator[Replica]:
        """Replicas that may be dropped now, in the policy's order; the caller may do so."""
        for node in self._policies[tier].victims():
            replica = node.ready(tier)
            if replica is not None and self.is_evictable(replica):
                yield replica

    def is_evictable(self, replica: Replica) -> bool:
        """Whether dropping it breaks no lease and leaves every held chunk's ancestors held."""
        node = replica.node
        if replica.state is not State.READY or replica.pins or node.children_in[replica.tier]:
            return False
        return node.ready_count > 1 or node.first_child is None

    def drop(self, replica: Replica) -> None:
        """Remove an evictable replica."""
        assert self.is_evictable(replica), "this replica is leased, or others depend on it"
        self._detach(replica)

    def drop_subtree(self, node: Node) -> list[Node]:
        """Remove every READY replica of a chunk and of all under it; returns the chunks concerned.

        Pinned bytes stay until their last unpin. Replicas still being written lose their parent, so
        their commit is refused.
        """
        dropped = []
        for member in reversed(node.subtree()):
            ready = [replica for tier in TierId if (replica := member.ready(tier))]
            for replica in ready:
                self._detach(replica)
            if ready:
                dropped.append(member)
        return dropped

    def _detach(self, replica: Replica) -> None:
        node = replica.node
        if replica.state is State.READY:
            self._policies[replica.tier].removed(node)
            self.chunks[replica.tier] -= 1
            node.ready_count -= 1
        replica.state = State.DETACHED
        node.replicas[replica.tier] = None
        if node.parent is not None:
            node.parent.children_in[replica.tier] -= 1
        self._prune(node)
        if replica.pins == 0:
            self._release(replica)

    def _prune(self, node: Node) -> None:
        current: Node | None = node
        while current is not None and current.first_child is None and not any(current.replicas):
            if current.branch.nodes.get(current.key) is not current:
                return
            del current.branch.nodes[current.key]
            self._unlink(current)
            current = current.parent

    # ── the tree ──────────────────────────────────────────────────────────────────────────────────

    def _link(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            return
        node.next = parent.first_child
        if node.next is not None:
            node.next.previous = node
        parent.first_child = node

    def _unlink(self, node: Node) -> None:
        if node.parent is None:
            return
        if node.previous is None:
            node.parent.first_child = node.next
        else:
            node.previous.next = node.next
        if node.next is not None:
            node.next.previous = node.previous
        node.next = node.previous = None

    def check(self) -> None:
        """Assert every invariant of the tree; for tests."""
        for branch in self._branches.values():
            for key, node in branch.nodes.items():
                _check_node(branch, key, node)
        for tier in TierId:
            ready = [
                node
                for branch in self._branches.values()
                for node in branch.nodes.values()
                if node.ready(tier)
            ]
            assert len(ready) == self.chunks[tier]
            assert set(ready) == set(self._policies[tier].victims())


def _check_node(branch: Branch, key: ChunkKey, node: Node) -> None:
    assert node.key == key
    assert node.branch is branch
    assert any(node.replicas) or node.first_child is not None, "an empty leaf stayed"
    assert node.ready_count == sum(1 for tier in TierId if node.ready(tier))
    children = list(node.children())
    for tier in TierId:
        assert node.children_in[tier] == sum(1 for child in children if child.replicas[tier])
        replica = node.replicas[tier]
        assert replica is None or (replica.pins >= 0 and replica.state is not State.DETACHED)
    for child in children:
        assert child.parent is node
        assert branch.nodes[child.key] is child
    if node.held and node.parent is not None:
        assert node.parent.held, "a held chunk's parent is not held"
