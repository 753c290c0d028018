"""Spaces: every field counts, and what is malformed is named."""

import dataclasses

import pytest

from kvtier.errors import InvalidRequest
from kvtier.spaces import FORMAT_VERSION, ITEM_BYTES, MAX_TEXT_BYTES, Layout, Space

LAYOUT = Layout(dtype="bfloat16", layers=3, heads=2, head_dim=8, tokens=16)
SPACE = Space("model", LAYOUT, weights="w", rope="r", tenant="t")
OTHERS = {
    "model": dataclasses.replace(SPACE, model="model2"),
    "weights": dataclasses.replace(SPACE, weights="w2"),
    "rope": dataclasses.replace(SPACE, rope="r2"),
    "tenant": dataclasses.replace(SPACE, tenant="t2"),
} | {
    f"layout.{name}": dataclasses.replace(
        SPACE, layout=dataclasses.replace(LAYOUT, **{name: value})
    )
    for name, value in {
        "dtype": "float16",
        "layers": 4,
        "planes": 1,
        "heads": 3,
        "head_dim": 16,
        "tokens": 32,
        "axes": "plane,layer,head,token,dim",
        "ranks": 2,
    }.items()
}


@pytest.mark.parametrize("field", OTHERS)
def test_each_field_decides_the_digest_and_is_named(field: str) -> None:
    other = OTHERS[field]
    assert other.digest != SPACE.digest
    assert SPACE.differing_fields(other) == [field]
    assert other.differing_fields(SPACE) == [field]


def test_every_field_is_covered_above() -> None:
    assert set(SPACE.named_fields()) == {*OTHERS, "layout.rank", "format_version"}


def test_rank_decides_the_digest() -> None:
    ranks = [Layout("int8", 1, 1, 1, rank=rank, ranks=2) for rank in (0, 1)]
    assert Space("m", ranks[0]).digest != Space("m", ranks[1]).digest


def test_digest_and_json_are_stable() -> None:
    assert Space.from_json(SPACE.to_json()) == SPACE
    assert Space("model", LAYOUT, "w", "r", "t").digest == SPACE.digest
    # Changing what is hashed must raise FORMAT_VERSION; this value then changes with it.
    assert FORMAT_VERSION == 1
    assert SPACE.digest.hex()[:16] == "eff25aeb82c1c988"


def test_nbytes_and_shape() -> None:
    assert LAYOUT.shape == (3, 2, 2, 16, 8)
    assert LAYOUT.nbytes == 3 * 2 * 2 * 16 * 8 * 2
    assert Layout("int8", 3, 2, 8, axes="token,dim,head,plane,layer").shape == (256, 8, 2, 2, 3)
    for dtype, itemsize in ITEM_BYTES.items():
        assert Layout(dtype, 1, 1, 1, tokens=1, planes=1).nbytes == itemsize


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "int3"}, "layout.dtype"),
        ({"layers": 0}, "layout.layers"),
        ({"layers": 5000}, "layout.layers"),
        ({"heads": -1}, "layout.heads"),
        ({"tokens": 10**9}, "layout.tokens"),
        ({"planes": 9}, "layout.planes"),
        ({"axes": "layer,plane"}, "layout.axes"),
        ({"axes": "layer,layer,plane,head,token"}, "layout.axes"),
        ({"rank": 1}, "layout.rank"),
        ({"layers": 4096, "heads": 4096, "head_dim": 4096}, "bytes"),
    ],
)
def test_a_layout_out_of_range_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        dataclasses.replace(LAYOUT, **changes)  # type: ignore[arg-type]


def test_a_space_out_of_range_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"space\.tenant: 10000000 bytes"):
        dataclasses.replace(SPACE, tenant="x" * 10_000_000)
    assert dataclasses.replace(SPACE, tenant="x" * MAX_TEXT_BYTES)
    with pytest.raises(InvalidRequest, match=r"space\.model: empty"):
        dataclasses.replace(SPACE, model="")
    with pytest.raises(InvalidRequest, match="format_version: 2"):
        dataclasses.replace(SPACE, format_version=2)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"layout": 1}', b'{"layout": {}, "x": 1}', b"\xff"]
)
def test_what_is_no_space_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match="space"):
        Space.from_json(text)
