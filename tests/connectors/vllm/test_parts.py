"""Layers become parts: what is stored together, what never is, and what is refused."""

import itertools
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvtier.connectors.vllm.parts import (
    LayerCache,
    Model,
    Part,
    Shard,
    canonical,
    check_layer,
    parts_of,
)
from kvtier.errors import InvalidRequest
from tests.connectors.vllm.making import MODEL, layer


def part_of(*layers: LayerCache, model: Model = MODEL, shard: Shard | None = None) -> Part:
    (found,) = parts_of(layers, model, shard or Shard(), 8)
    return found


def named(part: Part) -> list[str]:
    return [name for name, _ in part.layers]


def test_layers_of_one_kind_make_a_part_and_others_make_theirs() -> None:
    layers = [
        layer("l.0", 0),
        layer("l.1", 1, window=16),
        layer("l.2", 2),
        layer("l.3", 1, window=16),
        layer("l.4", 3, window=32),
        layer("l.5", 0, heads=4),
        layer("l.6", 0, dtype="bfloat16", content_bytes=8),
    ]
    found = parts_of(layers, MODEL, Shard(), 8)
    assert [named(part) for part in found] == [
        ["l.0", "l.2"], ["l.1", "l.3"], ["l.4"], ["l.5"], ["l.6"],
    ]  # fmt: skip
    assert [part.window for part in found] == [None, 16, 32, None, None]
    assert [part.groups for part in found] == [
        ((0, 4), (2, 4)), ((1, 4),), ((3, 4),), ((0, 4),), ((0, 4),),
    ]  # fmt: skip
    assert len({part.digest for part in found}) == 5
    assert all(part.digest == part.space.digest for part in found)


@given(st.permutations([f"model.layers.{index}.attn" for index in (0, 1, 2, 9, 10, 11, 100)]))
def test_layers_are_in_natural_order_however_they_come(names: list[str]) -> None:
    part = part_of(*(layer(name) for name in names))
    assert [int(name.split(".")[2]) for name in named(part)] == [0, 1, 2, 9, 10, 11, 100]
    assert part.digest == part_of(*(layer(name) for name in sorted(names))).digest


def test_the_arrangement_in_groups_does_not_matter() -> None:
    together = part_of(layer("l.0", 0), layer("l.1", 0), layer("l.2", 0))
    apart = part_of(layer("l.0", 2), layer("l.1", 0), layer("l.2", 1))
    assert together.digest == apart.digest
    assert apart.layers == (("l.0", 2), ("l.1", 0), ("l.2", 1))


@pytest.mark.parametrize(
    "other",
    [
        {"window": 16},
        {"heads": 3},
        {"key_dim": 3, "value_dim": 3},
        {"dtype": "float16"},
        {"dtype": "fp4_x", "content_bytes": 7},
        {"quantised": True},
        {"quantised": True, "content_bytes": 17},
        {"packing": "CPU_ATTN amx"},
        {"block_tokens": 8},  # back ends arrange a block as they like, so its size matters
    ],
    ids=str,
)
def test_layers_of_another_shape_are_in_another_space(other: dict[str, Any]) -> None:
    assert part_of(layer(**other)).digest != part_of(layer()).digest


def test_every_difference_that_matters_is_in_the_digest() -> None:
    models = [
        MODEL,
        replace(MODEL, name="Other"),
        replace(MODEL, settings={"layers": 2}),
        replace(MODEL, settings={"layers": 1, "more": None}),
        replace(MODEL, weights="v"),
        replace(MODEL, rope="x"),
        replace(MODEL, tenant="t"),
    ]
    shards = [
        Shard(), Shard(0, 2), Shard(1, 2), Shard(0, 4), Shard(1, 4),
        Shard(stage=0, stages=2), Shard(stage=1, stages=2), Shard(stage=1, stages=3),
        Shard(1, 2, 1, 2),
    ]  # fmt: skip
    pairs = list(itertools.product(models, shards))
    digests = {part_of(layer(), model=model, shard=shard).digest for model, shard in pairs}
    assert len(digests) == len(pairs)


def test_other_layers_of_the_same_shape_are_in_another_space() -> None:
    """Pipelines may be split at other layers, quantised caches may leave out others."""
    mine = [layer(f"model.layers.{index}.attn") for index in range(8, 20)]
    theirs = [layer(f"model.layers.{index}.attn") for index in range(10, 22)]
    middle = Shard(stage=1, stages=3)
    assert part_of(*mine, shard=middle).digest != part_of(*theirs, shard=middle).digest


def test_keys_and_values_lie_together() -> None:
    layout = part_of(layer("l.0"), layer("l.1")).space.layout
    assert (layout.layers, layout.heads, layout.tokens) == (2, 2, 8)
    assert (layout.planes, layout.head_dim, layout.dtype) == (2, 2, "float32")
    assert layout.nbytes == 2 * 2 * 8 * 16


def test_a_latent_cache_has_one_plane() -> None:
    latent = layer(kind="mla_attention", heads=1, key_dim=5, value_dim=0, content_bytes=20)
    layout = part_of(latent).space.layout
    assert (layout.planes, layout.head_dim, layout.heads) == (1, 5, 1)


def test_keys_and_values_of_different_size_have_one_plane() -> None:
    layout = part_of(layer(key_dim=3, value_dim=2, content_bytes=20)).space.layout
    assert (layout.planes, layout.head_dim) == (1, 5)


@pytest.mark.parametrize("other", [{"quantised": True}, {"dtype": "float4_e2m1fn_x2"}], ids=str)
def test_what_is_packed_in_the_engines_way_is_bytes(other: dict[str, Any]) -> None:
    layout = part_of(layer(content_bytes=9, **other)).space.layout
    assert (layout.dtype, layout.planes, layout.head_dim, layout.itemsize) == ("uint8", 1, 9, 1)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (layer("l.7", kind="MambaSpec"), ["l.7", "MambaSpec"]),
        (layer("l.7", kind="ChunkedLocalAttentionSpec"), ["l.7", "ChunkedLocalAttentionSpec"]),
        (layer("l.7", kind="CrossAttentionSpec"), ["l.7", "CrossAttentionSpec"]),
        (layer("l.7", tokens_per_state=4), ["l.7", "4 tokens per state"]),
        (layer("l.7", tokens_per_state=0.5), ["l.7", "0.5 tokens per state"]),
        (layer("l.7", block_tokens=16), ["chunk_tokens", "8", "16"]),
        (layer("l.7", block_tokens=3), ["chunk_tokens", "8", "3"]),
        (layer("l.7", window=7), ["chunk_tokens", "8", "window 7", "l.7"]),
    ],
    ids=["mamba", "chunked", "cross", "packed", "spread", "block", "odd block", "window"],
)
def test_what_cannot_be_kept_is_refused_by_name(bad: LayerCache, says: list[str]) -> None:
    for refuse in (
        lambda: check_layer(bad, 8),
        lambda: parts_of([layer(), bad], MODEL, Shard(), 8),
    ):
        with pytest.raises(InvalidRequest) as caught:
            refuse()
        assert all(word in str(caught.value) for word in says)


def test_a_chunk_as_large_as_the_window_is_allowed() -> None:
    check_layer(layer(window=8), 8)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no attention layers"):
        parts_of([], MODEL, Shard(), 8)


@given(
    tokens=st.integers(1, 200),
    window=st.none() | st.integers(8, 60),
)
def test_the_first_chunk_needed_is_the_first_that_the_next_token_sees(
    tokens: int, window: int | None
) -> None:
    part = part_of(layer(window=window))
    sees = range(0 if window is None else max(0, tokens - window + 1), tokens + 1)
    assert part.first_needed(tokens) == sees[0] // 8


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.none()), max_size=5))
def test_equal_settings_are_written_alike(given_settings: dict[str, Any]) -> None:
    backwards = dict(reversed(given_settings.items()))
    assert canonical(given_settings) == canonical(backwards)
