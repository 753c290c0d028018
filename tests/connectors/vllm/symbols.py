"""KV as symbols: a slot of a block holds what a token's KV was computed from, or garbage.

The simulated engine writes symbols where a real one writes numbers, so that every chunk that is
stored can be checked: it must hold exactly what its key says.
"""

from collections.abc import Sequence

from kvtier.chunks import chain, pack_tokens


class Kv:
    """The KV of a token after all tokens before it. Equal ones are the same object."""

    __slots__ = ("_children", "_keys", "depth", "parent", "root", "salt", "token")

    def __init__(self, parent: "Kv | None" = None, token: int = -1, salt: bytes = b"") -> None:
        self.parent = parent
        self.token = token
        self.depth: int = parent.depth + 1 if parent is not None else 0
        self.root: Kv = parent.root if parent is not None else self
        self.salt = salt  # of the root: what decides the keys besides the tokens
        self._children: dict[int, Kv] = {}
        self._keys: dict[bytes, bytes] = {}

    def then(self, token: int) -> "Kv":
        """The KV of the next token."""
        found = self._children.get(token)
        if found is None:
            found = self._children[token] = Kv(self, token)
        return found

    def back(self, tokens: int) -> list["Kv"]:
        """The last so many tokens' KV, in order; the last one is this one."""
        found, node = [], self
        for _ in range(tokens):
            found.append(node)
            assert node.parent is not None
            node = node.parent
        return found[::-1]

    def key(self, digest: bytes, chunk_tokens: int) -> bytes:
        """The key of the chunk that ends with this token. Computed apart from the connector."""
        if not self.depth:
            return digest
        known = self._keys.get(digest)
        if known is None:
            last = self.back(chunk_tokens)
            assert last[0].parent is not None
            parent = last[0].parent.key(digest, chunk_tokens)
            packed = pack_tokens([kv.token for kv in last])
            run = chain(parent, packed, chunk_tokens, self.root.salt)
            known = self._keys[digest] = run.keys[0]
        return known


Symbol = Kv | None
"""What a slot holds; None is garbage."""


def after(root: Kv, tokens: Sequence[int]) -> list[Kv]:
    """The KV of each token of a sequence."""
    found = []
    for token in tokens:
        root = root.then(token)
        found.append(root)
    return found


class Memory:
    """One rank's blocks. A block belongs to the group that wrote it last."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._slots: dict[tuple[int, int], tuple[int, Symbol]] = {}

    def write(self, group: int, blocks: Sequence[int], position: int, kv: Symbol) -> None:
        """Write the KV of a request's token; `blocks` are the request's, of that group."""
        place, offset = divmod(position, self.block_tokens)
        self._slots[blocks[place], offset] = (group, kv)

    def read(self, group: int, blocks: Sequence[int], position: int) -> Symbol:
        """What is there; garbage where another group wrote."""
        place, offset = divmod(position, self.block_tokens)
        owner, kv = self._slots.get((blocks[place], offset), (group, None))
        return kv if owner == group else None

    def chunk(self, group: int, blocks: Sequence[int], tokens: int) -> tuple[Symbol, ...]:
        """What the first `tokens` slots of some blocks hold."""
        return tuple(self.read(group, blocks, position) for position in range(tokens))

    def holds(self, group: int, block: int, end: Kv) -> bool:
        """Whether a block holds the tokens that end with that one."""
        return list(self.chunk(group, [block], self.block_tokens)) == end.back(self.block_tokens)


def check_chunk(digest: bytes, key: bytes, symbols: Sequence[Symbol], chunk_tokens: int) -> None:
    """Raise AssertionError unless the symbols are exactly what the key stands for."""
    last = symbols[-1]
    assert last is not None, "a chunk with garbage is read"
    assert list(symbols) == last.back(chunk_tokens), "a chunk with other tokens' KV is read"
    assert last.key(digest, chunk_tokens) == key, "a chunk is read under a key that is not its own"
