"""Which stored chunk a prompt leaves half-way, so that the part before can be used.

Keys cannot tell: one other token is another key. So a client may offer the tokens of what it
stores, and later the tokens of a prompt that it asks for. Tokens are only believed when they make
the key that they are said to be of (`kvtier/chunks.py`). So a chunk that is found here continues
exactly the prefix before it, in the same space, with the same extra, by the tokens that are told.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from kvtier.chunks import ChunkKey, chain
from kvtier.metrics import Counters
from kvtier.service.token_tree import Parent, TokenTree
from kvtier.tiers.tree import Branch, Node, TierId

# Of tokens and extras in one request: a quarter of a million tokens, which nobody waits long for
# while they are verified.
MAX_TOKEN_BYTES = 1 << 20
_TOKEN_BYTES = 4
_LABEL_BYTES = 32
_IN_MEMORY = (TierId.GPU, TierId.CPU)


@dataclass(frozen=True, slots=True)
class Offered:
    """The tokens of a request's keys as packed u32, from the first key on, and each chunk's extra;
    no extras where all are empty. `parent` is the key before the first one."""

    ids: bytes
    extras: Sequence[bytes]
    parent: ChunkKey

    def chunk(self, index: int, tokens: int) -> bytes:
        """The tokens of one chunk, of the last one perhaps only the first."""
        width = tokens * _TOKEN_BYTES
        return self.ids[index * width : (index + 1) * width]

    def extra(self, index: int) -> bytes:
        return self.extras[index] if self.extras else b""


@dataclass(frozen=True, slots=True)
class Overlap:
    """A held chunk at `index` of a request of which the first `tokens` tokens are the prompt's."""

    node: Node
    index: int
    tokens: int


class Overlaps:
    """Learns the tokens of chunks and finds overlaps, in at most `limit_bytes` of memory."""

    def __init__(self, limit_bytes: int, counters: Counters) -> None:
        self.tree = TokenTree(limit_bytes)
        self._counters = counters

    @property
    def max_token_bytes(self) -> int:
        """Of tokens and extras in one request; 0 where nothing is kept."""
        return MAX_TOKEN_BYTES if self.tree.limit_bytes else 0

    def learn(self, branch: Branch, keys: Sequence[ChunkKey], offered: Offered) -> None:
        """Remember the tokens of those keys that the index has; found once they are held."""
        if not self.tree.limit_bytes:
            return
        tokens = branch.space.layout.tokens
        count = len(offered.ids) // (_TOKEN_BYTES * tokens)
        for index, key in enumerate(keys[:count]):
            node = branch.nodes.get(key)
            if node is None or not any(node.replicas):
                continue
            if node in self.tree:
                self.tree.touch(node)
                continue
            ids, extra = offered.chunk(index, tokens), offered.extra(index)
            if chain(node.parent_key, ids, tokens, extra).keys != (key,):
                self._counters.unverified_tokens += 1
                continue
            self.tree.add(node, _label(extra) + ids)
            if node.held:
                self.tree.publish(node)

    def publish(self, nodes: Sequence[Node]) -> None:
        """Chunks were committed."""
        for node in nodes:
            self.tree.publish(node)

    def beyond(
        self, branch: Branch, run: Sequence[Node], offered: Offered, oldest_s: float
    ) -> Overlap | None:
        """The chunk that goes on from a held run as the prompt does for the most tokens, one in
        memory where several do; None where none does, or none created after the given time."""
        index = len(run)
        ids = offered.chunk(index, branch.space.layout.tokens)
        parent = run[-1] if run else _root(branch, offered.parent)
        if parent is None or not ids:
            return None
        nodes, shared = self.tree.closest(parent, _label(offered.extra(index)) + ids)
        nodes = [node for node in nodes if node.created_s >= oldest_s]
        tokens = (shared - _LABEL_BYTES) // _TOKEN_BYTES
        if not nodes or tokens < 1:
            return None
        chosen = next((node for node in nodes if any(map(node.ready, _IN_MEMORY))), nodes[0])
        self.tree.touch(chosen)
        return Overlap(chosen, index, tokens)


def _root(branch: Branch, parent: ChunkKey) -> Parent | None:
    return branch if parent == branch.digest else branch.nodes.get(parent)


def _label(extra: bytes) -> bytes:
    """What the texts of chunks with one extra begin with, and no others: of a fixed length, so that
    tokens compare only behind equal extras."""
    return sha256(extra).digest()
