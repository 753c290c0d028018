"""Spaces: every field counts, and what is malformed is named."""

import dataclasses

import pytest

from kvtier.encodings import ENCODINGS
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
        "encoding": "kivi-int8",
    }.items()
}


@pytest.mark.parametrize("field", OTHERS)
def test_each_field_decides_the_digest_and_is_named(field: str) -> None:
    other = OTHERS[field]
    assert other.digest != SPACE.digest
    assert SPACE.differing_fields(other) == [field]
    assert other.differing_fields(SPACE) == [field]


def test_every_field_is_covered_above() -> None:
    encoded = OTHERS["layout.encoding"]
    assert set(encoded.named_fields()) == {*OTHERS, "layout.rank", "format_version"}
    named = {f"layout.{field.name}" for field in dataclasses.fields(Layout)}
    assert named | {field.name for field in dataclasses.fields(Space)} - {"layout"} == set(
        encoded.named_fields()
    )


def test_rank_decides_the_digest() -> None:
    ranks = [Layout("int8", 1, 1, 1, rank=rank, ranks=2) for rank in (0, 1)]
    assert Space("m", ranks[0]).digest != Space("m", ranks[1]).digest


def test_digest_and_json_are_stable() -> None:
    assert Space.from_json(SPACE.to_json()) == SPACE
    assert Space("model", LAYOUT, "w", "r", "t").digest == SPACE.digest
    # Changing what is hashed must raise FORMAT_VERSION; this value then changes with it.
    assert FORMAT_VERSION == 1
    assert SPACE.digest.hex()[:16] == "eff25aeb82c1c988"


# What an exact space was before layouts had an encoding: on disks, and at the root of keys.
OLD_JSON = (
    b'{"format_version": 1, "layout": {"axes": "layer,plane,head,token,dim", "dtype": "bfloat16", '
    b'"head_dim": 8, "heads": 2, "layers": 3, "planes": 2, "rank": 0, "ranks": 1, "tokens": 16}, '
    b'"model": "model", "rope": "r", "tenant": "t", "weights": "w"}'
)
OLD_DIGEST = "eff25aeb82c1c988d724d2aebff8ea88916f53d00388dec86ded28b840a1d4e2"


def test_an_exact_space_is_what_it_was_before_there_were_encodings() -> None:
    assert SPACE.digest.hex() == OLD_DIGEST
    assert SPACE.to_json() == OLD_JSON
    assert Space.from_json(OLD_JSON) == SPACE
    assert "layout.encoding" not in SPACE.named_fields()
    said = OLD_JSON.replace(b'"dtype"', b'"encoding": "exact", "dtype"')
    assert Space.from_json(said).digest.hex() == OLD_DIGEST


def test_encodings_differ_from_each_other_in_one_field() -> None:
    spaces = [
        dataclasses.replace(SPACE, layout=dataclasses.replace(LAYOUT, encoding=encoding))
        for encoding in ENCODINGS
    ]
    assert len({space.digest for space in spaces}) == len(spaces) == 3
    assert [space.digest.hex()[:16] for space in spaces] == [
        "eff25aeb82c1c988",
        "1738a97c0e6a6016",
        "63aa887e4160881c",
    ]
    for one in spaces:
        assert Space.from_json(one.to_json()) == one
        for other in spaces:
            differing = ["layout.encoding"] if one is not other else []
            assert one.differing_fields(other) == differing


def test_nbytes_and_shape() -> None:
    assert LAYOUT.shape == (3, 2, 2, 16, 8)
    assert LAYOUT.nbytes == 3 * 2 * 2 * 16 * 8 * 2
    assert Layout("int8", 3, 2, 8, axes="token,dim,head,plane,layer").shape == (256, 8, 2, 2, 3)
    for dtype, itemsize in ITEM_BYTES.items():
        assert Layout(dtype, 1, 1, 1, tokens=1, planes=1).nbytes == itemsize


def test_nbytes_of_a_quantised_chunk() -> None:
    """Counted by hand: codes, minima, scales, of keys and of values, each filled up to 16 bytes."""
    for encoding, dtype, tokens, head_dim, nbytes in (
        ("kivi-int8", "bfloat16", 16, 8, 128 + 128 + 16 + 32 + 16 + 32),
        ("kivi-int8", "float32", 256, 64, 2 * 16_384 + 256 + 1024 + 128 + 512),
        ("kivi-int4-g32", "bfloat16", 16, 8, 64 + 64 + 16 + 32 + 16 + 32),
        ("kivi-int4-g32", "float16", 256, 128, 2 * 16_384 + 2048 + 512 + 2048 + 512),
        ("kivi-int4-g32", "float32", 33, 5, 112 + 112 + 48 + 144 + 32 + 80),
    ):
        layout = Layout(dtype, 3, 2, head_dim, tokens, encoding=encoding)
        assert layout.nbytes == 3 * 2 * nbytes
        assert layout.shape == (3, 2, 2, tokens, head_dim)
        one_layer = dataclasses.replace(layout, layers=1)
        assert one_layer.nbytes == 2 * nbytes


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
        ({"layers": 4096, "heads": 4096, "head_dim": 4096, "encoding": "kivi-int8"}, "bytes"),
        ({"encoding": "kivi-int4"}, "layout.encoding: 'kivi-int4' is not one of"),
        ({"encoding": ""}, "layout.encoding: '' is not one of"),
        ({"encoding": "kivi-int8", "planes": 1}, "layout.planes: 1 given, .* takes 2; or keep"),
        ({"encoding": "kivi-int8", "dtype": "int8"}, "layout.dtype: 'int8' given"),
        ({"encoding": "kivi-int8", "dtype": "float8_e4m3fn"}, "layout.dtype"),
        ({"encoding": "kivi-int8", "dtype": "float64"}, "layout.dtype"),
        ({"encoding": "kivi-int4-g32", "axes": "plane,layer,head,token,dim"}, "layout.axes"),
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
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"layout": 1}',
        b'{"layout": {}, "x": 1}',
        b"\xff",
        OLD_JSON.replace(b'"dtype"', b'"encoding": 8, "dtype"'),
        OLD_JSON.replace(b'"dtype"', b'"encoding": [], "dtype"'),
        OLD_JSON.replace(b'"dtype"', b'"encoding": "kivi-int5", "dtype"'),
    ],
)
def test_what_is_no_space_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"space|layout\.encoding"):
        Space.from_json(text)
