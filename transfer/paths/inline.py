"""The `inline` data path: bytes in streamed messages, for clients that cannot map the arena.

Both ends are here: how a chunk is cut into messages, and how messages are put together again
without believing anything they say. Each chunk's last message carries its checksum, because TCP's
is weak.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from kvtier.errors import InvalidRequest
from kvtier.proto import cache_pb2 as pb

# Larger messages were slower; see docs/decisions.
MESSAGE_BYTES = 1 << 20


# The wire form of what carries a piece: field number and type, as protobuf encodes them.
_PUT_PIECE = pb.PutRequest.PIECE_FIELD_NUMBER << 3 | 2
_GET_PIECE = pb.GetResponse.PIECE_FIELD_NUMBER << 3 | 2
_INDEX = pb.ChunkPiece.INDEX_FIELD_NUMBER << 3
_DATA = pb.ChunkPiece.DATA_FIELD_NUMBER << 3 | 2
_CHECKSUM = struct.Struct("<BQ")
_CHECKSUM_TAG = pb.ChunkPiece.CHECKSUM_FIELD_NUMBER << 3 | 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a chunk in one message. `checksum` is zero but on the chunk's last piece."""

    index: int
    data: bytes | memoryview
    checksum: int = 0


def checksum(chunk: memoryview) -> int:
    """xxh3-64 of a chunk, never zero: zero says that there is none."""
    return xxhash.xxh3_64_intdigest(chunk) or 1


def cut(index: int, chunk: memoryview, digest: int) -> Iterator[Piece]:
    """The pieces of one chunk, in order; their data are views of it."""
    last = max(0, (len(chunk) - 1) // MESSAGE_BYTES * MESSAGE_BYTES)
    for start in range(0, last, MESSAGE_BYTES):
        yield Piece(index, chunk[start : start + MESSAGE_BYTES])
    yield Piece(index, chunk[last:], digest)


def write_put(message: Piece | pb.PutRequest) -> bytes:
    """The wire form of a PutRequest, or of one with this piece."""
    if isinstance(message, Piece):
        return _encode(_PUT_PIECE, message)
    return message.SerializeToString()


def write_get(message: Piece | pb.GetResponse) -> bytes:
    """The wire form of a GetResponse, or of one with this piece."""
    if isinstance(message, Piece):
        return _encode(_GET_PIECE, message)
    return message.SerializeToString()


def read_put(message: bytes) -> Piece | pb.PutRequest:
    """A PutRequest from the wire: its piece, or the whole message where it is anything else."""
    return _decode(_PUT_PIECE, message) or pb.PutRequest.FromString(message)


def read_get(message: bytes) -> Piece | pb.GetResponse:
    """A GetResponse from the wire: its piece, or the whole message where it is anything else."""
    return _decode(_GET_PIECE, message) or pb.GetResponse.FromString(message)


def piece_of(piece: pb.ChunkPiece) -> Piece:
    """A piece that protobuf decoded: another writer may order its fields otherwise."""
    return Piece(piece.index, piece.data, piece.checksum)


def _encode(tag: int, piece: Piece) -> bytes:
    # By hand, because protobuf copies the data three times on its way into a message and out of
    # it, and those copies took longer than sending it. Here it is copied once.
    head = bytes((_INDEX, *_varint(piece.index), _DATA, *_varint(len(piece.data))))
    tail = _CHECKSUM.pack(_CHECKSUM_TAG, piece.checksum) if piece.checksum else b""
    nbytes = len(head) + len(piece.data) + len(tail)
    return b"".join((bytes((tag, *_varint(nbytes))), head, piece.data, tail))


class _OtherForm(Exception):
    """Not the form that `_encode` writes; perhaps another one that protobuf can read."""


def _decode(tag: int, message: bytes) -> Piece | None:
    """The piece in a message of the form that `_encode` writes; None for any other."""
    try:
        return _parse(tag, memoryview(message))
    except (_OtherForm, IndexError):
        return None


def _parse(tag: int, view: memoryview) -> Piece:
    at = _expect(tag, view, 0)
    nbytes, at = _read_varint(view, at)
    if at + nbytes != len(view):
        raise _OtherForm
    index, at = _read_varint(view, _expect(_INDEX, view, at))
    nbytes, at = _read_varint(view, _expect(_DATA, view, at))
    data, tail = view[at : at + nbytes], view[at + nbytes :]
    if len(data) != nbytes or index > _U32_MAX:
        raise _OtherForm
    if not tail:
        return Piece(index, data)
    if len(tail) != _CHECKSUM.size:
        raise _OtherForm
    _expect(_CHECKSUM_TAG, tail, 0)
    return Piece(index, data, _CHECKSUM.unpack(tail)[1])


def _expect(tag: int, view: memoryview, at: int) -> int:
    if view[at] != tag:
        raise _OtherForm
    return at + 1


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    """A varint of at most five bytes, which is all that a piece needs, and where it ends."""
    value = 0
    for shift in range(0, 35, 7):
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _OtherForm


_U32_MAX = 0xFFFF_FFFF


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
