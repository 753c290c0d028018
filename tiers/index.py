"""Who holds what: the tree of chunks, their replicas in the tiers, and what may be given up.

Pure and synchronous: no I/O, no locks, no clock. It is touched by the event loop's thread alone.

A chunk is *held* when a tier has a READY replica of it. The tree keeps two promises:

- a held chunk's ancestors are held: eviction takes leaves, and what removes an inner chunk removes
  everything under it;
- a replica is released to its tier exactly once, when it has left the tree and nobody has it
  pinned: removing a pinned replica detaches it, and the last unpin releases it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvtier.chunks import ChunkKey
from kvtier.spaces import Space
from kvtier.tiers.arena import Slot
from kvtier.tiers.base import Coming, Policy, Record
from kvtier.tiers.tree import (
    Branch,
    Node,
    Replica,
    State,
    Tenant,
    TierId,
    leading_replicas,
)


class Index:
    """The chunks of all spaces, in the tiers that there are. `make_policy` makes a tenant's policy
    for a tier; `release` gets each replica that its tier may reuse; `on_detached` is told of one
    that has left the tree while it was pinned, `on_gone` of a chunk that lost a replica and that no
    tier holds now."""

    def __init__(
        self,
        make_policy: Callable[[TierId], Policy[Replica]],
        release: Callable[[Replica], None],
        tiers: Sequence[TierId] = tuple(TierId),
    ) -> None:
        self._make_policy = make_policy
        self._release = release
        self._tiers = tiers
        self.on_detached: Callable[[Replica], None] = lambda replica: None
        self.on_gone: Callable[[Node], None] = lambda node: None
        self._branches: dict[bytes, Branch] = {}
        self._tenants: dict[str, Tenant] = {}
        self.chunks = [0] * len(TierId)  # READY replicas per tier

    # ── spaces ────────────────────────────────────────────────────────────────────────────────────

    @property
    def spaces(self) -> list[Space]:
        return [branch.space for branch in self._branches.values()]

    @property
    def tenants(self) -> list[Tenant]:
        """Everyone who has a space."""
        return list(self._tenants.values())

    def branch(self, space: Space) -> Branch:
        """The space's tree, made when it is new."""
        digest = ChunkKey(space.digest)
        branch = self._branches.get(digest)
        if branch is None:
            tenant = self._tenants.get(space.tenant)
            if tenant is None:
                policies = tuple(self._make_policy(tier) for tier in TierId)
                tenant = self._tenants[space.tenant] = Tenant(space.tenant, policies)
            tenant.branches += 1
            branch = self._branches[digest] = Branch(space, tenant)
        return branch

    def known(self, digest: bytes) -> Branch | None:
        return self._branches.get(digest)

    def forget_if_empty(self, branch: Branch) -> bool:
        """Drop a space that holds nothing; False when it holds something."""
        if branch.nodes:
            return False
        if self._branches.pop(branch.digest, None) is not None:
            branch.tenant.branches -= 1
            if not branch.tenant.branches:
                del self._tenants[branch.tenant.name]
                for policy in branch.tenant.policies:
                    policy.closed()
        return True

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    def match(
        self, branch: Branch, keys: Sequence[ChunkKey], newer_than_s: float = 0.0
    ) -> list[Node]:
        """The longest leading run of held chunks created after the given time."""
        run: list[Node] = []
        parts = branch.nodes.parts
        below: Any = None
        for key in keys:
            if below is not None and below.key == key:  # an only child: no need to search
                node: Node | None = below
            else:
                node = parts[key[0]].get(key)
            if node is None or not node.ready_in:
                break
            if newer_than_s and node.created_s < newer_than_s:
                break
            run.append(node)
            below = node.below
        return run

    def leading(self, run: Sequence[Node], tiers: Sequence[TierId]) -> int:
        """How many leading chunks of a run these tiers can serve."""
        bits = sum(tier.bit for tier in tiers)
        count = 0
        for node in run:
            if not node.ready_in & bits:
                break
            count += 1
        return count

    def ask(
        self, branch: Branch, run: Sequence[Node], beyond: Sequence[ChunkKey], now_s: float
    ) -> None:
        """Tell the policies of a request for a prefix: `run` are its leading chunks that are held,
        from the root on, `beyond` the keys after them."""
        branch.tenant.asked_s = now_s
        for tier in self._tiers:
            path = leading_replicas(run, tier)
            missing = [*(node.key for node in run[len(path) :]), *beyond]
            branch.tenant.policies[tier].asked(path, missing, now_s)

    def hint(self, run: Sequence[Node], label: int, now_s: float) -> None:
        """Tell the policies what the engine says of held chunks that it has just used, from the
        root on. VRAM's copies follow what is asked for there, and nothing else."""
        for tier in self._tiers:
            path = leading_replicas(run, tier)
            if path and tier is not TierId.GPU:
                path[0].node.branch.tenant.policies[tier].hinted(path, label, now_s)

    def pin(self, replica: Replica) -> None:
        """Keep a replica's bytes where they are until the matching `unpin`."""
        replica.pins += 1

    def unpin(self, replica: Replica) -> None:
        replica.pins -= 1
        if replica.pins == 0 and replica.state is State.DETACHED:
            self._give_back(replica)

    # ── writing ───────────────────────────────────────────────────────────────────────────────────

    def arrival(
        self,
        branch: Branch,
        tier: TierId,
        parent: Node | None,
        keys: Sequence[ChunkKey],
        now_s: float,
        label: int = 0,
    ) -> list[Coming]:
        """What the tier's policy takes chunks to be that are about to be begun below a parent."""
        above = parent.ready(tier) if parent is not None else None
        arrival = branch.tenant.policies[tier].arrival(above, keys, now_s, label)
        return [Coming(arrival, place) for place in range(len(keys))]

    def enter(self, branch: Branch, key: ChunkKey, parent: ChunkKey, created_s: float) -> Node:
        """The place in the tree of a chunk about to be begun that no tier holds. The parent is in
        the tree, or is the root."""
        node = branch.nodes.get(key)
        if node is None:
            node = Node(branch, key, branch.nodes.get(parent), created_s)
            assert node.parent is not None or parent == branch.digest, "parent is not in the tree"
            branch.nodes.add(node)
            node.link()
        elif not any(node.replicas):
            node.created_s = created_s  # it was only the place of a lost parent
        return node

    def begin(
        self, node: Node, tier: TierId, place: Slot | Record | None, coming: Coming
    ) -> Replica:
        """Begin a replica: it is about to be written."""
        assert node.replica(tier) is None, f"{tier.name} already has this chunk"
        replica = Replica(node, tier, place, coming)
        node.set_replica(tier, replica)
        node.branch.tenant.used_bytes[tier] += node.branch.nbytes
        return replica

    def commit(self, replica: Replica) -> bool:
        """Make a written replica readable; False (nothing changed) when its parent is not held."""
        node = replica.node
        assert replica.state is State.WRITING, f"commit of a {replica.state.name} replica"
        if node.parent is not None and not node.parent.held:
            return False
        coming, replica.mark = replica.mark, None
        self._make_ready(replica)
        node.branch.tenant.policies[replica.tier].added(replica, coming)
        return True

    def revive(self, node: Node, tier: TierId, place: Slot | Record) -> Replica:
        """Enter a replica that a tier kept over a restart; its parent is held. It is readable, but
        no policy knows it before `rank`."""
        replica = self.begin(node, tier, place, Coming(None, 0))
        replica.mark = None
        self._make_ready(replica)
        return replica

    def rank(self, run: Sequence[Replica], now_s: float) -> None:
        """Enter revived replicas, in prompt order of one prefix, in their policy's order: they
        were used last at that time. What was used first comes first."""
        tenant, tier = run[0].node.branch.tenant, run[0].tier
        policy = tenant.policies[tier]
        arrival = policy.arrival(None, [replica.key for replica in run], now_s)
        for place, replica in enumerate(run):
            policy.added(replica, Coming(arrival, place))

    def _make_ready(self, replica: Replica) -> None:
        replica.state = State.READY
        self.chunks[replica.tier] += 1
        replica.node.ready_in |= replica.tier.bit

    def abort(self, replica: Replica) -> None:
        """Take back a replica that was begun and not committed."""
        assert replica.state is State.WRITING, f"abort of a {replica.state.name} replica"
        self._detach(replica, evicted=False)

    # ── giving up ─────────────────────────────────────────────────────────────────────────────────

    def victims(self, tenant: Tenant, tier: TierId, now_s: float) -> Iterator[Replica]:
        """A tenant's replicas that may be dropped now, in the policy's order; the caller may do
        so."""
        for replica in tenant.policies[tier].victims(now_s):
            if replica.evictable:
                yield replica

    def drop(self, replica: Replica) -> None:
        """Remove an evictable replica, for the room it takes."""
        assert replica.evictable, "this replica is leased, or others depend on it"
        self._detach(replica, evicted=True)

    def withdraw(self, replica: Replica) -> None:
        """Remove a READY replica of a chunk that another tier holds as well, because its tier is
        lost. Pinned bytes stay until their last unpin."""
        assert replica.state is State.READY
        assert replica.node.ready_count > 1, "no other tier holds the chunk"
        self._detach(replica, evicted=False)

    def drop_subtree(self, node: Node) -> list[Node]:
        """Remove every READY replica of a chunk and of all under it; returns the chunks concerned.

        Pinned bytes stay until their last unpin. Replicas still being written lose their parent, so
        their commit is refused.
        """
        dropped = []
        for member in reversed(node.subtree()):
            ready = [replica for tier in TierId if (replica := member.ready(tier))]
            for replica in ready:
                self._detach(replica, evicted=False)
            if ready:
                dropped.append(member)
        return dropped

    def _detach(self, replica: Replica, *, evicted: bool) -> None:
        node, tier = replica.node, replica.tier
        if replica.state is State.READY:
            node.branch.tenant.policies[tier].removed(replica, evicted=evicted)
            self.chunks[tier] -= 1
            node.ready_in &= ~tier.bit
        replica.state = State.DETACHED
        replica.mark = None
        node.set_replica(tier, None)
        if not node.held:
            self.on_gone(node)
        self._prune(node)
        if replica.pins == 0:
            self._give_back(replica)
        else:
            self.on_detached(replica)

    def _give_back(self, replica: Replica) -> None:
        branch = replica.node.branch
        branch.tenant.used_bytes[replica.tier] -= branch.nbytes
        self._release(replica)

    def _prune(self, node: Node) -> None:
        current: Node | None = node
        while current is not None and current.below is None and not any(current.replicas):
            if not current.branch.nodes.discard(current):
                return
            current.unlink()
            current = current.parent

    def check(self) -> None:
        """Assert every invariant of the tree; for tests."""
        for branch in self._branches.values():
            for node in branch.nodes:
                _check_node(branch, node)
        for tier in TierId:
            ready = [
                replica
                for branch in self._branches.values()
                for node in branch.nodes
                if (replica := node.ready(tier))
            ]
            assert len(ready) == self.chunks[tier]
            offered = [v for tenant in self.tenants for v in self.victims(tenant, tier, 0.0)]
            assert len(offered) == len(set(offered)), "a victim is offered twice"
            assert {replica for replica in ready if replica.evictable} == {*offered}


def _check_node(branch: Branch, node: Node) -> None:
    assert branch.nodes[node.key] is node
    assert node.branch is branch
    assert any(node.replicas) or node.below is not None, "an empty leaf stayed"
    for tier in TierId:
        found = node.replica(tier)
        is_ready = found is not None and found.state is State.READY
        assert bool(node.ready_in & tier.bit) == is_ready
    children = node.children()
    assert len(children) != 1 or node.below is children[0]
    for tier in TierId:
        assert node.children_in(tier) == sum(1 for child in children if child.replica(tier))
        replica = node.replica(tier)
        assert replica is None or (replica.pins >= 0 and replica.state is not State.DETACHED)
    for child in children:
        assert child.parent is node
        assert branch.nodes[child.key] is child
    if node.held and node.parent is not None:
        assert node.parent.held, "a held chunk's parent is not held"
