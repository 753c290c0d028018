"""How a transformers model's KV lies in memory: its shape, its caches, copies to and from chunks.

Used by `kvtier.connectors.transformers`, which is the connector. Everything here is about plain
caches: a `DynamicCache` of full-attention layers, for a batch of one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvtier.errors import InvalidRequest
from kvtier.fingerprint import Sample, sample_positions
from kvtier.spaces import CANONICAL_AXES, Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

# Elements travel as integers of their size: NumPy has no bfloat16, and bits must not change.
_CARRIERS: dict[int, tuple[torch.dtype, "np.dtype[Any]"]] = {
    1: (torch.int8, np.dtype(np.int8)),
    2: (torch.int16, np.dtype(np.int16)),
    4: (torch.int32, np.dtype(np.int32)),
    8: (torch.int64, np.dtype(np.int64)),
}


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a model's KV looks like: `heads` x `head_dim` for each token, plane and layer."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def layout(self, chunk_tokens: int) -> Layout:
        """The layout of this KV's chunks."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Layout(dtype, self.layers, self.heads, self.head_dim, chunk_tokens)

    def check_layout(self, layout: Layout) -> None:
        """Raise InvalidRequest unless chunks of `layout` are chunks of this KV."""
        if layout != self.layout(layout.tokens) or layout.axes != CANONICAL_AXES:
            raise InvalidRequest(f"space.layout: {layout} is not the layout of the model's {self}")


def probe(model: "PreTrainedModel") -> KvShape:
    """Run one token through the model and look at the cache it fills.

    Raises InvalidRequest, naming the layer type or the setting, for a model whose KV is not plain.
    """
    implementation = getattr(model.generation_config, "cache_implementation", None)
    if implementation not in (None, "dynamic"):
        raise InvalidRequest(f"model: cache_implementation is {implementation!r}, not 'dynamic'")
    if model.config.is_encoder_decoder:
        raise InvalidRequest("model: encoder-decoder models are not supported")
    cache = DynamicCache(config=model.config)
    _check_layer_types(cache, model.config.get_text_config(decoder=True))
    with torch.no_grad():
        token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        model(input_ids=token, past_key_values=cache, use_cache=True)
    first = planes(cache.layers[0])[0]
    if first is None or first.ndim != 4:
        raise InvalidRequest(f"model: {type(model).__name__} does not use the cache it is given")
    shape = KvShape(len(cache.layers), first.shape[1], first.shape[3], first.dtype, first.device)
    check_cache(cache, shape)
    return shape


def check_cache(cache: DynamicCache, shape: KvShape) -> None:
    """Raise InvalidRequest unless every layer has plain KV of this shape, for a batch of one."""
    if len(cache.layers) != shape.layers:
        raise InvalidRequest(f"cache: {len(cache.layers)} layers, the model has {shape.layers}")
    tokens = cache.get_seq_length()
    wanted = ((1, shape.heads, tokens, shape.head_dim), shape.dtype, shape.device)
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, ReservedLayer):
            raise InvalidRequest(f"cache: layer {index} is a {type(layer).__name__}")
        for name, part in zip(("keys", "values"), planes(layer), strict=True):
            found = None if part is None else (tuple(part.shape), part.dtype, part.device)
            if found != wanted:
                raise InvalidRequest(f"cache: {name} of layer {index} are {found}, not {wanted}")


def planes(layer: Any) -> tuple[Any, Any]:
    """Keys and values of a cache's layer, each [batch, heads, tokens, head_dim], or None."""
    return layer.keys, layer.values


class Room:
    """Memory for the KV of `tokens` tokens: one tensor [layers, 2, heads, tokens, head_dim].

    With `touch` every page is written now, so that nobody waits for the system to clear it later.
    """

    def __init__(self, shape: KvShape, tokens: int, *, touch: bool = False) -> None:
        extents = (shape.layers, 2, shape.heads, tokens, shape.head_dim)
        # Not an inference tensor, whatever mode the caller is in: generate() must write to it too.
        with torch.inference_mode(False):
            if shape.device.type == "cpu":
                carrier = _CARRIERS[shape.dtype.itemsize][1]
                # NumPy asks for huge pages, torch does not.
                self.data = torch.from_numpy(np.empty(extents, carrier)).view(shape.dtype)
            else:
                self.data = torch.empty(extents, dtype=shape.dtype, device=shape.device)
            if touch:
                self.data.zero_()
        self.tokens = tokens

    def cache(self, model: "PreTrainedModel", tokens: int) -> DynamicCache:
        """A cache of the model whose KV is the first `tokens` tokens of this room."""
        cache = DynamicCache(config=model.config)
        cache.layers[:] = [ReservedLayer(self, layer, tokens) for layer in range(len(self.data))]
        return cache


class ReservedLayer(DynamicLayer):
    """A DynamicLayer that appends in place while its room lasts, instead of concatenating.

    `keys` and `values` are views [1, heads, tokens, head_dim] of the room. After anything that
    replaces them (beam search, a full room) it behaves as every DynamicLayer does. Copy a cache of
    such layers by `copy.deepcopy`: a shallow copy would share its room.
    """

    def __init__(self, room: Room, layer: int, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room
        self._rooms = room.data[layer].unsqueeze(1).unbind(0)
        self.dtype, self.device = room.data.dtype, room.data.device
        self.keys, self.values = (part[:, :, :tokens] for part in self._rooms)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append KV [1, heads, new tokens, head_dim]; returns all keys and all values."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.room.tokens or not self._in_room() or key_states.shape[0] != 1:
            return super().update(key_states, value_states, *args, **kwargs)
        for part, states in zip(self._rooms, (key_states, value_states), strict=True):
            part[:, :, start:end] = states
        self.keys, self.values = (part[:, :, :end] for part in self._rooms)
        return self.keys, self.values

    def _in_room(self) -> bool:
        return self.is_initialized and all(
            view.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
            and view.storage_offset() == part.storage_offset()
            for view, part in zip(planes(self), self._rooms, strict=True)
        )


class Courier:
    """Copies between chunks in host memory and a cache, bit for bit.

    On the CPU straight between the two. For another device by way of one pinned buffer and one
    buffer on the device, so that each chunk crosses in one transfer.
    """

    def __init__(self, shape: KvShape, layout: Layout) -> None:
        self._tokens = layout.tokens
        self._extents = layout.shape
        self._carrier, self._element = _CARRIERS[shape.dtype.itemsize]
        self._staging: tuple[torch.Tensor, torch.Tensor] | None = None
        if shape.device.type != "cpu":
            self._staging = (
                torch.empty(layout.shape, dtype=shape.dtype, pin_memory=True),
                torch.empty(layout.shape, dtype=shape.dtype, device=shape.device),
            )

    def scatter(self, data: memoryview, room: Room, chunk: int, tokens: int) -> None:
        """Copy the KV of a chunk's first `tokens` tokens to its place in the room."""
        source = self._array(data)[:, :, :, :tokens]
        first = chunk * self._tokens
        target = room.data[:, :, :, first : first + tokens]
        if self._staging is None:
            np.copyto(self._view(target), source)
            return
        pinned, remote = (part[:, :, :, :tokens] for part in self._staging)
        np.copyto(self._view(pinned), source)
        remote.copy_(pinned)
        target.copy_(remote)

    def gather(self, cache: DynamicCache, chunk: int, data: memoryview) -> None:
        """Copy a chunk of the cache into `data`."""
        target = self._array(data)
        if self._staging is None:
            for index, part in self._parts(cache, chunk):
                np.copyto(target[index], self._view(part))
            return
        pinned, remote = self._staging
        for index, part in self._parts(cache, chunk):
            remote[index].copy_(part)
        pinned.copy_(remote)
        np.copyto(target, self._view(pinned))

    def _parts(
        self, cache: DynamicCache, chunk: int
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """(layer, plane) and the [heads, tokens, head_dim] that belong there."""
        span = self._span(chunk)
        for number, layer in enumerate(cache.layers):
            for plane, part in enumerate(planes(layer)):
                yield (number, plane), part[0, :, span]

    def _span(self, chunk: int) -> slice:
        return slice(chunk * self._tokens, (chunk + 1) * self._tokens)

    def _array(self, data: memoryview) -> "NDArray[Any]":
        return np.frombuffer(data, dtype=self._element).reshape(self._extents)

    def _view(self, tensor: torch.Tensor) -> "NDArray[Any]":
        viewed: NDArray[Any] = tensor.detach().view(self._carrier).numpy()
        return viewed


def samples(model: "PreTrainedModel") -> Iterator[Sample]:
    """Samples of every parameter and buffer: the same in every process, on every device."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise InvalidRequest(f"model: {name} is not in memory; give model_path")
        positions = sample_positions(name, math.prod(tensor.shape))
        chosen = tensor.detach().reshape(-1)[torch.tensor(positions, device=tensor.device)]
        values = chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        yield Sample(name, str(tensor.dtype), tuple(tensor.shape), values)


def _check_layer_types(cache: DynamicCache, config: Any) -> None:
    names = getattr(config, "layer_types", None) or ["no layer_types"] * len(cache.layers)
    for index, (layer, name) in enumerate(zip(cache.layers, names, strict=False)):
        if type(layer) is not DynamicLayer:
            raise InvalidRequest(
                f"model: layer {index} is {name} ({type(layer).__name__}); only full_attention "
                "layers have KV that can be reused by prefix"
            )
