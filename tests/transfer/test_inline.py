"""Chunks cut into messages and put together again."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InvalidRequest
from kvtier.transfer.paths.inline import MESSAGE_BYTES, Assembly, Piece, checksum, cut

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
    flipped = Piece(0, b"\x01" + piece.data[1:], piece.checksum)
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


def test_a_checksum_is_never_zero() -> None:
    assert checksum(memoryview(b"")) != 0
