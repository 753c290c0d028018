"""What is measured: the model's shape, its prompts, and the chunks that these make."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.spaces import Layout

ANSWER_TOKENS = 16
SEED = 20_240_723
PHASES = ("alone", "cold", "ram", "vram", "disk")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of `length` tokens in full chunks, and one more that is always computed: without it
    there would be no logits. `number` tells prompts of one length apart."""

    length: int
    number: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A model without its weights. `config` is what transformers' LlamaConfig is made of."""

    name: str
    title: str
    config: Mapping[str, Any]
    dtype: str
    lengths: tuple[int, ...]
    chunk_tokens: int
    repeats: int

    @property
    def layout(self) -> Layout:
        """The layout of its chunks."""
        return Layout(
            dtype=self.dtype,
            layers=self.config["num_hidden_layers"],
            heads=self.config["num_key_value_heads"],
            head_dim=self.config["head_dim"],
            tokens=self.chunk_tokens,
        )

    @property
    def room_tokens(self) -> int:
        """Tokens of the longest prompt and its answer, in whole chunks."""
        return -(-(max(self.lengths) + 1 + ANSWER_TOKENS) // self.chunk_tokens) * self.chunk_tokens

    def chunks(self, repeats: int) -> int:
        """How many chunks so many prompts of each length have, those of the warm-ups included."""
        measured = repeats * sum(length // self.chunk_tokens for length in self.lengths)
        return measured + len(PHASES) * len(self.lengths)

    def prompts(self, repeats: int) -> list[Prompt]:
        """The prompts of every length, the short ones first."""
        return [Prompt(length, number) for length in self.lengths for number in range(repeats)]

    def token_ids(self, prompt: Prompt, phase: str = "") -> list[int]:
        """A prompt's tokens. Those of a phase are its warm-up's, which nobody else asks for."""
        kind = PHASES.index(phase) + 1 if phase else 0
        generator = np.random.default_rng([SEED, kind, prompt.length, prompt.number])
        ids: list[int] = generator.integers(
            0, self.config["vocab_size"], prompt.length + 1
        ).tolist()
        return ids


# The figures are those of config.json of Llama-3.1-8B.
LLAMA_8B = Shape(
    name="llama-3.1-8b",
    title="shape of Llama-3.1-8B, random weights",
    config={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    dtype="bfloat16",
    lengths=(2048, 8192, 32_768),
    chunk_tokens=256,
    repeats=3,
)

# Small enough for any CPU, and with all that the other has: groups of heads, layers, many chunks.
TINY = Shape(
    name="tiny",
    title="tiny model, random weights",
    config={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1000,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    dtype="float32",
    lengths=(128, 512, 2048),
    chunk_tokens=64,
    repeats=2,
)

SHAPES = {shape.name: shape for shape in (LLAMA_8B, TINY)}


def shape_for(device: str) -> Shape:
    """What is measured on a device of that name: the tiny one without a GPU."""
    return TINY if device == "host" else LLAMA_8B
