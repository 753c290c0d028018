"""The keys of one request's chunks, in every space it touches, as its tokens become known."""

import hashlib
from collections.abc import Callable, Sequence

from kvtier.chunks import ChunkKey, Prefix, chain, new_request, pack_tokens

Extra = Callable[[int], bytes]
"""What decides a chunk's KV besides the tokens, by the chunk's place in the request."""


class Chains:
    """One chain of keys for each root, all over the same tokens: those of one request, whose number
    goes with every prefix, to whichever process it is sent."""

    def __init__(self, roots: Sequence[bytes], chunk_tokens: int) -> None:
        self._roots = {root: ChunkKey(root) for root in roots}
        self.chunk_tokens = chunk_tokens
        self._keys: dict[bytes, list[ChunkKey]] = {root: [] for root in roots}
        self._chunks = 0
        self._request = new_request()

    @property
    def chunks(self) -> int:
        """How many full chunks are keyed so far."""
        return self._chunks

    def extend(self, tokens: Sequence[int], extra: Extra) -> None:
        """Key the full chunks of `tokens`, the request's tokens from its first, that are new."""
        width, done = self.chunk_tokens, self._chunks
        full = len(tokens) // width
        if full <= done:
            return
        packed = pack_tokens(tokens[done * width : full * width])
        extras = [extra(index) for index in range(done, full)]
        for root, keys in self._keys.items():
            parent = keys[-1] if keys else root
            keys.extend(chain(parent, packed, width, extras).keys)
        self._chunks = full

    def run(self, root: bytes, first: int, stop: int) -> Prefix:
        """The keys of chunks `first` to `stop` (exclusive) in one space."""
        keys = self._keys[root]
        parent = keys[first - 1] if first else self._roots[root]
        return Prefix(tuple(keys[first:stop]), parent, self.chunk_tokens, request=self._request)


def digest_of(extra_keys: object, *more: str) -> bytes:
    """32 bytes for what the engine says decides a block's KV besides its tokens, whatever its size:
    nested tuples of texts, numbers and bytes. `ascii` tells any two of them apart, and stands even
    texts that are no valid Unicode."""
    return hashlib.sha256(ascii((extra_keys, more)).encode()).digest()
