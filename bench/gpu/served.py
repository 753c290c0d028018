"""A service with room for some chunks, and an engine process' end of it on a device."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvtier.bench.gpu.scale import MIB
from kvtier.bench.sidecar import Sidecar, SidecarFailed, sidecar
from kvtier.client import Client, connect
from kvtier.kernels.device import Device
from kvtier.kernels.devices import open_device
from kvtier.spaces import Layout, Space

_DEADLINE_S = 120.0
_SLOT_BYTES = 4096  # slots are whole multiples
_SLACK_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Served:
    """A service in its own process, a client connected to it, and the device that it was given."""

    service: Sidecar
    client: Client
    device: Device


@contextmanager
def served(name: str, layout: Layout, chunks: int, *, in_vram: bool) -> Iterator[Served]:
    """Run a service whose RAM holds that many chunks, and as many in VRAM on the device of that
    name where asked for; no disk. Raises DeviceError, SidecarFailed."""
    room = chunks * (layout.nbytes + _SLOT_BYTES) + _SLACK_BYTES
    settings = {"cpu.capacity": str(room), "disk.directory": ""}
    if in_vram:
        settings |= {"gpu.device": name, "gpu.capacity": str(room)}
    space = Space("kvtier-bench", layout)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-bench-"))
        service = stack.enter_context(sidecar(Path(folder), settings))
        device = stack.enter_context(closing(open_device(name)))
        client = stack.enter_context(
            connect(service.target, space, deadline_s=_DEADLINE_S, device=device)
        )
        if not client.wait_ready(_DEADLINE_S):
            raise SidecarFailed("the client could not connect")
        yield Served(service, client, device)
