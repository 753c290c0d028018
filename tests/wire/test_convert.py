"""A space means the same on both ends of the wire."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.client.connection import to_message
from kvtier.encodings import ENCODINGS, EXACT, QUANTISED_DTYPES
from kvtier.errors import InvalidRequest
from kvtier.proto import cache_pb2 as pb
from kvtier.service.convert import space_of
from kvtier.spaces import CANONICAL_AXES, ITEM_BYTES, Layout, Space

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
LAYOUT = Layout("bfloat16", 2, 2, 8, tokens=16)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    encoding = draw(st.sampled_from(ENCODINGS))
    exact = encoding == EXACT
    ranks = draw(st.integers(1, 9))
    layout = Layout(
        dtype=draw(st.sampled_from(sorted(ITEM_BYTES) if exact else QUANTISED_DTYPES)),
        layers=draw(st.integers(1, 9)),
        heads=draw(st.integers(1, 9)),
        head_dim=draw(st.integers(1, 99)),
        tokens=draw(st.integers(1, 99)),
        planes=draw(st.integers(1, 8)) if exact else 2,
        axes=",".join(draw(st.permutations(CANONICAL_AXES.split(","))))
        if exact
        else CANONICAL_AXES,
        rank=draw(st.integers(0, ranks - 1)),
        ranks=ranks,
        encoding=encoding,
    )
    model = draw(TEXTS.filter(bool))
    return Space(model, layout, weights=draw(TEXTS), rope=draw(TEXTS), tenant=draw(TEXTS))


@given(space=spaces())
def test_a_space_comes_over_the_wire_as_it_is(space: Space) -> None:
    arrived = space_of(pb.Space.FromString(to_message(space).SerializeToString()))
    assert arrived == space
    assert arrived.digest == space.digest
    assert arrived.layout.nbytes == space.layout.nbytes


def test_a_client_older_than_the_field_means_exact() -> None:
    message = to_message(Space("m", LAYOUT))
    message.layout.ClearField("encoding")
    assert space_of(message) == Space("m", LAYOUT)


def test_an_encoding_that_is_not_known_is_named() -> None:
    message = to_message(Space("m", LAYOUT))
    message.layout.encoding = "zip"
    with pytest.raises(InvalidRequest, match=r"layout\.encoding: 'zip' is not one of"):
        space_of(message)


def test_a_service_older_than_the_field_opens_another_space() -> None:
    """It sees the space as it was before the field: its digest gives that away to the client."""
    quantised = Space("m", dataclasses.replace(LAYOUT, encoding="kivi-int8"))
    message = to_message(quantised)
    message.layout.ClearField("encoding")
    assert space_of(message).digest != quantised.digest
