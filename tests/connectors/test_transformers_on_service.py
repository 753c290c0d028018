"""The connector on the real client: in one process, and against a sidecar by both data paths."""
# ruff: noqa: E402 - the modules under test need the engine, which may be absent

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import kvtier
from kvtier.client import Client
from kvtier.connectors.transformers import PrefixCache, space_of
from kvtier.spaces import Space
from tests.connectors.test_transformers import CHUNK, on_top_of_live, prompt, shape
from tests.sidecar import Sidecar

FIRST = prompt()
OTHER = torch.cat([FIRST[:, :64], prompt(2, 9)], dim=-1)  # four chunks in common


def embedded(space: Space, disk: Path) -> Client:
    return kvtier.open(space, cpu="16MiB", disk=str(disk), disk_capacity="64MiB", deadline_s=20)


def offloaded(model: Any, client: Client) -> Any:
    """Prefill and offload the first prompt; the other's logits on top of the live cache."""
    kv = PrefixCache(model, client)
    cold = kv.prefill(FIRST)
    written = kv.offload(FIRST, cold.cache)
    assert (cold.reused_tokens, written.chunks) == (0, 4)
    assert sorted(written.outcome.stored) == [0, 1, 2, 3]
    assert kv.offload(FIRST, cold.cache).chunks == 0
    return on_top_of_live(model, cold.cache, OTHER, 64)


def check_reuse(model: Any, client: Client, expected: Any) -> None:
    warm = PrefixCache(model, client).prefill(OTHER)
    assert warm.reused_tokens == 64
    assert torch.equal(warm.logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_one_process_and_across_a_restart(tmp_path: Path, dtype: Any) -> None:
    model = shape("qwen2", dtype)
    space = space_of(model, chunk_tokens=CHUNK)
    with embedded(space, tmp_path) as client:
        expected = offloaded(model, client)
        check_reuse(model, client, expected)
    assert PrefixCache(model, client).prefill(OTHER).reused_tokens == 0  # closed: a miss
    with embedded(space, tmp_path) as client:
        check_reuse(model, client, expected)


@pytest.mark.parametrize("path", ["shm", "inline"])
def test_a_prompt_that_leaves_a_chunk_half_way(tmp_path: Path, path: str) -> None:
    """From RAM, and from disk once the tokens are known again."""
    model = shape("llama-gqa")
    space = space_of(model, chunk_tokens=CHUNK)
    other = FIRST.clone()
    other[0, 40:] = (other[0, 40:] + 1) % 128
    with Sidecar(tmp_path) as sidecar:
        kv = PrefixCache(model, sidecar.client(space, path=path))
        live = kv.prefill(FIRST).cache
        kv.offload(FIRST, live)
        expected = on_top_of_live(model, live, other, 40)
        for _ in range(2):
            warm = PrefixCache(model, sidecar.client(space, path=path)).prefill(other)
            assert warm.reused_tokens == 40
            assert torch.equal(warm.logits, expected)
            assert sidecar.stats().counters["load_partial_tokens"] == 8
            assert sidecar.terminate() == 0
            sidecar.start()
            kv = PrefixCache(model, sidecar.client(space, path=path))
            assert kv.prefill(other).reused_tokens == 32
            kv.offload(FIRST, live)  # all held: it only tells the tokens
        assert sidecar.stats().counters["unverified_tokens"] == 0


@pytest.mark.parametrize("path", ["shm", "inline"])
def test_with_a_sidecar_restarted_and_killed(tmp_path: Path, path: str) -> None:
    model = shape("llama-gqa")
    space = space_of(model, chunk_tokens=CHUNK)
    with Sidecar(tmp_path) as sidecar:
        expected = offloaded(model, sidecar.client(space, path=path))
        check_reuse(model, sidecar.client(space, path=path), expected)
        assert sidecar.terminate() == 0
        sidecar.start()
        client = sidecar.client(space, path=path)
        check_reuse(model, client, expected)
        sidecar.kill()
        alone = PrefixCache(model, client).prefill(OTHER)
        assert alone.reused_tokens == 0
        assert alone.logits.argmax() == expected.argmax()
