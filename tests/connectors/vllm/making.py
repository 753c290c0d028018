"""Parts, settings and requests for the tests of this folder."""

from collections.abc import Sequence
from typing import Any

from kvtier.connectors.vllm.keys import Chains
from kvtier.connectors.vllm.parts import LayerCache, Model, Part, Shard, parts_of
from kvtier.connectors.vllm.settings import Settings
from kvtier.connectors.vllm.tracking import Tracked
from tests.connectors.vllm.simulated_pool import FakeRequest

MODEL = Model(name="Tiny", settings={"layers": 1}, weights="w", rope="", tenant="")
BLOCK = 4  # tokens


def layer(name: str = "model.layers.0.attn", group: int = 0, **more: Any) -> LayerCache:
    """A small attention layer: two heads of 2 + 2 float32 elements, blocks of 4 tokens."""
    fields: dict[str, Any] = {
        "kind": "full_attention" if more.get("window") is None else "sliding_window",
        "block_tokens": BLOCK,
        "heads": 2,
        "key_dim": 2,
        "value_dim": 2,
        "dtype": "float32",
        "content_bytes": 16,
        **more,
    }
    return LayerCache(name=name, group=group, **fields)


def parts(
    windows: Sequence[int | None] = (None,),
    *,
    chunk: int = 2 * BLOCK,
    shard: Shard | None = None,
    block: int = BLOCK,
    model: Model = MODEL,
) -> tuple[Part, ...]:
    """A part for each window; its only layer is in a cache group of its own."""
    layers = [
        layer(f"model.layers.{group}.attn", group, window=window, block_tokens=block)
        for group, window in enumerate(windows)
    ]
    return parts_of(layers, model, shard or Shard(), chunk)


def settings(chunk: int = 2 * BLOCK, **more: Any) -> Settings:
    """Settings with small chunks that wait for nothing."""
    return Settings.parse({"chunk_tokens": chunk, "lookup_wait_ms": 0, **more})


def request(tokens: int, *, prompt: int | None = None, name: str = "r", **more: Any) -> FakeRequest:
    """A request of that many known tokens, of which `prompt` are its prompt's."""
    ids = list(range(1000, 1000 + tokens))
    return FakeRequest(name, ids, tokens if prompt is None else prompt, 100, **more)


def tracked(
    asked: FakeRequest, of: Sequence[Part], extra: bytes = b"", chunk: int = 2 * BLOCK
) -> Tracked:
    """What the scheduler's side remembers of a new request."""
    chains = Chains([part.digest for part in of], chunk)
    return Tracked(asked, lambda place: extra, chains, (0,) * len(of))


def block_table(*, tokens: int, first: int = 1, groups: int = 1) -> list[list[int]]:
    """A table for that many tokens: consecutive blocks, group after group."""
    blocks = -(-tokens // BLOCK)
    return [
        list(range(first + group * blocks, first + (group + 1) * blocks)) for group in range(groups)
    ]
