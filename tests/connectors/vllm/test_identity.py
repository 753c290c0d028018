"""What of vLLM's configuration tells one engine's KV from another's."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

np = pytest.importorskip("numpy")
safetensors = pytest.importorskip("safetensors.numpy")

from kvtier.connectors.vllm.identity import (  # noqa: E402
    block_tokens_of,
    layers_of,
    model_of,
    shard_of,
    weights_of,
)
from kvtier.connectors.vllm.parts import LayerCache, Shard, parts_of  # noqa: E402
from kvtier.connectors.vllm.settings import Settings  # noqa: E402
from kvtier.errors import InvalidRequest  # noqa: E402
from tests.connectors.vllm.making import MODEL, layer  # noqa: E402

Change = Callable[[Any], object]


class TextConfig:
    """A model's config as transformers gives it."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.values)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save(folder)
    return folder


def save(folder: Path, fill: float = 1) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {"embed": np.full((64, 64), fill, np.float32), "norm": np.ones(64, np.float32)}
    safetensors.save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def config(weights: Path) -> Any:
    """A VllmConfig, as far as it is read."""
    text = TextConfig(
        architectures=["TinyForCausalLM"], hidden_size=64, num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, torch_dtype="float32",
        original_max_position_embeddings=4096,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=text,
            hf_config=SimpleNamespace(architectures=["TinyForCausalLM"]),
            dtype="torch.float32",
            quantization=None,
            model=str(weights),
            model_weights="",
            revision=None,
            seed=0,
            max_model_len=2048,
            multimodal_config=None,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", calculate_kv_scales=False),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
        parallel_config=parallel(),
        speculative_config=None,
    )


def parallel(tensor: int = 1, stages: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=stages,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
    )


def digest(config: Any, **settings: Any) -> bytes:
    model = model_of(config, Settings.parse(settings))
    return parts_of([layer()], model, Shard(), 8)[0].digest


def text(name: str, value: Any) -> Change:
    return lambda config: config.model_config.hf_text_config.values.__setitem__(name, value)


def model(name: str, value: Any) -> Change:
    return lambda config: setattr(config.model_config, name, value)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(model("dtype", "torch.bfloat16"), id="dtype"),
        pytest.param(lambda c: setattr(c.cache_config, "cache_dtype", "fp8"), id="cache dtype"),
        pytest.param(model("quantization", "fp8"), id="quantization"),
        pytest.param(text("rope_parameters", {"rope_type": "yarn"}), id="rope"),
        pytest.param(text("rope_scaling", {"factor": 2}), id="rope of old"),
        pytest.param(text("hidden_size", 32), id="size"),
        pytest.param(text("a_new_setting", 1), id="any field"),
        pytest.param(text("layer_types", ["full", "sliding"]), id="list"),
        pytest.param(lambda c: save(Path(c.model_config.model), 2), id="weights"),
        pytest.param(
            lambda c: setattr(c.model_config.hf_config, "architectures", ["Other"]), id="class"
        ),
    ],
)
def test_whatever_may_change_the_kv_makes_another_space(config: Any, change: Change) -> None:
    before = digest(config)
    change(config)
    assert digest(config) != before


def test_tenant_and_named_weights_make_another_space(config: Any) -> None:
    found = {
        digest(config), digest(config, tenant="a"), digest(config, tenant="b"),
        digest(config, weights="a"), digest(config, weights="b"),
    }  # fmt: skip
    assert len(found) == 5


@pytest.mark.parametrize(
    "change",
    [
        text("_name_or_path", "/elsewhere"),
        text("transformers_version", "9"),
        text("torch_dtype", "float16"),
        text("eos_token_id", 7),
        text("use_cache", False),
        model("revision", "main"),
        model("seed", 3),
        lambda config: setattr(config, "parallel_config", parallel(tensor=2)),
    ],
    ids=["path", "version", "saved dtype", "eos", "use cache", "revision", "seed", "parallel"],
)
def test_what_cannot_change_the_kv_makes_no_difference(config: Any, change: Change) -> None:
    before = digest(config)
    change(config)
    assert digest(config) == before


def test_the_same_model_elsewhere_is_the_same(config: Any, tmp_path: Path) -> None:
    before = digest(config)
    save(tmp_path / "copy")
    config.model_config.model = str(tmp_path / "copy")
    assert digest(config) == before


def test_another_draft_model_makes_another_space(config: Any, tmp_path: Path) -> None:
    found = {digest(config)}
    for name in ("one", "two"):
        save(tmp_path / name, fill=len(found))
        draft = SimpleNamespace(model=str(tmp_path / name), revision=None, seed=0)
        config.speculative_config = SimpleNamespace(draft_model_config=draft)
        found.add(digest(config))
    assert len(found) == 3
    config.speculative_config.draft_model_config.model = config.model_config.model  # n-grams
    assert digest(config) in found


def test_the_longest_context_counts_where_the_rotation_depends_on_it(config: Any) -> None:
    config.model_config.hf_text_config.values["rope_parameters"] = {
        "rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0],
    }  # fmt: skip
    short = digest(config)
    config.model_config.max_model_len = 131_072
    assert digest(config) != short


def test_the_servers_image_settings_make_another_space(config: Any) -> None:
    found = set()
    for pixels in (1_000, 1_001):
        config.model_config.multimodal_config = SimpleNamespace(
            mm_processor_kwargs={"max_pixels": pixels}, media_io_kwargs={}
        )
        found.add(digest(config))
    assert len(found) == 2


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused_by_name(config: Any, name: str) -> None:
    setattr(config.parallel_config, name, 2)
    with pytest.raises(InvalidRequest, match=f"{name} 2"):
        model_of(config, Settings())


def test_scales_of_the_first_prompt_are_refused(config: Any) -> None:
    config.cache_config.calculate_kv_scales = True
    with pytest.raises(InvalidRequest, match="calculate_kv_scales"):
        model_of(config, Settings())


def test_weights_that_cannot_be_read_need_a_name(config: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    config.model_config.model = str(empty)
    with pytest.raises(InvalidRequest, match=r"kv_connector_extra_config\.weights"):
        digest(config)
    assert digest(config, weights="mine")


def test_dummy_weights_need_no_files() -> None:
    load = SimpleNamespace(load_format="dummy", download_dir=None)
    assert weights_of("nowhere", None, load, 1) == "dummy-1"
    assert weights_of("nowhere", None, load, 2) == "dummy-2"


def test_a_name_that_is_not_in_the_hubs_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load = SimpleNamespace(load_format="auto", download_dir=str(tmp_path))
    for name in ("nobody/nothing", "no such name!", "a/b/c"):
        with pytest.raises(InvalidRequest, match="neither a path nor in the hub's cache"):
            weights_of(name, None, load, 0)


# ── shards ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ranks", "replicas", "shards"),
    [
        (1, 1, [(0, 1, True)]),
        (2, 1, [(0, 2, True), (1, 2, True)]),
        (4, 2, [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]),
        (4, 4, [(0, 1, True), (0, 1, False), (0, 1, False), (0, 1, False)]),
    ],
)
def test_of_replicas_one_writes(
    config: Any, ranks: int, replicas: int, shards: list[tuple[int, int, bool]]
) -> None:
    config.parallel_config = parallel(tensor=ranks, stages=3)
    cache = SimpleNamespace(kv_tp_replicas=replicas)
    found = [shard_of(config, cache, rank, 1) for rank in range(ranks)]
    assert [(shard.rank, shard.ranks, writer) for shard, writer in found] == shards
    assert all((shard.stage, shard.stages) == (1, 3) for shard, _ in found)


# ── layers ────────────────────────────────────────────────────────────────────────────────────────


class Spec:
    """A KV cache spec; its class's name says what it is."""

    def __init__(self, **more: Any) -> None:
        defaults = {
            "block_size": 16, "num_heads": 2, "head_size": 8, "head_size_v": 8,
            "dtype": "torch.float16", "state_content_size_bytes": 32, "sliding_window": None,
            "kv_quant_mode": 0, "state_content_bytes": None, "tokens_per_state": 1,
            "non_causal": False,
        }  # fmt: skip
        vars(self).update(defaults | more)


class FullAttentionSpec(Spec): ...


class SinkFullAttentionSpec(FullAttentionSpec): ...


class MLAAttentionSpec(Spec): ...


class SlidingWindowSpec(Spec): ...


def cache_of(*groups: tuple[Any, list[str]], **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(kv_cache_spec=spec, layer_names=names, **more) for spec, names in groups
        ]
    )


def layers(*groups: tuple[Any, list[str]], **more: Any) -> list[LayerCache]:
    return list(layers_of(cache_of(*groups, **more), {}))


def test_layers_are_read_from_their_groups() -> None:
    cache = cache_of(
        (FullAttentionSpec(), ["a", "b"]), (SlidingWindowSpec(sliding_window=64), ["c"])
    )
    found = list(layers_of(cache, {"c": "CPU_ATTN"}))
    assert [(each.name, each.group, each.kind, each.window) for each in found] == [
        ("a", 0, "full_attention", None),
        ("b", 0, "full_attention", None),
        ("c", 1, "sliding_window", 64),
    ]
    assert (found[0].heads, found[0].key_dim, found[0].dtype) == (2, 8, "float16")
    assert [each.packing for each in found] == ["", "", "CPU_ATTN"]
    assert block_tokens_of(cache) == [16, 16]


def test_layers_of_one_group_may_differ() -> None:
    specs = {"a": FullAttentionSpec(num_heads=4), "b": FullAttentionSpec()}
    cache = cache_of((SimpleNamespace(kv_cache_specs=specs, block_size=16), ["a", "b"]))
    assert [each.heads for each in layers_of(cache, {})] == [4, 2]


def test_a_window_that_only_the_model_sees_is_full_attention() -> None:
    (found,) = layers((FullAttentionSpec(sliding_window=64), ["a"]))
    assert (found.kind, found.window) == ("full_attention", None)


def test_groups_that_take_no_part_are_left_out() -> None:
    assert not layers((FullAttentionSpec(), ["a"]), enable_kv_transfer=False)


@pytest.mark.parametrize(
    "more", [{"kv_quant_mode": 1}, {"state_content_bytes": 20}], ids=["mode", "bytes"]
)
def test_packed_content_is_told(more: dict[str, Any]) -> None:
    (found,) = layers((FullAttentionSpec(**more), ["a"]))
    assert found.quantised


def test_a_latent_cache_is_one() -> None:
    spec = MLAAttentionSpec(num_heads=1, head_size=9, head_size_v=0)
    (found,) = layers((spec, ["a"]))
    assert (found.kind, found.key_dim, found.value_dim) == ("mla_attention", 9, 0)


def test_a_kind_that_only_resembles_one_is_refused() -> None:
    (found,) = layers((SinkFullAttentionSpec(), ["a"]))
    assert found.kind == "SinkFullAttentionSpec"
    with pytest.raises(InvalidRequest, match="a is SinkFullAttentionSpec"):
        parts_of([found], MODEL, Shard(), 16)


def test_attention_that_looks_ahead_is_refused() -> None:
    (found,) = layers((FullAttentionSpec(non_causal=True), ["a"]))
    with pytest.raises(InvalidRequest, match="a "):
        parts_of([found], MODEL, Shard(), 16)
