"""How a prefix of tokens becomes a chain of chunk keys.

A chunk is the KV of a fixed run of tokens over all layers. Its key is a 32-byte digest chained over
everything before it, so equal keys mean equal whole prefixes in one space:

    key[i] = SHA-256( "kvtier.chunk.v1" ‖ parent ‖ u32(tokens in the chunk)
                      ‖ the token ids as u32-LE ‖ u32(bytes of extra) ‖ extra )

where parent is key[i-1], or the space digest for the first chunk. `extra` is what else decides the
chunk's KV besides the tokens (a LoRA adapter, the hash of an image). Every part has a fixed length
or is preceded by its length, so no two inputs share an encoding.
"""

import secrets
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256 as _sha256
from typing import NewType, cast, overload

from kvtier.errors import InvalidRequest

ChunkKey = NewType("ChunkKey", bytes)

KEY_BYTES = 32
MAX_EXTRA_BYTES = 65_536
_DOMAIN = b"kvtier.chunk.v1"
_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Text:
    """What the keys of a run are made of, the beginning of the next chunk included."""

    tokens: bytes  # packed u32, from the first token of the run's first chunk on
    extras: tuple[bytes, ...]  # one for each chunk that they begin


@dataclass(frozen=True, slots=True)
class Prefix:
    """A run of consecutive full chunks of one prompt, ready to look up, load or offload.

    Slicing gives a shorter run that still knows its parent: `prefix[8:]` is the prefix from its
    ninth chunk on, for an engine that already holds the first eight. `request` tells requests of
    an engine apart, 0: nobody said which this is; all that is done with one prefix and its slices
    counts as one use of it. `text` is there where the tokens are known. It reaches beyond the last
    chunk where they do; a slice that ends before the last chunk ends with its own.
    """

    keys: tuple[ChunkKey, ...]
    parent: ChunkKey  # the key before the first one; the space digest at the start of a prompt
    chunk_tokens: int
    text: Text | None = field(default=None, repr=False, compare=False)
    request: int = field(default=0, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self.keys)

    @overload
    def __getitem__(self, index: int) -> ChunkKey: ...
    @overload
    def __getitem__(self, index: slice) -> "Prefix": ...
    def __getitem__(self, index: "int | slice") -> "ChunkKey | Prefix":
        if isinstance(index, int):
            return self.keys[index]
        start, stop, step = index.indices(len(self.keys))
        if step != 1:
            raise InvalidRequest(f"a prefix is contiguous: slice step {step} is not 1")
        parent = self.keys[start - 1] if start > 0 else self.parent
        text = self._cut_text(start, stop) if self.text is not None else None
        return Prefix(self.keys[start:stop], parent, self.chunk_tokens, text, self.request)

    def _cut_text(self, start: int, stop: int) -> Text:
        assert self.text is not None
        width = 4 * self.chunk_tokens
        end = stop if stop < len(self.keys) else None
        tokens = self.text.tokens[start * width : end and end * width]
        return Text(tokens, self.text.extras[start:end])

    @property
    def tokens(self) -> int:
        """How many tokens the run covers."""
        return len(self.keys) * self.chunk_tokens


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Token ids as packed little-endian u32, 4 bytes each.

    Takes any ints; an `array`, NumPy array or other buffer of 4-byte unsigned integers
    is packed without a loop. Raises InvalidRequest where an id does not fit in 32 bits.
    """
    try:
        if isinstance(token_ids, list):
            packed = array("I")
            packed.fromlist(token_ids)  # a third faster than by its iterator
        else:
            packed = array("I", token_ids)
    except (OverflowError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"token_ids: every id must be an integer in [0, 2^32): {error}"
        ) from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def chain(
    root: bytes, packed_tokens: bytes, chunk_tokens: int, extra: bytes | Sequence[bytes] = b""
) -> Prefix:
    """The keys of all full chunks of a prompt; a tail shorter than `chunk_tokens` has no key.

    `root` is the space digest (or the key of the chunk before the first token), `packed_tokens`
    comes from `pack_tokens`. `extra` is mixed into every chunk, or given one per chunk.
    """
    if len(root) != KEY_BYTES:
        raise InvalidRequest(f"root: {len(root)} bytes given, a digest has {KEY_BYTES}")
    if chunk_tokens < 1:
        raise InvalidRequest(f"chunk_tokens: {chunk_tokens} given, at least 1 needed")
    width = 4 * chunk_tokens
    count = len(packed_tokens) // width
    tails = _tails(extra, count)
    token_count = _U32.pack(chunk_tokens)
    tokens = memoryview(packed_tokens)
    parent = root
    keys = []
    # On the path of every request: a join per chunk is the cheapest way to feed the hash.
    for index in range(count):
        chunk = tokens[index * width : (index + 1) * width]
        parent = _sha256(b"".join((_DOMAIN, parent, token_count, chunk, tails[index]))).digest()
        keys.append(parent)
    return Prefix(cast("tuple[ChunkKey, ...]", tuple(keys)), ChunkKey(root), chunk_tokens)


def with_text(prefix: Prefix, packed_tokens: bytes, extra: bytes | Sequence[bytes] = b"") -> Prefix:
    """A prefix that knows what `chain` made it of. Tokens after the last full chunk are known too,
    unless `extra` is given one per chunk and there is none for them."""
    width = 4 * prefix.chunk_tokens
    begun = -(-len(packed_tokens) // width)
    extras = (extra,) * begun if isinstance(extra, bytes) else tuple(extra[:begun])
    text = Text(packed_tokens[: len(extras) * width], extras)
    return replace(prefix, text=text)


def new_request() -> int:
    """A number for one request of an engine, other than that of any process' requests: 64 random
    bits, never 0."""
    return secrets.randbits(64) or 1


def _tails(extra: bytes | Sequence[bytes], count: int) -> Sequence[bytes]:
    if isinstance(extra, bytes):
        return [_encode_extra(extra)] * count
    if len(extra) < count:
        raise InvalidRequest(f"extra: {len(extra)} values given for {count} chunks")
    return [_encode_extra(each) for each in extra[:count]]


def _encode_extra(extra: bytes) -> bytes:
    if len(extra) > MAX_EXTRA_BYTES:
        raise InvalidRequest(
            f"extra: {len(extra)} bytes given, at most {MAX_EXTRA_BYTES}; send a hash of it"
        )
    return _U32.pack(len(extra)) + extra
