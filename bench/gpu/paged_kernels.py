"""Gather and scatter against a copy of the same bytes within the device."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from kvtier.bench.gpu.blocks import Blocks, Tables
from kvtier.bench.gpu.memory import Window, cut
from kvtier.bench.gpu.scale import Scale, Style
from kvtier.bench.payload import filled
from kvtier.bench.timing import ratio, seconds
from kvtier.kernels import paged_reference as reference
from kvtier.kernels.device import Device, Span, Urgency
from kvtier.kernels.devices import open_device
from kvtier.kernels.paged import Job, gather, scatter

_SPREAD = 2  # of the cache's blocks, one in so many belongs to the chunks


def measure(name: str, scale: Scale) -> dict[str, Any]:
    """Ratios of the kernels to a device-to-device copy, both counted as bytes read plus written, by
    layout of the cache. `gather_ratio` and `scatter_ratio` are the least. Raises DeviceError,
    WrongBytes."""
    by_style = {}
    for style_name, style in scale.styles.items():
        with closing(open_device(name)) as device:
            by_style[style_name] = _of_style(device, style, scale)
    return {
        "gather_ratio": min(each["gather_ratio"] for each in by_style.values()),
        "scatter_ratio": min(each["scatter_ratio"] for each in by_style.values()),
        "kernels": by_style,
    }


def _of_style(device: Device, style: Style, scale: Scale) -> dict[str, float]:
    trial = _Trial.of(device, style, scale)
    arguments = trial.blocks.cache, style.layout, trial.chunks, trial.tables
    trial.blocks.fill()
    gathered = trial.run(gather(*arguments), scale)
    trial.check_chunks()
    trial.blocks.wipe()
    scattered = trial.run(scatter(*arguments), scale)
    trial.blocks.check(trial.tables, trial.tables)
    moved_gb = 2 * scale.launches * trial.nbytes / 1e9
    return {
        "gather_ratio": ratio(gathered.copy, gathered.kernel),
        "scatter_ratio": ratio(scattered.copy, scattered.kernel),
        "gather_gb_s": moved_gb / median(gathered.kernel),
        "scatter_gb_s": moved_gb / median(scattered.kernel),
        "copy_gb_s": moved_gb / median(gathered.copy),
    }


@dataclass(frozen=True, slots=True)
class _Seconds:
    """Of each round: so many copies, and as many launches of a kernel."""

    copy: list[float]
    kernel: list[float]


@dataclass(slots=True)
class _Trial:
    """Blocks, chunks of theirs, and as much memory again for the bare copy."""

    device: Device
    style: Style
    blocks: Blocks
    tables: Tables
    chunks: list[Span]
    copied: tuple[Span, Span]

    @classmethod
    def of(cls, device: Device, style: Style, scale: Scale) -> "_Trial":
        count = scale.kernel_chunks
        nbytes = count * style.layout.nbytes
        blocks = Blocks(device, style, _SPREAD * count * style.blocks_per_chunk)
        chunks = cut(device.allocate(nbytes), style.layout.nbytes)
        other, source = (device.allocate(nbytes).span(0, nbytes) for _ in range(2))
        Window(device, nbytes).write(source, filled(1, nbytes, seed=2)[0])
        return cls(device, style, blocks, blocks.tables(count, seed=1), chunks, (other, source))

    @property
    def nbytes(self) -> int:
        return self.copied[0].nbytes

    def run(self, job: Job, scale: Scale) -> _Seconds:
        """Copies and launches in turn; each time from the first until all are done."""
        stream = self.device.stream(Urgency.LOADS)

        def timed(queue: Callable[[], None]) -> float:
            def queue_all() -> None:
                for _ in range(scale.launches):
                    queue()
                stream.synchronize()

            return seconds(queue_all)

        def copy() -> None:
            self.device.copy(stream, [self.copied])

        def launch() -> None:
            self.device.launch(stream, job.kernel, job.threads, job.job)

        rounds = [(timed(copy), timed(launch)) for _ in range(scale.rounds + 1)][1:]
        return _Seconds([copy_s for copy_s, _ in rounds], [kernel_s for _, kernel_s in rounds])

    def check_chunks(self) -> None:
        """Raise WrongBytes unless each chunk is what the kernels' reference says."""
        layout = self.style.layout
        planes = reference.planes_of(self.blocks.host_arrays(), self.style.axes)
        window = Window(self.device, layout.nbytes)
        for number, (chunk, table) in enumerate(zip(self.chunks, self.tables, strict=True)):
            right = np.zeros(layout.shape, np.uint16)
            reference.gather(planes, layout, right, table, range(layout.layers))
            window.check(chunk, right.view(np.uint8).reshape(-1), f"chunk {number} as gathered")
