"""The tokens of chunks in the index, in order: which child of a chunk begins as a prompt goes on.

The children of one chunk stand in the order of their texts. So whatever shares the most leading
bytes with a prompt stands next to the place that the prompt would have, and is found by bisection,
however many children there are.

Bounded in bytes: the texts that were used least recently are forgotten.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias

from kvtier.tiers.tree import Branch, Node

Parent: TypeAlias = Node | Branch
"""What a chunk continues: another chunk or, at the start of a prompt, its space."""

# What an entry takes besides its text: two dictionaries and a list with their room to grow, and the
# objects. A test holds it against what the allocator says.
ENTRY_BYTES = 400
# Of the children that share equally much, those looked at on each side.
_MOST_EQUALS = 4


@dataclass(slots=True, eq=False)
class _Entry:
    """A chunk's text. Only a published one is ever found."""

    node: Node
    text: bytes
    published: bool = False

    @property
    def nbytes(self) -> int:
        return ENTRY_BYTES + len(self.text)


_text = attrgetter("text")


class TokenTree:
    """Texts of chunks, at most `limit_bytes` with all that they cost; none where that is 0.

    Two children of one parent never have the same text.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        # Least recently used first. Not a plain dict: one that is emptied from the front is scanned
        # over its dead entries.
        self._entries: OrderedDict[Node, _Entry] = OrderedDict()
        self._children: dict[Parent, list[_Entry]] = {}  # the published ones, by text

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, node: Node) -> bool:
        return node in self._entries

    def add(self, node: Node, text: bytes) -> None:
        """Remember the text of a chunk that is not in here. It is found once it is published."""
        assert node not in self._entries
        entry = self._entries[node] = _Entry(node, text)
        self.used_bytes += entry.nbytes
        while self.used_bytes > self.limit_bytes:
            self.forget(next(iter(self._entries)))

    def publish(self, node: Node) -> None:
        """From now on the chunk is found, until it is forgotten. Unknown ones are ignored."""
        entry = self._entries.get(node)
        if entry is not None and not entry.published:
            entry.published = True
            insort(self._children.setdefault(_parent(node), []), entry, key=_text)

    def touch(self, node: Node) -> None:
        """A chunk in here was used."""
        self._entries.move_to_end(node)

    def forget(self, node: Node) -> None:
        """Drop a chunk's text; unknown ones are ignored."""
        entry = self._entries.pop(node, None)
        if entry is None:
            return
        self.used_bytes -= entry.nbytes
        if not entry.published:
            return
        parent = _parent(node)
        children = self._children[parent]
        at = bisect_left(children, entry.text, key=_text)
        assert children[at] is entry, "two children have the same text"
        del children[at]
        if not children:
            del self._children[parent]

    def closest(self, parent: Parent, text: bytes) -> tuple[list[Node], int]:
        """Children of `parent` that share the most leading bytes with a text, nearest first, and
        how many bytes that is. Of many that share equally much, some."""
        children = self._children.get(parent, [])
        at = bisect_left(children, text, key=_text)
        near = [
            (_shared(entry.text, text), entry.node)
            for entry in children[max(0, at - _MOST_EQUALS) : at + _MOST_EQUALS]
        ]
        most = max((shared for shared, _ in near), default=0)
        return [node for shared, node in near if shared == most], most

    def check(self) -> None:
        """Assert every invariant; for tests."""
        assert self.used_bytes == sum(entry.nbytes for entry in self._entries.values())
        assert self.used_bytes <= self.limit_bytes
        for parent, children in self._children.items():
            assert children, "a parent without children stayed"
            assert children == sorted(children, key=_text)
            for entry in children:
                assert entry.published
                assert self._entries[entry.node] is entry
                assert _parent(entry.node) is parent
        published = sum(entry.published for entry in self._entries.values())
        assert published == sum(map(len, self._children.values()))


def _parent(node: Node) -> Parent:
    return node.parent if node.parent is not None else node.branch


def _shared(one: bytes, other: bytes) -> int:
    """How many leading bytes agree."""
    nbytes = min(len(one), len(other))
    differing = int.from_bytes(one[:nbytes], "big") ^ int.from_bytes(other[:nbytes], "big")
    return nbytes - (differing.bit_length() + 7) // 8
