"""What is stored together: the engine's KV cache groups, sorted into parts, each with its space.

vLLM keeps its cache in groups of layers that share a block table. Layers whose KV has one shape and
one lifetime make a *part*: full attention, or a sliding window. Each part of each rank has a space
of its own, so ranks, windows and stages are never mixed up; a prefix is a hit where all parts are.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.errors import InvalidRequest
from kvtier.spaces import ITEM_BYTES, Layout, Space

# How vLLM's pages read, head by head. A back end may arrange the inside of a block otherwise.
AXES = "layer,head,token,plane,dim"
KINDS = {"full_attention", "mla_attention", "sliding_window"}


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One attention layer as the engine describes it.

    `kind` is one of `KINDS`, or the engine's name of what cannot be kept; `content_bytes` is what
    one token and head occupies; `quantised`: in some format of the engine's own; `packing` names
    what decides how the back end arranges a block.
    """

    name: str
    group: int
    kind: str
    block_tokens: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: str
    content_bytes: int
    window: int | None = None
    quantised: bool = False
    packing: str = ""
    tokens_per_state: float = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """Which share of the model's KV a worker has: of `ranks` different shares by tensor
    parallelism, and of the layers by pipeline stage."""

    rank: int = 0
    ranks: int = 1
    stage: int = 0
    stages: int = 1


@dataclass(frozen=True, slots=True)
class Model:
    """What tells this engine's KV from another's. `settings` is everything that decides the KV
    besides the weights, in the engine's words."""

    name: str
    settings: dict[str, Any]
    weights: str
    rope: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Part:
    """Layers stored together. `layers` are (name, group) in the order of the chunk's layer axis;
    `groups` are the cache groups whose blocks hold them, with the tokens of a block; `window` is
    how many tokens back the layers look, None for all."""

    space: Space
    digest: bytes
    window: int | None
    layers: tuple[tuple[str, int], ...]
    groups: tuple[tuple[int, int], ...]

    def first_needed(self, tokens: int) -> int:
        """The first chunk that a prefix of `tokens` tokens needs of this part."""
        if self.window is None:
            return 0
        return max(0, tokens - (self.window - 1)) // self.space.layout.tokens


def parts_of(
    layers: Iterable[LayerCache], model: Model, shard: Shard, chunk_tokens: int
) -> tuple[Part, ...]:
    """Sort a worker's layers into parts.

    Raises InvalidRequest, naming the layer or the setting, for layers that cannot be reused by
    prefix and for a chunk size that does not fit the engine's blocks or windows.
    """
    kinds: dict[tuple[Any, ...], list[LayerCache]] = {}
    for layer in sorted(layers, key=lambda layer: _natural(layer.name)):
        check_layer(layer, chunk_tokens)
        same = (layer.window, layer.heads, layer.key_dim, layer.value_dim, layer.dtype,
                layer.content_bytes, layer.quantised)  # fmt: skip
        kinds.setdefault(same, []).append(layer)
    if not kinds:
        raise InvalidRequest("model: it has no attention layers whose KV could be kept")
    return tuple(_part(alike, model, shard, chunk_tokens) for alike in kinds.values())


def check_layer(layer: LayerCache, chunk_tokens: int) -> None:
    """Raise InvalidRequest unless the layer's KV can be cut in chunks of that many tokens."""
    if layer.kind not in KINDS:
        raise InvalidRequest(
            f"model: layer {layer.name} is {layer.kind}; kvtier keeps full attention, MLA and "
            "sliding windows only, so run this model without it"
        )
    if layer.tokens_per_state != 1:
        raise InvalidRequest(
            f"model: layer {layer.name} stores {layer.tokens_per_state} tokens per state; "
            "only 1 is supported"
        )
    if chunk_tokens % layer.block_tokens:
        raise InvalidRequest(
            f"kv_connector_extra_config.chunk_tokens: {chunk_tokens} is not a multiple of vLLM's "
            f"block size {layer.block_tokens}; use a multiple of it"
        )
    if layer.window is not None and chunk_tokens > layer.window:
        raise InvalidRequest(
            f"kv_connector_extra_config.chunk_tokens: {chunk_tokens} is more than the sliding "
            f"window {layer.window} of layer {layer.name}; use at most {layer.window}"
        )


def _part(alike: Sequence[LayerCache], model: Model, shard: Shard, chunk_tokens: int) -> Part:
    first = alike[0]
    name = "full" if first.window is None else f"window-{first.window}"
    if shard.stages > 1:
        name += f".stage-{shard.stage}-of-{shard.stages}"
    # Back ends pack a block as they like, so blocks are moved as they are: their size matters.
    described = {
        "settings": model.settings,
        "layers": [layer.name for layer in alike],
        "block_tokens": sorted({layer.block_tokens for layer in alike}),
        "packing": sorted({layer.packing for layer in alike}),
    }
    identity = hashlib.sha256(canonical(described).encode()).hexdigest()[:16]
    space = Space(
        model=f"vllm/{model.name}/{identity}/{name}",
        layout=_layout(first, len(alike), shard, chunk_tokens),
        weights=model.weights,
        rope=model.rope,
        tenant=model.tenant,
    )
    return Part(
        space=space,
        digest=space.digest,
        window=first.window,
        layers=tuple((layer.name, layer.group) for layer in alike),
        groups=tuple(sorted({(layer.group, layer.block_tokens) for layer in alike})),
    )


def _layout(layer: LayerCache, layers: int, shard: Shard, chunk_tokens: int) -> Layout:
    dtype, planes, dim = layer.dtype, 1, layer.key_dim + layer.value_dim
    if layer.quantised or layer.dtype not in ITEM_BYTES:
        dtype, dim = "uint8", layer.content_bytes  # bytes as they are; their meaning is settings'
    elif layer.key_dim == layer.value_dim:
        planes, dim = 2, layer.key_dim
    return Layout(
        dtype=dtype,
        layers=layers,
        heads=layer.heads,
        head_dim=dim,
        tokens=chunk_tokens,
        planes=planes,
        axes=AXES,
        rank=shard.rank,
        ranks=shard.ranks,
    )


def canonical(settings: Any) -> str:
    """Settings as JSON that is the same for equal settings."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), default=str)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
