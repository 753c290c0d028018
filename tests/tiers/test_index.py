"""The index as a state machine against a plain model, and its rules one by one."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.chunks import ChunkKey
from kvtier.spaces import Layout, Space
from kvtier.tiers.index import Index
from kvtier.tiers.policies.lru import Lru
from kvtier.tiers.tree import Branch, Node, Replica, State, TierId

SPACE = Space("m", Layout("int8", 1, 1, 1, tokens=1, planes=1))
CPU, DISK = TierId.CPU, TierId.DISK


@dataclass
class Tree:
    """An index over places that are only numbers."""

    released: list[Replica] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.index = Index(lambda tier: Lru[Replica](), self.released.append)
        self.branch: Branch = self.index.branch(SPACE)

    def key(self, name: str) -> ChunkKey:
        return ChunkKey(name.encode().ljust(32, b"."))

    def begin(self, name: str, parent: str | None = None, tier: TierId = CPU) -> Replica:
        above = self.branch.digest if parent is None else self.key(parent)
        node = self.index.enter(self.branch, self.key(name), above, 1.0)
        return self.copy(node, tier)

    def copy(self, node: Node, tier: TierId) -> Replica:
        [coming] = self.index.arrival(self.branch, tier, node.parent, [node.key], 1.0)
        return self.index.begin(node, tier, None, coming)

    def add(self, name: str, parent: str | None = None, tier: TierId = CPU) -> Replica:
        replica = self.begin(name, parent, tier)
        assert self.index.commit(replica)
        return replica

    def victims(self, tier: TierId = CPU) -> list[Replica]:
        return list(self.index.victims(self.branch.tenant, tier, 1.0))

    def run(self, *names: str) -> list[bytes]:
        keys = [self.key(name) for name in names]
        return [node.key.rstrip(b".") for node in self.index.match(self.branch, keys)]


def test_only_committed_chunks_are_readable() -> None:
    tree = Tree()
    replica = tree.begin("a")
    assert tree.run("a") == []
    assert tree.index.commit(replica)
    assert tree.run("a", "b") == [b"a"]


def test_a_child_cannot_be_committed_before_its_parent() -> None:
    tree = Tree()
    parent, child = tree.begin("a"), tree.begin("b", "a")
    assert not tree.index.commit(child)
    assert child.state is State.WRITING
    assert tree.index.commit(parent)
    assert tree.index.commit(child)


def test_an_aborted_parent_leaves_no_trace_once_its_child_is_gone() -> None:
    tree = Tree()
    parent, child = tree.begin("a"), tree.begin("b", "a")
    tree.index.abort(parent)
    assert not tree.index.commit(child)
    tree.index.abort(child)
    assert not tree.branch.nodes
    assert tree.released == [parent, child]


def test_inner_chunks_and_pinned_ones_are_no_victims() -> None:
    tree = Tree()
    tree.add("a")
    leaf = tree.add("b", "a")
    assert tree.victims() == [leaf]
    tree.index.pin(leaf)
    assert tree.victims() == []
    with pytest.raises(AssertionError):
        tree.index.drop(leaf)


def test_a_chunk_on_disk_may_leave_ram_though_others_hang_on_it() -> None:
    tree = Tree()
    parent = tree.add("a")
    on_disk = tree.copy(parent.node, DISK)
    tree.index.commit(on_disk)
    child = tree.add("b", "a", DISK)
    assert parent.evictable
    assert not on_disk.evictable
    tree.index.drop(parent)
    assert tree.run("a", "b") == [b"a", b"b"]
    assert not on_disk.evictable, "its child still hangs on it"
    tree.index.drop(child)
    assert on_disk.evictable


def test_what_is_pinned_is_released_by_the_last_unpin_only() -> None:
    tree = Tree()
    replica = tree.add("a")
    tree.index.pin(replica)
    tree.index.pin(replica)
    tree.index.drop_subtree(replica.node)
    assert tree.run("a") == []
    tree.index.unpin(replica)
    assert tree.released == []
    tree.index.unpin(replica)
    assert tree.released == [replica]


def test_a_detached_chunk_can_be_written_anew_beside_its_old_bytes() -> None:
    tree = Tree()
    old = tree.add("a")
    tree.index.pin(old)
    tree.index.drop_subtree(old.node)
    new = tree.add("a")
    assert new.node is not old.node
    tree.index.unpin(old)
    assert tree.released == [old]
    assert tree.run("a") == [b"a"]
    tree.index.check()


def test_what_was_asked_for_goes_last_and_leaves_before_their_parents() -> None:
    tree = Tree()
    tree.add("a")
    tree.add("b", "a")
    leaf = tree.add("c", "b")
    tree.add("x")
    tree.index.ask(tree.branch, leaf.node.path(), [], 2.0)
    order = []
    while victims := tree.victims():
        order.append(victims[0].key.rstrip(b"."))
        tree.index.drop(victims[0])
    assert order == [b"x", b"c", b"b", b"a"]


def test_policies_hear_of_what_their_tier_lacks() -> None:
    tree = Tree()
    asked: list[tuple[int, list[bytes]]] = []
    for policy in tree.branch.tenant.policies:
        assert isinstance(policy, Lru)
        policy.asked = lambda path, beyond, now_s: asked.append((len(path), list(beyond)))  # type: ignore[method-assign]
    first, second = tree.add("a"), tree.add("b", "a", DISK)
    tree.copy(first.node, DISK)  # still being written
    tree.index.ask(tree.branch, [first.node, second.node], [tree.key("c")], 2.0)
    a, b, c = (tree.key(name) for name in "abc")
    assert asked == [(0, [a, b, c]), (1, [b, c]), (0, [a, b, c])]


def test_policies_are_spared_what_is_no_path() -> None:
    tree = Tree()
    lengths: list[int] = []
    policy = tree.branch.tenant.policies[CPU]
    policy.asked = lambda path, beyond, now_s: lengths.append(len(path))  # type: ignore[method-assign]
    first, second, other = tree.add("a"), tree.add("b", "a"), tree.add("x")
    for run in ([first, first], [first, other], [second, first], [first, second, second]):
        tree.index.ask(tree.branch, [replica.node for replica in run], [], 2.0)
    assert lengths == [1, 1, 0, 2]


def test_a_tenant_owns_what_its_spaces_hold() -> None:
    tree = Tree()
    other = tree.index.branch(Space("n", SPACE.layout, tenant="other"))
    twin = tree.index.branch(Space("n", SPACE.layout))
    assert twin.tenant is tree.branch.tenant is not other.tenant
    leaf = tree.add("a")
    assert tree.branch.tenant.used_bytes[CPU] == 1
    tree.index.pin(leaf)
    tree.index.drop_subtree(leaf.node)
    assert tree.branch.tenant.used_bytes[CPU] == 1, "its bytes are still there"
    tree.index.unpin(leaf)
    assert tree.branch.tenant.used_bytes[CPU] == 0
    assert tree.index.forget_if_empty(tree.branch)
    assert tree.index.tenants == [twin.tenant, other.tenant]
    assert tree.index.forget_if_empty(twin)
    assert tree.index.tenants == [other.tenant]


def test_an_old_chunk_ends_the_run() -> None:
    tree = Tree()
    tree.add("a")
    keys = [tree.key("a")]
    assert len(tree.index.match(tree.branch, keys, newer_than_s=1.0)) == 1
    assert tree.index.match(tree.branch, keys, newer_than_s=1.5) == []


NAMES = st.integers(0, 14)


class IndexMachine(RuleBasedStateMachine):
    """Chunk n hangs on chunk (n - 1) // 2: a small tree that every operation reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree()
        self.index = self.tree.index
        self.writing: list[Replica] = []
        self.pinned: list[Replica] = []
        self.begun: list[Replica] = []

    def node(self, number: int) -> Node | None:
        return self.tree.branch.nodes.get(self.tree.key(str(number)))

    @rule(number=NAMES, tier=st.sampled_from(TierId))
    def begin(self, number: int, tier: TierId) -> None:
        parent = self.node((number - 1) // 2) if number else None
        node = self.node(number)
        if number and (parent is None or not any(parent.replicas)):
            return
        if node is not None and node.replica(tier) is not None:
            return
        above = str((number - 1) // 2) if number else None
        replica = self.tree.begin(str(number), above, tier)
        self.writing.append(replica)
        self.begun.append(replica)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(self.writing))
        parent = replica.node.parent
        expected = parent is None or parent.held
        assert self.index.commit(replica) is expected
        if expected:
            self.writing.remove(replica)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(self.writing))
        self.writing.remove(replica)
        self.index.abort(replica)

    @rule(number=NAMES, tier=st.sampled_from(TierId))
    def pin(self, number: int, tier: TierId) -> None:
        node = self.node(number)
        replica = node.ready(tier) if node else None
        if replica is not None:
            self.index.pin(replica)
            self.pinned.append(replica)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(self.pinned))
        self.pinned.remove(replica)
        self.index.unpin(replica)

    @rule(tier=st.sampled_from(TierId))
    def evict_one(self, tier: TierId) -> None:
        victim = next(self.index.victims(self.tree.branch.tenant, tier, 1.0), None)
        if victim is not None:
            assert victim not in self.pinned
            self.index.drop(victim)

    @rule(number=NAMES)
    def drop_subtree(self, number: int) -> None:
        node = self.node(number)
        if node is not None:
            self.index.drop_subtree(node)

    @rule(number=NAMES)
    def ask(self, number: int) -> None:
        node = self.node(number)
        path = node.path() if node is not None else []
        held = [each for each in path if each.held]
        self.index.ask(self.tree.branch, held, [], 2.0)

    @invariant()
    def the_tree_is_sound(self) -> None:
        self.index.check()

    @invariant()
    def each_replica_is_released_once_and_only_when_free(self) -> None:
        released = self.tree.released
        assert len(released) == len(set(released))
        assert not set(released) & set(self.pinned)
        assert not set(released) & set(self.writing)
        attached = {r for node in self.tree.branch.nodes for r in node.replicas if r}
        assert set(self.begun) == attached | set(released) | set(self.pinned)


class TestIndex(IndexMachine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=60)
