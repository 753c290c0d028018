"""Prefix reuse for Hugging Face transformers: prompts start from KV that kvtier holds.

    space = space_of(model, model_path=path)
    kv = PrefixCache(model, kvtier.connect("unix:///run/kvtier.sock", space))
    prefilled = kv.prefill(input_ids)           # reused chunks are loaded, the rest is computed
    first = prefilled.logits.argmax(-1, keepdim=True)
    output = model.generate(torch.cat([input_ids, first], -1), past_key_values=prefilled.cache)
    kv.offload(input_ids, prefilled.cache)      # the next process reuses it

It serves every decoder whose layers are all full attention with separate keys and values of one
shape (`DynamicLayer`), one prompt at a time, without padding. Anything else is refused when the
space is made, by the name of what stands in the way: sliding windows, recurrent or shared layers,
static and quantised caches, rotary embeddings that change with the length of the prompt.

For such a decoder the KV of a token depends on nothing after it. So where a prompt leaves a stored
chunk half-way, the part before is reused too.

Whatever goes wrong with the service, `prefill` computes what it did not get.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import DynamicCache

from kvtier import fingerprint
from kvtier.chunks import Prefix
from kvtier.connectors.transformers_cache import (
    Courier,
    ReservedLayer,
    Room,
    check_cache,
    probe,
    samples,
)
from kvtier.errors import InvalidRequest, KvtierError
from kvtier.spaces import Space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that say nothing about what a token's KV is. All others are part of the model's identity.
_VOLATILE = {
    "_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
# Keys under these depend on how long the whole prompt is, so a prefix has no KV of its own.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class ChunkBytes(Protocol):
    """One chunk of a load or an offload: its place in the prefix, and exactly `layout.nbytes`."""

    @property
    def index(self) -> int: ...
    @property
    def data(self) -> memoryview: ...


class LoadedChunk(ChunkBytes, Protocol):
    """One chunk of a load, of which the first `tokens` tokens are the prompt's."""

    @property
    def tokens(self) -> int: ...


class Offload(Protocol):
    """The slots that the service wants written; `outcome` says what became of them."""

    def __iter__(self) -> Iterator[ChunkBytes]: ...
    @property
    def outcome(self) -> Any: ...


class Client(Protocol):
    """What this connector asks of a kvtier client."""

    @property
    def space(self) -> Space: ...
    def prefix(
        self, token_ids: Sequence[int], extra: bytes = b"", *, same_request: Prefix | None = None
    ) -> Prefix: ...
    def load(
        self, prefix: Prefix, *, partial: bool
    ) -> AbstractContextManager[Iterable[LoadedChunk]]: ...
    def offload(self, prefix: Prefix) -> AbstractContextManager[Offload]: ...


def space_of(
    model: "PreTrainedModel",
    *,
    model_path: Path | None = None,
    tenant: str = "",
    chunk_tokens: int = 256,
) -> Space:
    """The space of a loaded model's KV.

    The weights are told apart by the files at `model_path` (see `kvtier.fingerprint`), or else by
    samples of the parameters in memory, as always when adapters are loaded. Runs one token through
    the model to see the cache it makes. Raises InvalidRequest, naming the layer type or the
    setting, for a model whose KV cannot be reused.
    """
    config = model.config.get_text_config(decoder=True)
    rope = _rope_of(config)
    layout = probe(model).layout(chunk_tokens)
    settings = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    identity = hashlib.sha256(_canonical(settings).encode()).hexdigest()[:16]
    if model_path is None or getattr(model, "_hf_peft_config_loaded", False):
        weights = fingerprint.of_samples(samples(model))
    else:
        weights = fingerprint.of_path(model_path)
    name = f"transformers/{type(model).__name__}/{identity}"
    return Space(model=name, layout=layout, weights=weights, rope=rope, tenant=tenant)


@dataclass(frozen=True, slots=True)
class Restored:
    """A cache that begins with what kvtier held.

    `cache` holds `reused_tokens` tokens (0 when nothing was held) and goes to `model.generate` or
    `model.forward` as `past_key_values`, with the whole prompt or the rest of it respectively.
    `timings` are seconds: "hash" and "load".
    """

    cache: DynamicCache
    tokens: int
    reused_tokens: int
    loaded_bytes: int
    timings: dict[str, float]


@dataclass(frozen=True, slots=True)
class Prefilled(Restored):
    """A cache of the whole prompt, and `logits` [1, vocabulary] of the token after it.

    `timings` has "compute" besides: the forward over the tokens that were not reused.
    """

    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Offloaded:
    """What was copied, and what the client says became of it (`outcome` None: no service)."""

    chunks: int
    nbytes: int
    outcome: Any


class PrefixCache:
    """Prefill with reuse for one model, through one client.

    With `reserve_tokens` the memory for a cache of that length is taken and touched now, and is
    used again after each `recycle`: fresh memory costs several times the copy into it. Raises
    InvalidRequest when the client's space is not the model's. Not for several threads at once.
    """

    def __init__(
        self, model: "PreTrainedModel", client: Client, *, reserve_tokens: int = 0
    ) -> None:
        self._model = model
        self._client = client
        self._layout = client.space.layout
        self._shape = probe(model)
        self._shape.check_layout(self._layout)
        self._courier = Courier(self._shape, self._layout)
        self._last_logits_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._spare = Room(self._shape, reserve_tokens, touch=True) if reserve_tokens else None
        # What a cache was restored for is the same request as what is offloaded from it.
        self._requests: WeakKeyDictionary[DynamicCache, Prefix] = WeakKeyDictionary()

    def prefill(
        self, input_ids: torch.Tensor, *, extra: bytes = b"", max_new_tokens: int = 256
    ) -> Prefilled:
        """Prefill one prompt, `input_ids` [1, tokens], from the longest prefix that kvtier holds.

        The last token is always computed. `max_new_tokens` reserves room for the answer; a longer
        one is correct, and slower. `extra` is what decides the KV besides model and tokens.
        """
        restored = self.restore(input_ids, extra=extra, max_new_tokens=max_new_tokens)
        started = time.perf_counter()
        options = {"logits_to_keep": 1} if self._last_logits_only else {}
        with torch.no_grad():
            output = self._model(
                input_ids=input_ids[:, restored.reused_tokens :],
                past_key_values=restored.cache,
                use_cache=True,
                **options,
            )
        return Prefilled(
            cache=restored.cache,
            tokens=restored.tokens,
            reused_tokens=restored.reused_tokens,
            loaded_bytes=restored.loaded_bytes,
            timings={**restored.timings, "compute": time.perf_counter() - started},
            logits=output.logits[:, -1],
        )

    def restore(
        self, input_ids: torch.Tensor, *, extra: bytes = b"", max_new_tokens: int = 256
    ) -> Restored:
        """Load the longest prefix that kvtier holds, short of the last token; compute nothing."""
        tokens = _token_list(input_ids)
        started = time.perf_counter()
        prefix = self._client.prefix(tokens[:-1], extra)
        hashed = time.perf_counter()
        room = self._take_room(len(tokens) + max_new_tokens)
        reused = self._load(prefix, room)
        cache = room.cache(self._model, reused)
        self._requests[cache] = prefix[:0]
        return Restored(
            cache=cache,
            tokens=len(tokens),
            reused_tokens=reused,
            loaded_bytes=reused * self._layout.nbytes // self._layout.tokens,
            timings={"hash": hashed - started, "load": time.perf_counter() - hashed},
        )

    def offload(
        self, input_ids: torch.Tensor, cache: DynamicCache, *, extra: bytes = b""
    ) -> Offloaded:
        """Hand the full chunks of `cache` to kvtier; those it has already are not copied.

        `input_ids` [1, tokens] are the tokens of the cache from its start: the prompt, and the
        answer too if wanted. Reads the cache and changes nothing. Raises InvalidRequest for a cache
        of another shape or kind.
        """
        check_cache(cache, self._shape)
        tokens = _token_list(input_ids)[: cache.get_seq_length()]
        prefix = self._client.prefix(tokens, extra, same_request=self._requests.get(cache))
        copied = 0
        try:
            with self._client.offload(prefix) as offload:
                for slot in offload:
                    self._courier.gather(cache, slot.index, slot.data)
                    copied += 1
            outcome = offload.outcome
        except KvtierError:
            outcome = None
        return Offloaded(copied, copied * self._layout.nbytes, outcome)

    def recycle(self, restored: Restored) -> None:
        """Take back a cache's memory for the next prompt; the cache is empty afterwards."""
        layers = [layer for layer in restored.cache.layers if isinstance(layer, ReservedLayer)]
        restored.cache.reset()  # type: ignore[no-untyped-call]
        if layers:
            self._spare = layers[0].room

    def _take_room(self, tokens: int) -> Room:
        spare, self._spare = self._spare, None
        if spare is not None and spare.tokens >= tokens:
            return spare
        return Room(self._shape, tokens)

    def _load(self, prefix: Prefix, room: Room) -> int:
        """Fill `room` from its start; how many tokens it holds then. Any trouble: fewer tokens."""
        reused = 0
        try:
            with self._client.load(prefix, partial=True) as loaded:
                for chunk in loaded:
                    first = chunk.index * self._layout.tokens
                    if first != reused or chunk.data.nbytes != self._layout.nbytes:
                        break
                    self._courier.scatter(chunk.data, room, chunk.index, chunk.tokens)
                    reused += chunk.tokens
        except KvtierError:
            return reused
        return reused


def _rope_of(config: Any) -> str:
    """The rotary parameters as canonical JSON."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {parameters.get("rope_type")} | {
        part.get("rope_type") for part in parameters.values() if isinstance(part, dict)
    }
    for kind in kinds & _LENGTH_DEPENDENT_ROPE:
        raise InvalidRequest(f"model: rope_type {kind!r} changes a prefix's keys with the prompt")
    return _canonical(parameters)


def _canonical(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), default=str)


def _token_list(input_ids: torch.Tensor) -> list[int]:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise InvalidRequest(f"input_ids: shape {tuple(input_ids.shape)}, one prompt [1, n] needed")
    tokens: list[int] = input_ids[0].tolist()
    return tokens
