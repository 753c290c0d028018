"""Chunks cut into messages and put together again."""

import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InvalidRequest
from kvtier.proto import cache_pb2 as pb
from kvtier.transfer.paths.inline import (
    MESSAGE_BYTES,
    Assembly,
    Piece,
    checksum,
    cut,
    piece_of,
    read_get,
    read_put,
    write_get,
    write_put,
)

SIZES = st.sampled_from(
    [1, 100, MESSAGE_BYTES - 1, MESSAGE_BYTES, MESSAGE_BYTES + 1, 2 * MESSAGE_BYTES + 7]
)


@given(SIZES, st.integers(0, 9))
def test_what_is_cut_is_put_together_again(nbytes: int, seed: int) -> None:
    chunk = random.Random(seed).randbytes(nbytes)
    digest = checksum(memoryview(chunk))
    target = bytearray(nbytes)
    assembly = Assembly(memoryview(target))
    pieces = list(cut(3, memoryview(chunk), digest))
    assert all(0 < len(piece.data) <= MESSAGE_BYTES and piece.index == 3 for piece in pieces)
    assert [assembly.add(piece) for piece in pieces] == [None] * (len(pieces) - 1) + [True]
    assert target == chunk


def test_a_flipped_bit_is_found() -> None:
    chunk = bytes(1000)
    (piece,) = cut(0, memoryview(chunk), checksum(memoryview(chunk)))
    flipped = Piece(0, b"\x01" + bytes(piece.data[1:]), piece.checksum)
    assert Assembly(memoryview(bytearray(1000))).add(flipped) is False


@pytest.mark.parametrize("data", [b"", bytes(11)])
def test_a_piece_that_does_not_fit_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="piece"):
        Assembly(memoryview(bytearray(10))).add(Piece(0, data))


def test_no_more_is_taken_after_the_last_piece() -> None:
    assembly = Assembly(memoryview(bytearray(10)))
    assert assembly.add(Piece(0, bytes(10), 5)) is False
    with pytest.raises(InvalidRequest):
        assembly.add(Piece(0, b"x"))


PIECES = st.builds(
    Piece, st.integers(0, 2**32 - 1), st.binary(max_size=300), st.integers(0, 2**64 - 1)
)


def same(piece: Piece, decoded: pb.ChunkPiece) -> bool:
    return (piece.index, bytes(piece.data), piece.checksum) == (
        decoded.index,
        decoded.data,
        decoded.checksum,
    )


@given(PIECES)
def test_what_is_written_by_hand_is_what_protobuf_reads(piece: Piece) -> None:
    assert same(piece, pb.PutRequest.FromString(write_put(piece)).piece)
    assert same(piece, pb.GetResponse.FromString(write_get(piece)).piece)


@given(PIECES)
def test_what_protobuf_writes_is_what_is_read(piece: Piece) -> None:
    wire = pb.ChunkPiece(index=piece.index, data=bytes(piece.data), checksum=piece.checksum)
    put = read_put(pb.PutRequest(piece=wire).SerializeToString())
    get = read_get(pb.GetResponse(piece=wire).SerializeToString())
    for read in (put, get):
        found = read if isinstance(read, Piece) else piece_of(read.piece)
        assert (found.index, bytes(found.data), found.checksum) == (
            piece.index,
            piece.data,
            piece.checksum,
        )


@given(PIECES, st.data())
def test_malformed_messages_are_read_as_protobuf_reads_them(
    piece: Piece, data: st.DataObject
) -> None:
    wire = bytearray(write_put(piece))
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    garbled = bytes(wire[: data.draw(st.integers(0, len(wire)))])
    try:
        expected = pb.PutRequest.FromString(garbled)
    except DecodeError:
        with pytest.raises(DecodeError):
            read_put(garbled)
        return
    found = read_put(garbled)
    assert found == expected if isinstance(found, pb.PutRequest) else same(found, expected.piece)


@pytest.mark.parametrize(
    "message",
    [pb.PutRequest(), pb.PutRequest(header=pb.PutHeader(session_id=b"x", lease_id=1))],
    ids=["empty", "header"],
)
def test_other_messages_go_through_protobuf(message: pb.PutRequest) -> None:
    assert read_put(write_put(message)) == message


def test_a_checksum_is_never_zero() -> None:
    assert checksum(memoryview(b"")) != 0
