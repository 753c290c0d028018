"""Keys of a request's chunks as its tokens become known, and what besides the tokens is in them."""

import math
from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from kvtier.chunks import chain, pack_tokens
from kvtier.connectors.vllm.keys import Chains, digest_of

ROOTS = [bytes([number]) * 32 for number in (1, 2)]
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=60)


def extra_of(place: int) -> bytes:
    return b"" if place % 3 else bytes([place])


@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 60)), width=st.integers(1, 7))
def test_keys_do_not_depend_on_when_tokens_became_known(
    tokens: list[int], cuts: list[int], width: int
) -> None:
    grown, at_once = Chains(ROOTS, width), Chains(ROOTS, width)
    for cut in sorted(cuts):
        grown.extend(tokens[:cut], extra_of)
    grown.extend(tokens, extra_of)
    at_once.extend(tokens, extra_of)
    full = len(tokens) // width
    assert grown.chunks == at_once.chunks == full
    for root in ROOTS:
        extras = [extra_of(place) for place in range(full)]
        expected = chain(root, pack_tokens(tokens), width, extras)
        assert grown.run(root, 0, full) == at_once.run(root, 0, full) == expected


@given(tokens=TOKENS, width=st.integers(1, 7), data=st.data())
def test_a_run_is_a_slice_that_knows_its_parent(
    tokens: list[int], width: int, data: st.DataObject
) -> None:
    chains = Chains(ROOTS, width)
    chains.extend(tokens, extra_of)
    whole = chains.run(ROOTS[0], 0, chains.chunks)
    first = data.draw(st.integers(0, chains.chunks))
    stop = data.draw(st.integers(first, chains.chunks))
    assert chains.run(ROOTS[0], first, stop) == whole[first:stop]


def test_all_that_one_request_does_has_its_number_wherever_it_is_done() -> None:
    chains, others = Chains(ROOTS, 2), Chains(ROOTS, 2)
    for each in (chains, others):
        each.extend(range(10), extra_of)
    looked_up = chains.run(ROOTS[0], 0, 5)
    offloaded = chains.run(ROOTS[1], 2, 5)[1:]
    assert looked_up.request == offloaded.request != 0
    assert others.run(ROOTS[0], 0, 5).request != looked_up.request
    chains.extend(range(20), extra_of)  # it goes on
    assert chains.run(ROOTS[0], 5, 10).request == looked_up.request


@given(tokens=TOKENS.filter(len))
def test_spaces_share_no_key(tokens: list[int]) -> None:
    chains = Chains(ROOTS, 1)
    chains.extend(tokens, extra_of)
    mine, theirs = (set(chains.run(root, 0, len(tokens))) for root in ROOTS)
    assert not mine & theirs


def test_an_extra_changes_its_chunk_and_all_that_follow() -> None:
    def keys(marked: int) -> tuple[bytes, ...]:
        chains = Chains(ROOTS, 2)
        chains.extend(range(10), lambda place: b"x" if place == marked else b"")
        return chains.run(ROOTS[0], 0, 5).keys

    plain = keys(-1)
    for marked in range(5):
        same = [mine == theirs for mine, theirs in zip(keys(marked), plain, strict=True)]
        assert same == [place < marked for place in range(5)]


def test_extras_are_asked_once_for_each_chunk() -> None:
    asked: list[int] = []

    def extra(place: int) -> bytes:
        asked.append(place)
        return b""

    chains = Chains(ROOTS, 4)
    for known in range(0, 24, 3):
        chains.extend(range(known), extra)
    assert asked == [0, 1, 2, 3, 4]


LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.characters()
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@given(NESTED, NESTED, st.text(max_size=3), st.text(max_size=3))
def test_no_two_different_extras_share_a_digest(
    mine: Any, theirs: Any, more: str, other: str
) -> None:
    same = ascii((mine, more)) == ascii((theirs, other))
    assert (digest_of(mine, more) == digest_of(theirs, other)) == same


def test_extras_that_look_alike_are_told_apart() -> None:
    alike: list[tuple[Any, ...]] = [
        (None,), ("None",), (b"None",), ("b'None'",), (1,), ("1",), (True,), (1.0,),
        (("a", "b"),), (("a",), "b"), ("a", "b"), ("ab",), ("a', 'b",), (("a", "b", ""),),
        ("\ud800",), ("\\ud800",), ("\udfff",), ("é",), ("e\u0301",), ("\x00",), ("",), (b"",),
        (("mm", "x", 1), ("mm", "y", 2)), (("mm", "x", 2), ("mm", "y", 1)), (("mm", "x", -1),),
    ]  # fmt: skip
    digests = [digest_of(*each) for each in alike]
    assert len({*digests}) == len(alike)
    assert {len(digest) for digest in digests} == {32}
    assert digest_of(math.nan) == digest_of(math.nan)


def test_an_extra_of_any_size_has_a_digest() -> None:
    huge = "s" * 10_000_000
    assert len(digest_of((("cache_salt", huge),))) == 32
    assert digest_of((("cache_salt", huge),)) != digest_of((("cache_salt", huge + "s"),))
