"""What tells one engine's KV from another's, read from vLLM's configuration.

Everything is read as plain attributes, so that this module needs no engine.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvtier import fingerprint
from kvtier.connectors.vllm.parts import KINDS, LayerCache, Model, Shard, canonical
from kvtier.connectors.vllm.settings import Settings
from kvtier.errors import InvalidRequest

# Settings of a model's config that say nothing about what a token's KV is.
_VOLATILE = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id",
    "problem_type", "bos_token_id", "eos_token_id", "pad_token_id", "chunk_size_feed_forward",
    "is_encoder_decoder",
}  # fmt: skip


# Load formats that load the safetensors or GGUF files of the model's folder.
_FILES_AS_THEY_ARE = {
    "auto", "hf", "safetensors", "fastsafetensors", "mistral", "gguf", "runai_streamer",
}  # fmt: skip


def model_of(config: Any, settings: Settings) -> Model:
    """The model that a VllmConfig describes.

    Raises InvalidRequest, naming the setting, where the KV would depend on something that is not in
    the configuration, and where the weights can neither be read nor have a name.
    """
    model, cache = config.model_config, config.cache_config
    _refuse_what_varies(config)
    text = model.hf_text_config
    described = text.to_dict()
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    identity = {
        "config": {name: value for name, value in described.items() if name not in _VOLATILE},
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "cache_dtype": str(cache.cache_dtype),
    }
    if _depends_on_length(described, rope):
        identity["max_model_len"] = model.max_model_len
    images = getattr(model, "multimodal_config", None)
    if images is not None:
        for name in ("mm_processor_kwargs", "media_io_kwargs"):
            identity[name] = getattr(images, name, None)
    weights = settings.weights or weights_of(
        model.model_weights or model.model, model.revision, config.load_config, model.seed
    )
    draft = getattr(config.speculative_config, "draft_model_config", None)
    if draft is not None and getattr(draft, "model", None) not in (None, model.model):
        identity["draft"] = weights_of(draft.model, draft.revision, config.load_config, draft.seed)
    architectures = getattr(model.hf_config, "architectures", None) or [type(text).__name__]
    return Model(architectures[0], identity, weights, canonical(rope), settings.tenant)


def images_by_content(config: Any) -> bool:
    """Whether vLLM names images by a hash of what they show; else it numbers them."""
    images = getattr(config.model_config, "multimodal_config", None)
    if images is None or config.cache_config.enable_prefix_caching:
        return True
    return getattr(images, "mm_processor_cache_gb", 0) > 0


def _depends_on_length(described: dict[str, Any], rope: Any) -> bool:
    """Whether a token's KV depends on the longest context that the engine allows: LongRoPE chooses
    its factors by it, and so do some models their attention's temperature."""
    return (
        any(kind in canonical(rope) for kind in ("longrope", "dynamic"))
        or described.get("attn_temperature_tuning") is not None
    )


def refuse_unsupported(config: Any, cache: Any) -> None:
    """Raise InvalidRequest, naming the setting, where vLLM works in ways that the connector cannot
    keep up with."""
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    if transfer.kv_role != "kv_both":
        raise InvalidRequest(f'vllm: kv_role "{transfer.kv_role}" is not supported; use "kv_both"')
    if parallel.world_size > 1:
        if config.model_config.enable_sleep_mode:
            raise InvalidRequest("vllm: enable_sleep_mode is supported with one worker only")
        if parallel.distributed_executor_backend == "external_launcher":
            raise InvalidRequest("vllm: external_launcher is supported with one worker only")
    if getattr(cache, "needs_kv_cache_zeroing", False) and config.use_v2_model_runner:
        # It clears new blocks before it says which offloads must have left them.
        raise InvalidRequest(
            "vllm: a KV cache of mixed precision needs the first model runner; set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )


def _refuse_what_varies(config: Any) -> None:
    parallel = config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise InvalidRequest(f"vllm: {name} {getattr(parallel, name)} is not supported; use 1")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise InvalidRequest(
            "vllm: calculate_kv_scales makes the KV depend on the first prompt; use a checkpoint "
            "with scales"
        )


def weights_of(name: str, revision: str | None, load_config: Any, seed: int | None) -> str:
    """The fingerprint of a model's weights: of the files that the engine loads."""
    load_format = str(load_config.load_format)
    if load_format == "dummy":
        return f"dummy-{seed}"
    try:
        if load_format not in _FILES_AS_THEY_ARE:
            raise InvalidRequest(f"weights: load_format {load_format} loads other files")
        return fingerprint.of_path(_local(name, revision, load_config.download_dir))
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{error}; name these weights by kv_connector_extra_config.weights, with another name "
            "whenever they change"
        ) from None


def _local(name: str, revision: str | None, download_dir: str | None) -> Path:
    """Where the files of a model are: itself a path, or in the hub's cache."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - comes with the engine
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        found = snapshot_download(
            name, revision=revision, cache_dir=download_dir, local_files_only=True
        )
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        raise InvalidRequest(f"weights: {name} is neither a path nor in the hub's cache") from None
    return Path(found)


def shard_of(config: Any, cache: Any, rank: int, stage: int) -> tuple[Shard, bool]:
    """A worker's share, by its tensor and pipeline ranks, and whether it is the one to write it:
    ranks may be replicas of each other (MLA)."""
    replicas = max(1, getattr(cache, "kv_tp_replicas", 1))
    parallel = config.parallel_config
    shard = Shard(
        rank=rank // replicas,
        ranks=max(1, parallel.tensor_parallel_size // replicas),
        stage=stage,
        stages=parallel.pipeline_parallel_size,
    )
    return shard, rank % replicas == 0


def layers_of(cache: Any, packing: Mapping[str, str]) -> Iterator[LayerCache]:
    """The layers of a KVCacheConfig whose KV is to be kept. `packing` names, for each layer, what
    decides how its back end arranges a block."""
    for index, group in enumerate(cache.kv_cache_groups):
        if not getattr(group, "enable_kv_transfer", True):
            continue
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        for name in group.layer_names:
            spec = specs[name] if specs else group.kv_cache_spec
            yield _layer(name, index, spec, packing.get(name, ""))


def block_tokens_of(cache: Any) -> list[int]:
    """The tokens of a block, for each group of a KVCacheConfig."""
    return [group.kv_cache_spec.block_size for group in cache.kv_cache_groups]


def _layer(name: str, group: int, spec: Any, packing: str) -> LayerCache:
    kind = "non-causal attention" if getattr(spec, "non_causal", False) else _kind(spec)
    if kind not in KINDS:
        return LayerCache(name, group, kind, spec.block_size, 1, 1, 1, "uint8", 1)
    return LayerCache(
        name=name,
        group=group,
        kind=kind,
        block_tokens=spec.block_size,
        heads=spec.num_heads,
        key_dim=spec.head_size,
        value_dim=spec.head_size_v,
        dtype=str(spec.dtype).removeprefix("torch."),
        content_bytes=spec.state_content_size_bytes,
        window=spec.sliding_window if kind == "sliding_window" else None,
        quantised=bool(spec.kv_quant_mode) or spec.state_content_bytes is not None,
        packing=packing,
        tokens_per_state=spec.tokens_per_state,
    )


_KIND_OF = {
    "FullAttentionSpec": "full_attention",
    "MLAAttentionSpec": "mla_attention",
    "SlidingWindowSpec": "sliding_window",
}


def _kind(spec: Any) -> str:
    """What a spec is, by its exact class: a subclass that is not known here behaves otherwise."""
    return _KIND_OF.get(type(spec).__name__, type(spec).__name__)
