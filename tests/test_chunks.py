"""Keys: chained, distinct, and the same whatever way the tokens arrive."""

import hashlib
import struct
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.chunks import KEY_BYTES, MAX_EXTRA_BYTES, Prefix, chain, pack_tokens
from kvtier.errors import InvalidRequest

ROOT = bytes(range(32))
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def keys(tokens: list[int], chunk: int = 4, root: bytes = ROOT, extra: bytes = b"") -> Prefix:
    return chain(root, pack_tokens(tokens), chunk, extra)


def test_a_key_is_what_the_protocol_says() -> None:
    tokens = struct.pack("<4I", 1, 2, 3, 2**32 - 1)
    text = b"kvtier.chunk.v1" + ROOT + struct.pack("<I", 4) + tokens + struct.pack("<I", 2) + b"lo"
    expected = hashlib.sha256(text).digest()
    assert keys([1, 2, 3, 2**32 - 1], extra=b"lo").keys == (expected,)


@given(TOKENS, st.integers(1, 9))
def test_only_full_chunks_have_keys(tokens: list[int], chunk: int) -> None:
    prefix = keys(tokens, chunk)
    assert len(prefix) == len(tokens) // chunk
    assert prefix.tokens == len(prefix) * chunk
    assert all(len(key) == KEY_BYTES for key in prefix)


@given(TOKENS, st.data())
def test_one_changed_token_changes_every_key_from_there_on(
    tokens: list[int], data: st.DataObject
) -> None:
    before = keys(tokens)
    if not len(before):
        return
    position = data.draw(st.integers(0, 4 * len(before) - 1))
    changed = [*tokens]
    changed[position] ^= 1
    after = keys(changed)
    same = position // 4
    assert before.keys[:same] == after.keys[:same]
    assert not set(before.keys[same:]) & set(after.keys[same:])


@given(TOKENS)
def test_lists_arrays_and_numpy_give_the_same_keys(tokens: list[int]) -> None:
    expected = pack_tokens(tokens)
    assert pack_tokens(array("I", tokens)) == expected
    assert pack_tokens(np.array(tokens, dtype=np.uint32)) == expected
    assert pack_tokens(np.array(tokens, dtype=np.int64)) == expected


def test_the_parts_of_a_key_cannot_be_shifted_into_each_other() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    variants = [
        keys(tokens, 4),
        keys(tokens, 8),
        keys(tokens, 4, extra=b"\0"),
        keys(tokens, 4, extra=b"\0\0"),
        keys(tokens, 4, root=bytes(32)),
    ]
    all_keys = [key for prefix in variants for key in prefix]
    assert len(set(all_keys)) == len(all_keys)


def test_a_slice_knows_its_parent() -> None:
    prefix = keys(list(range(24)))
    tail = prefix[2:]
    assert tail.parent == prefix.keys[1]
    assert tail.keys == prefix.keys[2:]
    assert tail[1:].parent == prefix.keys[2]
    assert prefix[:2].parent == prefix.parent
    assert prefix[1] == prefix.keys[1]
    with pytest.raises(InvalidRequest, match="step"):
        prefix[::2]


def test_extras_may_differ_by_chunk() -> None:
    packed = pack_tokens(list(range(8)))
    plain = chain(ROOT, packed, 4)
    second = chain(ROOT, packed, 4, [b"", b"image"])
    assert plain.keys[0] == second.keys[0]
    assert plain.keys[1] != second.keys[1]
    with pytest.raises(InvalidRequest, match="extra: 1 values given for 2"):
        chain(ROOT, packed, 4, [b""])


@pytest.mark.parametrize("bad", [[-1], [2**32], ["a"], [1.5], [None]])
def test_ids_that_are_not_u32_are_refused(bad: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="token_ids"):
        pack_tokens(bad)


def test_limits_are_named() -> None:
    with pytest.raises(InvalidRequest, match="root: 31 bytes"):
        chain(bytes(31), b"", 4)
    with pytest.raises(InvalidRequest, match="chunk_tokens: 0"):
        chain(ROOT, b"", 0)
    with pytest.raises(InvalidRequest, match="extra: "):
        chain(ROOT, pack_tokens([1]), 1, bytes(MAX_EXTRA_BYTES + 1))
