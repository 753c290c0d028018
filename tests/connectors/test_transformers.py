"""Prefill with reuse on tiny random models of every supported shape.

What is compared with what: KV that went through kvtier must be the same bits as the live KV it was
copied from, and logits computed on top of the two must differ by exactly 0. A prefill of the whole
prompt in one pass has matrix products of other shapes, so float rounding may differ: there the
greedy tokens must agree, and the logits nearly.
"""
# ruff: noqa: E402 - the modules under test need the engine, which may be absent

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvtier.connectors.transformers import PrefixCache, space_of
from kvtier.connectors.transformers_cache import ReservedLayer, planes
from kvtier.errors import InvalidRequest
from tests.connectors.fake_client import FakeClient

CHUNK = 16
PROMPT = 70  # four full chunks and six tokens
ANSWER = 12
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large weights, so that logits are far apart and tokens vary
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
SHAPES = {
    "llama": ("LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama-gqa": ("LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "llama-mqa": ("LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "llama-head-dim": (
        "LlamaConfig",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    ),
    "qwen2": ("Qwen2Config", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
}


def tiny(config: str, dtype: Any = torch.float32, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    configuration = getattr(transformers, config)(**{**SIZES, **settings})
    return transformers.AutoModelForCausalLM.from_config(configuration).to(dtype).eval()


def shape(name: str, dtype: Any = torch.float32, **settings: Any) -> Any:
    config, heads = SHAPES[name]
    return tiny(config, dtype, **heads, **settings)


def prompt(seed: int = 1, length: int = PROMPT) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 128, (1, length), generator=generator)


def answer(model: Any, input_ids: Any, logits: Any, cache: Any, tokens: int = ANSWER) -> list[int]:
    """Greedy tokens by transformers' own generate, on top of a prefilled cache."""
    so_far = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=-1)
    output = model.generate(
        so_far,
        attention_mask=torch.ones_like(so_far),
        past_key_values=cache,
        max_new_tokens=tokens - 1,
        do_sample=False,
    )
    return output[0, input_ids.shape[1] :].tolist()


def recomputed(model: Any, input_ids: Any) -> tuple[Any, list[int]]:
    """Logits after the prompt and the greedy answer by transformers alone."""
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=ANSWER,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0], output.sequences[0, input_ids.shape[1] :].tolist()


def on_top_of_live(model: Any, live: Any, input_ids: Any, tokens: int) -> Any:
    """Logits of the rest of a prompt on top of the first `tokens` tokens of a live cache."""
    live = copy.deepcopy(live)
    live.crop(tokens - live.get_seq_length())
    with torch.no_grad():
        output = model(input_ids=input_ids[:, tokens:], past_key_values=live, logits_to_keep=1)
    return output.logits[:, -1]


def kv(model: Any, client: FakeClient | None = None, **options: Any) -> PrefixCache:
    return PrefixCache(model, client or FakeClient(space_of(model, chunk_tokens=CHUNK)), **options)


@pytest.fixture
def model() -> Any:
    return shape("llama-gqa")


@pytest.fixture
def client(model: Any) -> FakeClient:
    return FakeClient(space_of(model, chunk_tokens=CHUNK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_reloaded_prefix_is_the_live_one_to_the_bit(name: str, dtype: Any) -> None:
    model = shape(name, dtype)
    client = FakeClient(space_of(model, chunk_tokens=CHUNK))
    first = prompt()
    cold = kv(model, client).prefill(first)
    assert (cold.reused_tokens, cold.loaded_bytes) == (0, 0)
    live = copy.deepcopy(cold.cache)
    kv(model, client).offload(first, cold.cache)

    other = torch.cat([first[:, :64], prompt(2, 9)], dim=-1)  # another question, same beginning
    warm = kv(model, client).prefill(other)

    assert (warm.reused_tokens, warm.tokens) == (64, 73)
    assert warm.loaded_bytes == 4 * client.space.layout.nbytes
    for mine, theirs in zip(warm.cache.layers, live.layers, strict=True):
        for reloaded, kept in zip(planes(mine), planes(theirs), strict=True):
            assert torch.equal(bits(reloaded[:, :, :64]), bits(kept[:, :, :64]))
    assert torch.equal(warm.logits, on_top_of_live(model, live, other, 64))
    whole, expected = recomputed(model, other)
    assert (warm.logits - whole).abs().max() <= TOLERANCE[dtype] * whole.abs().max()
    assert answer(model, other, warm.logits, warm.cache) == expected


def layers(cache: Any) -> list[Any]:
    found: list[Any] = cache.layers
    return found


def bits(tensor: Any) -> Any:
    """A tensor's bytes: NaNs and signed zeros count."""
    return tensor.contiguous().view(torch.uint8)


def test_corrupted_content_shows_in_the_logits(model: Any, client: FakeClient) -> None:
    """The negative control: the comparison above would see wrong bytes."""
    first = prompt()
    cold = kv(model, client).prefill(first)
    kv(model, client).offload(first, cold.cache)
    key = client.prefix(first[0].tolist())[0]
    good = client.held[key]
    right = kv(model, client).prefill(first).logits
    client.held[key] = bytes(len(good) // 2) + good[len(good) // 2 :]
    wrong = kv(model, client).prefill(first).logits
    assert (wrong - right).abs().max() > 0.1


def test_a_cold_prefill_is_what_transformers_computes(model: Any) -> None:
    """Same shapes of products, so the difference is exactly 0, first token and answer."""
    whole, expected = recomputed(model, prompt())
    cold = kv(model).prefill(prompt())
    assert torch.equal(cold.logits, whole)
    assert answer(model, prompt(), cold.logits, cold.cache) == expected


def test_generate_takes_a_restored_cache_and_the_whole_prompt(
    model: Any, client: FakeClient
) -> None:
    cold = kv(model, client).prefill(prompt())
    kv(model, client).offload(prompt(), cold.cache)
    for beams in (1, 3):
        options = {"max_new_tokens": ANSWER, "do_sample": False, "num_beams": beams}
        mask = torch.ones_like(prompt())
        expected = model.generate(prompt(), attention_mask=mask, **options)
        restored = kv(model, client).restore(prompt())
        assert restored.reused_tokens == 64
        if beams > 1:
            restored.cache.batch_repeat_interleave(beams)
        found = model.generate(
            prompt(), attention_mask=mask, past_key_values=restored.cache, **options
        )
        assert found.tolist() == expected.tolist()


def test_an_answer_longer_than_its_room_is_the_same(model: Any) -> None:
    prefix_cache = kv(model)
    roomy = prefix_cache.prefill(prompt())
    tight = prefix_cache.prefill(prompt(), max_new_tokens=3)
    expected = answer(model, prompt(), roomy.logits, roomy.cache)
    assert answer(model, prompt(), tight.logits, tight.cache) == expected
    assert layers(tight.cache)[0].room.tokens == PROMPT + 3


def test_the_answer_can_be_offloaded_too(model: Any, client: FakeClient) -> None:
    first = prefilled = kv(model, client).prefill(prompt())
    new = answer(model, prompt(), prefilled.logits, prefilled.cache, tokens=30)
    conversation = torch.cat([prompt(), torch.tensor([new])], dim=-1)
    written = kv(model, client).offload(conversation, prefilled.cache)
    assert written.chunks == 6  # 70 + 29 tokens have KV; the last one has none yet
    assert written.nbytes == 6 * client.space.layout.nbytes
    assert written.outcome.stored == (0, 1, 2, 3, 4, 5)
    warm = kv(model, client).prefill(torch.cat([conversation, prompt(3, 5)], dim=-1))
    assert warm.reused_tokens == 96
    reloaded, live = planes(warm.cache.layers[2])[0], planes(first.cache.layers[2])[0]
    assert torch.equal(reloaded[:, :, :96], live[:, :, :96])


def test_what_is_held_is_not_copied_again(model: Any, client: FakeClient) -> None:
    cold = kv(model, client).prefill(prompt())
    assert kv(model, client).offload(prompt(), cold.cache).chunks == 4
    again = kv(model, client).offload(prompt(), cold.cache)
    assert (again.chunks, again.nbytes, again.outcome.existing) == (0, 0, (0, 1, 2, 3))


def test_what_is_restored_and_offloaded_again_is_one_request(
    model: Any, client: FakeClient
) -> None:
    prefix_cache = kv(model, client)
    for _ in range(2):
        prefilled = prefix_cache.prefill(prompt())
        prefix_cache.offload(prompt(), prefilled.cache)
    first, again, other, other_again = client.requests
    assert first == again
    assert other == other_again
    assert len({first, other, 0}) == 3


def test_a_plain_dynamic_cache_can_be_offloaded(model: Any, client: FakeClient) -> None:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt(), past_key_values=cache)
    kv(model, client).offload(prompt(), cache)
    warm = kv(model, client).prefill(prompt())
    assert torch.equal(warm.logits, on_top_of_live(model, cache, prompt(), 64))


@pytest.mark.parametrize(
    ("knob", "value", "reused"),
    [
        ("ends_after", 2, 32),
        ("ends_after", 0, 0),
        ("raises_after", 3, 48),
        ("raises_after", 0, 0),
        ("short_by", 1, 0),
    ],
)
def test_any_trouble_is_a_shorter_prefix(
    model: Any, client: FakeClient, knob: str, value: int, reused: int
) -> None:
    cold = kv(model, client).prefill(prompt())
    live = copy.deepcopy(cold.cache)
    kv(model, client).offload(prompt(), cold.cache)
    setattr(client, knob, value)
    warm = kv(model, client).prefill(prompt())
    assert warm.reused_tokens == reused
    assert torch.equal(warm.logits, on_top_of_live(model, live, prompt(), reused))
    if knob == "raises_after":
        assert kv(model, client).offload(prompt(), warm.cache).outcome is None


def test_extra_separates_what_the_tokens_do_not_say(model: Any, client: FakeClient) -> None:
    cold = kv(model, client).prefill(prompt(), extra=b"adapter 1")
    kv(model, client).offload(prompt(), cold.cache, extra=b"adapter 1")
    assert kv(model, client).prefill(prompt()).reused_tokens == 0
    assert kv(model, client).prefill(prompt(), extra=b"adapter 1").reused_tokens == 64
    part = prompt()[:, :40]
    assert kv(model, client).prefill(part).reused_tokens == 0
    assert kv(model, client).prefill(part, extra=b"adapter 1").reused_tokens == 39


def test_recycled_memory_is_used_again_and_never_shared(model: Any, client: FakeClient) -> None:
    prefix_cache = kv(model, client, reserve_tokens=512)
    first = prefix_cache.prefill(prompt())
    second = prefix_cache.prefill(prompt(5))
    assert layers(first.cache)[0].room is not layers(second.cache)[0].room
    room = layers(first.cache)[0].room
    assert room.tokens == 512
    prefix_cache.recycle(first)
    assert first.cache.get_seq_length() == 0
    third = prefix_cache.prefill(prompt(6))
    assert layers(third.cache)[0].room is room
    assert torch.equal(third.logits, kv(model).prefill(prompt(6)).logits)
    first.cache.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), 0)
    assert torch.equal(
        planes(third.cache.layers[0])[0],
        planes(kv(model).prefill(prompt(6)).cache.layers[0])[0],
    )


def test_caches_made_in_inference_mode_serve_outside_it(model: Any) -> None:
    with torch.inference_mode():
        prefilled = kv(model).prefill(prompt())
    expected = recomputed(model, prompt())[1]
    assert answer(model, prompt(), prefilled.logits.clone(), prefilled.cache) == expected


def test_a_layer_behaves_as_dynamic_layers_do(model: Any) -> None:
    """crop, repeat, select and reorder: afterwards updates append to what is there."""
    for change in (
        lambda cache: cache.crop(-5),
        lambda cache: cache.crop(-PROMPT),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reorder_cache(torch.tensor([0])),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
        lambda cache: cache.reset(),
    ):
        mine = kv(model).prefill(prompt()).cache
        plain = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=prompt(), past_key_values=plain)
        results = []
        for cache in (mine, plain):
            change(cache)
            keys = layers(cache)[1].keys
            batch = 1 if keys is None else keys.shape[0]
            new = torch.full((batch, 2, 3, 16), 7.0)
            results.append(cache.update(new, -new, 1))
        assert isinstance(mine.layers[1], ReservedLayer)
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("MistralConfig", {"sliding_window": 32}, "layer 0 is .*DynamicSlidingWindowLayer"),
        ("Gemma3TextConfig", {"sliding_window": 32}, "layer 0 is sliding_attention"),
        ("Qwen3NextConfig", {"num_experts": 2, "num_hidden_layers": 4}, "is linear_attention"),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
    ],
)
def test_what_cannot_be_reused_is_refused_by_name(
    config: str, settings: dict[str, Any], message: str
) -> None:
    model = tiny(config, num_attention_heads=4, num_key_value_heads=2, **settings)
    with pytest.raises(InvalidRequest, match=message):
        space_of(model)


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_other_cache_implementations_are_refused(model: Any, implementation: str) -> None:
    model.generation_config.cache_implementation = implementation
    with pytest.raises(InvalidRequest, match=implementation):
        space_of(model)


def test_caches_of_another_kind_or_shape_are_refused(model: Any, client: FakeClient) -> None:
    static = transformers.StaticCache(config=model.config, max_cache_len=80)
    plain = transformers.DynamicCache(config=shape("llama").config)
    with torch.no_grad():
        model(input_ids=prompt(), past_key_values=static)
        shape("llama")(input_ids=prompt(), past_key_values=plain)
    prefix_cache = kv(model, client)
    with pytest.raises(InvalidRequest, match="StaticLayer"):
        prefix_cache.offload(prompt(), static)
    with pytest.raises(InvalidRequest, match="keys of layer 0"):
        prefix_cache.offload(prompt(), plain)
    with pytest.raises(InvalidRequest, match="one prompt"):
        prefix_cache.prefill(torch.ones((2, 5), dtype=torch.long))
    other = space_of(shape("llama"), chunk_tokens=CHUNK)
    with pytest.raises(InvalidRequest, match=r"space\.layout"):
        PrefixCache(model, FakeClient(other))


def test_spaces_differ_when_the_kv_would(model: Any, tmp_path: Any) -> None:
    space = space_of(model)
    assert space == space_of(shape("llama-gqa"))
    others = {
        "weights": tiny("LlamaConfig", seed=1, **SHAPES["llama-gqa"][1]),
        "layout.dtype": shape("llama-gqa", torch.bfloat16),
        "layout.heads": shape("llama"),
        "model": shape("llama-gqa", rms_norm_eps=1e-3),
        "rope": shape("llama-gqa", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    }
    for field, other in others.items():
        assert field in space.differing_fields(space_of(other))
    assert space.differing_fields(space_of(model, tenant="b")) == ["tenant"]
    assert space.differing_fields(space_of(model, chunk_tokens=128)) == ["layout.tokens"]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.01)
    assert space.differing_fields(space_of(model)) == ["weights"]
    model.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert space_of(reloaded) == space_of(model)
    assert space_of(reloaded, model_path=tmp_path).weights.startswith("files-")
