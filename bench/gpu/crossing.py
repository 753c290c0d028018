"""The copy engine or a kernel: from which size on are parts of chunks in RAM better staged?

Layers of a load are moved exactly as `PagedEngine` moves them: through staging, and by a kernel
that reads RAM by itself, in turn.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

from kvtier.bench.gpu.blocks import Blocks, Tables
from kvtier.bench.gpu.memory import Window, cut, pinned
from kvtier.bench.gpu.scale import Scale, Style
from kvtier.bench.payload import WrongBytes, filled
from kvtier.bench.timing import ratio, seconds
from kvtier.client.loading import Loaded
from kvtier.client.paged_health import Health
from kvtier.client.paged_loading import LEAST_COPY_BYTES, Loads, parts_of
from kvtier.config import format_bytes
from kvtier.kernels.device import Device, Span, Stream, Urgency
from kvtier.kernels.devices import open_device
from kvtier.kernels.paged import Places, gather
from kvtier.spaces import Layout

_HEAD_DIM = 64
_MOST_TOKENS = 256
_BUFFERS = 4
_ALWAYS, _NEVER = 1, 1 << 40  # least bytes of what goes through staging
# Where the bus is the limit both ways are alike, and staging leaves the processors to the engine.
# 3 % is what medians of the same work may differ by: a guess.
_AS_FAST = 0.97


def measure(name: str, scale: Scale) -> dict[str, Any]:
    """How long the kernel alone takes over how long copy and kernel take, by the bytes of a part:
    above 1 staging is faster.

    `least_copy_bytes` is the smallest of the sizes from which on staging is as fast, but for 3 %;
    None when it is slower at the largest. It is what `LEAST_COPY_BYTES` should be. Raises
    DeviceError, WrongBytes.
    """
    gains: dict[int, float] = {}
    for nbytes in scale.parts:
        with closing(open_device(name)) as device:
            gains[nbytes] = _gain(device, nbytes, scale)
    return {
        "least_copy_bytes": crossing(gains),
        "staging": {
            "least_copy_bytes_now": LEAST_COPY_BYTES,
            "gain": {format_bytes(nbytes): gain for nbytes, gain in gains.items()},
        },
    }


def crossing(gains: Mapping[int, float]) -> int | None:
    """The smallest size such that from there on no gain is below 0.97; None when the largest's
    is."""
    found = None
    for size in sorted(gains, reverse=True):
        if gains[size] < _AS_FAST:
            break
        found = size
    return found


def layout_of(part_bytes: int, layers: int) -> Layout:
    """Chunks of which a layer has that many bytes, a power of two of at least 4 KiB: more tokens up
    to 256, then more heads."""
    rows = part_bytes // (2 * 2 * _HEAD_DIM)  # keys and values of 16 bits
    tokens = min(rows, _MOST_TOKENS)
    return Layout("bfloat16", layers, rows // tokens, _HEAD_DIM, tokens)


def _gain(device: Device, part_bytes: int, scale: Scale) -> float:
    layers = max(
        1, min(scale.part_layers, scale.most_load_bytes // scale.part_chunks // part_bytes)
    )
    trial = _Trial(device, layout_of(part_bytes, layers), scale.part_chunks)
    staged, direct = trial.loads(_ALWAYS), trial.loads(_NEVER)
    direct_s: list[float] = []
    staged_s: list[float] = []
    for _ in range(scale.rounds + 1):  # the first does not count
        direct_s.append(seconds(partial(trial.load, direct)))
        staged_s.append(seconds(partial(trial.load, staged)))
    for way in (direct, staged):
        trial.check(way)
    return ratio(direct_s[1:], staged_s[1:])


@dataclass(frozen=True, slots=True)
class _Chunk:
    span: Span


class _InRam:
    """What `Loads` asks of a `Loaded`, with chunks that no service holds."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans

    def __iter__(self) -> Iterator[_Chunk]:
        return map(_Chunk, self._spans)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


class _Trial:
    """Chunks in RAM and the blocks they go to."""

    def __init__(self, device: Device, layout: Layout, chunks: int) -> None:
        style = Style(layout, "block,token,head,dim")
        self._device = device
        self._layout = layout
        self._blocks = Blocks(device, style, chunks * style.blocks_per_chunk)
        self._tables: Tables = self._blocks.tables(chunks, seed=1)
        self._parts = parts_of(self._blocks.cache, layout, by_layer=True)
        ram = pinned(device, chunks * layout.nbytes)
        self._right = filled(1, ram.array.nbytes, seed=3)[0]
        ram.array[:] = self._right
        self._chunks = cut(ram.region, layout.nbytes)
        self._staging = cut(device.allocate(_BUFFERS * layout.nbytes), layout.nbytes)
        self._stream: Stream = device.stream(Urgency.LOADS)

    def loads(self, least_copy_bytes: int) -> Loads:
        """One way to load."""
        return Loads(self._device, self._staging, least_copy_bytes, Health())

    def load(self, way: Loads) -> None:
        """Bring all chunks to their blocks, layer by layer."""
        source = cast(Loaded, _InRam(self._chunks))
        places = Places.of(self._blocks.cache, self._layout, self._tables, written=True)
        under_way = way.begin(source, self._parts, places, self._stream.record())
        if under_way.finish() != len(self._chunks):
            raise WrongBytes("a load was shorter than its chunks; its reason is in the log above")

    def check(self, way: Loads) -> None:
        """Raise WrongBytes unless that way brings every byte to its place."""
        self._blocks.wipe()
        self.load(way)
        gathered = self._device.allocate(self._right.nbytes)
        spans = cut(gathered, self._layout.nbytes)
        job = gather(self._blocks.cache, self._layout, spans, self._tables)
        self._device.launch(self._stream, job.kernel, job.threads, job.job)
        self._stream.synchronize()
        window = Window(self._device, gathered.nbytes)
        window.check(gathered.span(0, gathered.nbytes), self._right, "blocks as loaded")
