"""The model of one engine process: random weights, one room for its KV, and greedy answers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
import xxhash
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvtier.bench.ttft.shapes import ANSWER_TOKENS, SEED, Shape
from kvtier.connectors.transformers_cache import Room, probe

# Scales the queries, so that attention picks out few tokens. With weights as they are drawn it
# averages over thousands, and the answers are nearly the same whatever the prefix is.
_SHARPER = 4.0
# All but the one that keeps a number for every pair of tokens: for 32k of them, 64 GiB. Which one
# is fastest on a GPU is left to torch.
_LEAN = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]


class Model:
    """A model of a shape on a torch device; the same in every process on the same device.

    `room` [layers, 2, heads, tokens, head_dim] has the KV of one prompt at a time, in place.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        quiet: Any = transformers.logging
        quiet.set_verbosity_error()
        self.shape = shape
        self.device = device
        self.model: Any = _random_model(shape, device)
        self.room = Room(probe(self.model), shape.room_tokens, touch=True)

    def input_ids(self, tokens: Sequence[int]) -> torch.Tensor:
        """Tokens as the model takes them: [1, tokens], on its device."""
        return torch.tensor([tokens], dtype=torch.long, device=self.device)

    def cache(self, held: int) -> DynamicCache:
        """A cache of the first `held` tokens that are in the room; it grows in the room."""
        return self.room.cache(self.model, held)

    def forward(self, input_ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits [vocabulary] of the token after `input_ids` [1, tokens] on top of a cache, which
        grows by them.

        Either the cache is empty or there is one token: then attention needs no mask, and the
        fastest one that a GPU has can be used.
        """
        with torch.no_grad(), self._attention():
            output = self.model(input_ids=input_ids, past_key_values=cache, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def compute(self, tokens: Sequence[int]) -> tuple[DynamicCache, torch.Tensor]:
        """Compute a prompt: all but its last token, then that. Returns the cache and the logits.

        As a reload does it, so that both do the same sums in the same order.
        """
        input_ids, cache = self.input_ids(tokens), self.cache(0)
        self.forward(input_ids[:, :-1], cache)
        return cache, self.forward(input_ids[:, -1:], cache)

    def compute_at_once(self, tokens: Sequence[int]) -> tuple[DynamicCache, torch.Tensor]:
        """Compute a prompt in one pass, as one does without a cache in mind."""
        cache = self.cache(0)
        return cache, self.forward(self.input_ids(tokens), cache)

    def answer(self, first: int, cache: DynamicCache) -> list[int]:
        """The greedy answer that begins with the token `first`, after the cache's prompt."""
        answer = [first]
        while len(answer) < ANSWER_TOKENS:
            answer.append(int(self.forward(self.input_ids(answer[-1:]), cache).argmax()))
        return answer

    def digest(self, tokens: int) -> str:
        """XXH3-128 of the KV of the first tokens in the room, bit for bit."""
        hasher = xxhash.xxh3_128()
        for layer in self.room.data:
            part: Any = layer[:, :, :tokens].contiguous().view(torch.uint8).cpu().numpy()
            hasher.update(part)
        return hasher.hexdigest()

    def wipe(self) -> None:
        """Forget all KV, so that nothing left in the room can pass for what is loaded. Returns when
        the device is idle."""
        self.room.data.zero_()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _attention(self) -> AbstractContextManager[Any]:
        if self.device.type != "cuda":
            return nullcontext()
        lean: AbstractContextManager[Any] = sdpa_kernel(_LEAN)
        return lean


def torch_device(name: str) -> torch.device:
    """The torch device that goes with a kvtier device of that name."""
    return torch.device("cpu" if name == "host" else name)


def _random_model(shape: Shape, device: torch.device) -> Any:
    models: Any = AutoModelForCausalLM
    torch.manual_seed(SEED)
    with torch.device(device):  # weights are made where they stay
        model = models.from_config(
            LlamaConfig(**shape.config),
            dtype=getattr(torch, shape.dtype),
            attn_implementation="sdpa",
        )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(_SHARPER)
    return model.eval()
