"""The `inline` data path: bytes in streamed messages, for clients that cannot map the arena.

Both ends are here: how a chunk is cut into messages, and how messages are put together again
without believing anything they say. Each chunk's last message carries its checksum, because TCP's
is weak.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from kvtier.errors import InvalidRequest
from kvtier.proto import cache_pb2 as pb

# Larger messages were slower; see docs/decisions.
MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a chunk in one message. `checksum` is zero but on the chunk's last piece."""

    index: int
    data: bytes
    checksum: int = 0


def checksum(chunk: memoryview) -> int:
    """xxh3-64 of a chunk, never zero: zero says that there is none."""
    return xxhash.xxh3_64_intdigest(chunk) or 1


def cut(index: int, chunk: memoryview, digest: int) -> Iterator[Piece]:
    """The pieces of one chunk, in order."""
    last = max(0, (len(chunk) - 1) // MESSAGE_BYTES * MESSAGE_BYTES)
    for start in range(0, last, MESSAGE_BYTES):
        yield Piece(index, bytes(chunk[start : start + MESSAGE_BYTES]))
    yield Piece(index, bytes(chunk[last:]), digest)


def pack(piece: Piece, message: pb.ChunkPiece) -> None:
    """Write a piece into the field that is to carry it.

    In place: a ChunkPiece that is made first and given to its parent's constructor is merged into
    it by way of its wire form, which took several times as long as sending it.
    """
    message.index = piece.index
    message.data = piece.data
    message.checksum = piece.checksum


class Assembly:
    """Puts the pieces of one chunk into `target`, in the order they were cut."""

    def __init__(self, target: memoryview) -> None:
        self._target = target
        self._hasher = xxhash.xxh3_64()
        self._filled = 0

    def add(self, piece: Piece) -> bool | None:
        """Take a piece: None while more are due, then whether the checksum is right.

        Raises InvalidRequest when the piece does not fit.
        """
        end = self._filled + len(piece.data)
        if not piece.data or end > len(self._target):
            raise InvalidRequest(
                f"piece: {len(piece.data)} bytes at {self._filled} of chunk {piece.index}, "
                f"which has {len(self._target)} bytes"
            )
        self._target[self._filled : end] = piece.data
        self._hasher.update(piece.data)
        self._filled = end
        if end < len(self._target):
            return None
        return piece.checksum == (self._hasher.intdigest() or 1)
