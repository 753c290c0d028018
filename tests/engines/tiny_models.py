"""Models of a few layers with random weights, for the shapes of KV that the real model has not.

Runs in the interpreter that has vLLM, whose transformers builds them.
"""
# ruff: noqa: PLC0415 - the engine's packages are there in its process only

from pathlib import Path
from typing import Any

VOCABULARY = 1024

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# Wider than by default, so that attention is sharp and the answers hang on every token's KV.
_WEIGHTS_STD = 0.3


def save(kind: str, folder: str) -> None:
    """Write a model of that kind, always with the same weights, as transformers has it."""
    import torch
    import transformers

    name, settings = _KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        **{**_SMALL, "initializer_range": _WEIGHTS_STD, **settings}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(Path(folder))


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "windows": (
        "Gemma3Text",
        {
            "num_hidden_layers": 6,
            "head_dim": 32,
            "sliding_window": 512,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "query_pre_attn_scalar": 32,
        },
    ),
    "plain": ("Llama", {"num_hidden_layers": 4, "head_dim": 32}),
    "latent": (
        "DeepseekV2",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 64,
            "first_k_dense_replace": 3,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            # As the real ones have it. vLLM's kernel for plain RoPE on CPUs is wrong with MLA.
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 4096,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
    ),
    "state space": (
        "FalconH1",
        {
            "num_hidden_layers": 2,
            "head_dim": 32,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
        },
    ),
}
