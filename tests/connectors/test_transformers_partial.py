"""Reuse of the part of a chunk before the divergence, on tiny random models: to the last bit."""
# ruff: noqa: E402 - the modules under test need the engine, which may be absent

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvtier.connectors.transformers import space_of
from kvtier.connectors.transformers_cache import Courier, KvShape, Room, planes
from tests.connectors.fake_client import FakeClient
from tests.connectors.test_transformers import (
    CHUNK,
    answer,
    bits,
    kv,
    layers,
    on_top_of_live,
    prompt,
    recomputed,
    shape,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("common", [1, 15, 33, 63])
def test_the_part_of_a_chunk_before_the_divergence_is_reused(common: int, dtype: Any) -> None:
    model = shape("llama-gqa", dtype)
    client = FakeClient(space_of(model, chunk_tokens=CHUNK))
    first, rest = prompt(), prompt(2)
    cold = kv(model, client).prefill(first)
    live = copy.deepcopy(cold.cache)
    kv(model, client).offload(first, cold.cache)
    rest[0, common] = (first[0, common] + 1) % 128  # else they may agree in more by chance
    other = torch.cat([first[:, :common], rest[:, common:]], dim=-1)

    warm = kv(model, client).prefill(other)

    assert warm.reused_tokens == common
    assert warm.loaded_bytes == common * client.space.layout.nbytes // CHUNK
    for mine, theirs in zip(layers(warm.cache), layers(live), strict=True):
        for reloaded, kept in zip(planes(mine), planes(theirs), strict=True):
            assert torch.equal(bits(reloaded[:, :, :common]), bits(kept[:, :, :common]))
    assert torch.equal(warm.logits, on_top_of_live(model, live, other, common))
    _, expected = recomputed(model, other)
    assert answer(model, other, warm.logits, warm.cache) == expected


@pytest.mark.parametrize("tokens", [1, 7, CHUNK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_part_goes_by_the_buffers_of_a_device_as_directly(dtype: Any, tokens: int) -> None:
    """The way to another device, with buffers of this one in their place."""
    form = KvShape(3, 2, 8, dtype, torch.device("cpu"))
    layout = form.layout(CHUNK)
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (layout.nbytes,), generator=generator, dtype=torch.uint8)
    rooms = []
    for staging in (None, tuple(torch.empty(layout.shape, dtype=dtype) for _ in range(2))):
        courier, room = Courier(form, layout), Room(form, 3 * CHUNK, touch=True)
        courier._staging = staging
        courier.scatter(memoryview(data.numpy()), room, 1, tokens)
        rooms.append(bits(room.data))
    assert torch.equal(*rooms)
    written = rooms[0].view(3, 2, 2, 3 * CHUNK, -1)
    source = data.view(3, 2, 2, CHUNK, -1)
    assert torch.equal(written[:, :, :, CHUNK : CHUNK + tokens], source[:, :, :, :tokens])
    assert not written[:, :, :, :CHUNK].any()
    assert not written[:, :, :, CHUNK + tokens :].any()


@pytest.mark.parametrize(
    ("length", "reused"), [(1, 0), (2, 1), (16, 15), (17, 16), (18, 17), (64, 63), (65, 64)]
)
def test_the_last_token_is_always_computed(length: int, reused: int) -> None:
    model = shape("llama-gqa")
    client = FakeClient(space_of(model, chunk_tokens=CHUNK))
    cold = kv(model, client).prefill(prompt())
    kv(model, client).offload(prompt(), cold.cache)
    warm = kv(model, client).prefill(prompt()[:, :length])
    assert warm.reused_tokens == reused
    assert warm.cache.get_seq_length() == length
    whole, _ = recomputed(model, prompt()[:, :length])
    assert (warm.logits - whole).abs().max() < 1e-3
