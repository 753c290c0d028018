"""The way between the model's cache and a sidecar: KV goes straight into the cache's memory.

The room of the model is seen as blocks, one for each chunk: a view by strides, of which kvtier's
kernels are told the address. Nothing is copied twice. The first token is computed layer by layer,
while later layers are still on their way.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from transformers import DynamicCache

import kvtier
from kvtier.bench.ttft.model import Model
from kvtier.chunks import Prefix
from kvtier.client import PagedEngine
from kvtier.client.paged_loading import PagedLoad
from kvtier.connectors.transformers import space_of
from kvtier.errors import KvtierError
from kvtier.kernels.device import Device, Event, Urgency
from kvtier.kernels.devices import open_device
from kvtier.kernels.paged import PagedCache

SOURCES = ("load_vram_hits", "load_ram_hits", "load_disk_hits")
_AXES = "layer,plane,block,head,token,dim"
_DEADLINE_S = 120.0  # longer than a slow disk takes for the longest prompt
_STAGED_CHUNKS = 8
_RAISING_S = 60.0
_POLL_S = 0.005


class Unanswered(KvtierError):
    """The sidecar could not be reached, or does not say what it has done."""


class Work(Protocol):
    """The model's own work on the device, in its order."""

    def record(self) -> Event:
        """A point after all that is queued now."""
        ...

    def wait(self, event: Event) -> None:
        """What is queued from now on begins once the event is done."""
        ...


class _OnCpu:
    """torch on a CPU is done with its work when a call returns, so it waits here and now."""

    def __init__(self, device: Device) -> None:
        self._idle = device.stream(Urgency.LOADS)

    def record(self) -> Event:
        return self._idle.record()

    def wait(self, event: Event) -> None:
        event.synchronize()


def work_of(device: Device, torch_device: torch.device) -> Work:
    """What the model queues from this thread, as the device sees it."""
    if torch_device.type == "cpu":
        return _OnCpu(device)
    return device.stream_of(torch.cuda.current_stream(torch_device).cuda_stream)


@dataclass(frozen=True, slots=True)
class First:
    """A prompt's first token. `reused_tokens` is 0 where all had to be computed; `kvtier_s` is the
    part of `ttft_s` that the engine's thread spent in kvtier."""

    token: int
    logits: torch.Tensor
    cache: DynamicCache
    ttft_s: float
    kvtier_s: float
    reused_tokens: int


class Reloads:
    """One engine's session with a sidecar. Raises Unanswered when there is none."""

    def __init__(self, model: Model, device_name: str, target: str) -> None:
        self._model = model
        tokens = model.shape.chunk_tokens
        space = space_of(model.model, chunk_tokens=tokens)
        self._device = open_device(device_name)
        self.client = kvtier.connect(target, space, deadline_s=_DEADLINE_S, device=self._device)
        if not self.client.wait_ready(_DEADLINE_S):
            raise Unanswered(f"no sidecar answers at {target} within {_DEADLINE_S:.0f} s")
        # One block is one chunk: the tokens of a head follow each other in both.
        room = model.room.data
        blocks = room.view(*room.shape[:3], -1, tokens, room.shape[4]).permute(0, 1, 3, 2, 4, 5)
        self._paged = PagedEngine(
            self.client,
            self._device,
            PagedCache.of([blocks], _AXES),
            staging_bytes=_STAGED_CHUNKS * space.layout.nbytes + (1 << 16),
        )
        self._work = work_of(self._device, model.device)
        self._tokens = tokens
        self._under_way: PagedLoad | None = None
        self._waited_s = 0.0
        self._raised_due = self.counters()["raised_chunks"]
        self._hooks = [
            layer.register_forward_pre_hook(self._waiting_for(number))
            for number, layer in enumerate(model.model.get_decoder().layers)
        ]

    def first_token(self, tokens: Sequence[int]) -> First:
        """Load what the sidecar has of a prompt, compute the rest, and time it.

        From the tokens in hand to the first token's id in hand. Unless all but the last token is
        loaded, all is computed.
        """
        model, self._waited_s = self._model, 0.0
        started_s = time.perf_counter()
        prefix = self._prefix(tokens)
        load = self._load(prefix)
        kvtier_s = time.perf_counter() - started_s
        with load:
            computed = self._compute_last(tokens, load) if load.chunks == len(prefix) else None
            finishing_s = time.perf_counter()
            right = load.finish()
            kvtier_s += self._waited_s + time.perf_counter() - finishing_s
        reused = len(tokens) - 1 if computed and right == len(prefix) else 0
        cache, logits = computed if computed and reused else model.compute(tokens)
        token = int(logits.argmax())
        ttft_s = time.perf_counter() - started_s
        return First(token, logits, cache, ttft_s, kvtier_s, reused)

    def store(self, tokens: Sequence[int], chunks: int | None = None) -> int:
        """Offload the full chunks of the prompt that is in the room, or so many of them; returns
        how many were stored."""
        prefix = self._prefix(tokens)[:chunks]
        outcome = self._paged.offload(prefix, _tables(prefix), after=self._work.record())
        return len(outcome.stored)

    def rehearse(self, tokens: Sequence[int]) -> None:
        """Store and load one chunk of a prompt that is in the room, before anything is timed."""
        self.store(tokens, 1)
        self._load(self._prefix(tokens)[:1]).finish()

    def counters(self) -> dict[str, int]:
        """The sidecar's counters. Raises Unanswered."""
        stats = self.client.stats()
        if stats is None:
            raise Unanswered("the sidecar does not tell its counters")
        return stats.counters

    def settle(self, before: dict[str, int]) -> dict[str, int]:
        """Where the chunks of the loads since `before` came from.

        Waits until those that were not in VRAM have been raised into it, so that no later load has
        the bus with it. Where they are not, the next load of them tells.
        """
        now = self.counters()
        sources = {name: now[name] - before[name] for name in SOURCES}
        self._raised_due += sources["load_ram_hits"] + sources["load_disk_hits"]
        until_s = time.monotonic() + _RAISING_S
        while self.counters()["raised_chunks"] < self._raised_due and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        return sources

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._paged.close()
        self.client.close()
        self._device.close()

    def _prefix(self, tokens: Sequence[int]) -> Prefix:
        return self.client.prefix(tokens)[: (len(tokens) - 1) // self._tokens]

    def _load(self, prefix: Prefix) -> PagedLoad:
        return self._paged.load(prefix, _tables(prefix), after=self._work.record(), by_layer=True)

    def _compute_last(
        self, tokens: Sequence[int], load: PagedLoad
    ) -> tuple[DynamicCache, torch.Tensor]:
        """Queue the last token's sums, each layer behind its KV; returns the cache and the
        logits. They are right if the load is."""
        cache = self._model.cache(len(tokens) - 1)
        self._under_way = load
        logits = self._model.forward(self._model.input_ids(tokens[-1:]), cache)
        self._under_way = None
        return cache, logits

    def _waiting_for(self, layer: int) -> Any:
        """A hook that lets a layer begin once its KV is there."""

        def wait(*_: object) -> None:
            if self._under_way is not None:
                started_s = time.perf_counter()
                self._work.wait(self._under_way.ready(layer))
                self._waited_s += time.perf_counter() - started_s

        return wait


def _tables(prefix: Prefix) -> list[list[int]]:
    return [[chunk] for chunk in range(len(prefix))]
