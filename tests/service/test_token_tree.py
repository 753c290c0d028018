"""The table of tokens as a state machine against a plain list, its bound, and what it costs."""

import gc
import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.chunks import ChunkKey
from kvtier.service.token_tree import ENTRY_BYTES, TokenTree
from kvtier.spaces import Layout, Space
from kvtier.tiers.tree import Branch, Node, Tenant

LIMIT = 12 * (ENTRY_BYTES + 4)
TEXTS = st.binary(min_size=4, max_size=4).map(lambda text: bytes(byte % 3 for byte in text))


def branch_of(name: str = "m") -> Branch:
    return Branch(Space(name, Layout("int8", 1, 1, 1, tokens=1, planes=1)), Tenant("", ()))


def node_of(parent: Node | Branch, name: int) -> Node:
    key = ChunkKey(name.to_bytes(32, "big"))
    if isinstance(parent, Branch):
        return Node(parent, key, None, 1.0)
    return Node(parent.branch, key, parent, 1.0)


def shared(one: bytes, other: bytes) -> int:
    """How many leading bytes agree, byte by byte."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))  # noqa: B905


@dataclass
class Known:
    """What the model knows of a chunk."""

    parent: Node | Branch
    text: bytes
    published: bool = False


class Texts(RuleBasedStateMachine):
    """Texts come, are published, used and go, under three parents."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = TokenTree(LIMIT)
        branch = branch_of()
        self.parents: list[Node | Branch] = [branch, node_of(branch, 1), branch_of("other")]
        self.known: dict[Node, Known] = {}  # least recently used first
        self.names = itertools.count(2)

    def a_node(self, data: st.DataObject) -> Node:
        return data.draw(st.sampled_from(list(self.known)))

    @rule(parent=st.integers(0, 2), text=TEXTS)
    def add(self, parent: int, text: bytes) -> None:
        above = self.parents[parent]
        if any(known.parent is above and known.text == text for known in self.known.values()):
            return
        node = node_of(above, next(self.names))
        self.tree.add(node, text)
        self.known[node] = Known(above, text)
        if len(self.known) > 12:
            del self.known[next(iter(self.known))]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        node = self.a_node(data)
        self.tree.publish(node)
        self.known[node].published = True

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        node = self.a_node(data)
        self.tree.touch(node)
        self.known[node] = self.known.pop(node)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        node = self.a_node(data)
        self.tree.forget(node)
        del self.known[node]

    @rule()
    def strangers_are_ignored(self) -> None:
        stranger = node_of(self.parents[0], 0)
        self.tree.publish(stranger)
        self.tree.forget(stranger)

    @rule(parent=st.integers(0, 2), text=st.binary(max_size=5))
    def closest(self, parent: int, text: bytes) -> None:
        text = bytes(byte % 3 for byte in text)
        above = self.parents[parent]
        shares = {
            node: shared(known.text, text)
            for node, known in self.known.items()
            if known.published and known.parent is above
        }
        nodes, most = self.tree.closest(above, text)
        assert most == max(shares.values(), default=0)
        assert bool(nodes) == bool(shares)
        assert all(shares[node] == most for node in nodes)

    @invariant()
    def agrees(self) -> None:
        self.tree.check()
        assert len(self.tree) == len(self.known)
        assert all(node in self.tree for node in self.known)
        assert self.tree.used_bytes == len(self.known) * (ENTRY_BYTES + 4)


TestTexts = Texts.TestCase
TestTexts.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@given(st.binary(max_size=8), st.binary(max_size=8))
def test_what_agrees_is_counted_from_the_front(one: bytes, other: bytes) -> None:
    tree, branch = TokenTree(1 << 20), branch_of()
    node = node_of(branch, 1)
    tree.add(node, one)
    tree.publish(node)
    assert tree.closest(branch, other) == ([node], shared(one, other))


def test_a_limit_of_nothing_keeps_nothing() -> None:
    tree, branch = TokenTree(0), branch_of()
    node = node_of(branch, 1)
    tree.add(node, b"text")
    tree.publish(node)
    assert (len(tree), tree.used_bytes) == (0, 0)
    assert tree.closest(branch, b"text") == ([], 0)


@pytest.mark.parametrize("siblings", [True, False], ids=["siblings", "a chain"])
@pytest.mark.parametrize("tokens", [16, 256])
def test_what_it_costs(
    tokens: int, siblings: bool, record_property: Callable[[str, object], None]
) -> None:
    """What is accounted is what it takes, for one long prompt and for many short ones; and at 256
    tokens little more than the tokens themselves."""
    branch, count = branch_of(), 4000
    nodes = [node_of(branch, 0)]
    for name in range(1, count):
        nodes.append(node_of(branch if siblings else nodes[-1], name))
    gc.collect()
    tracemalloc.start()
    tree = TokenTree(1 << 40)
    for number, node in enumerate(nodes):
        tree.add(node, number.to_bytes(32 + 4 * tokens, "big"))
        tree.publish(node)
        tree.touch(node)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tree.check()
    record_property("bytes_per_chunk", round(taken / count))
    assert taken <= tree.used_bytes
    if tokens == 256:
        assert taken / count <= 1.3 * 4 * tokens + 250
