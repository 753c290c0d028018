"""kvtier keeps the KV of prompt prefixes outside the inference engine and hands it back.

import kvtier
from kvtier.spaces import Layout, Space

space = Space("my-model", Layout(dtype="float16", layers=32, heads=8, head_dim=128))
client = kvtier.connect("unix:///run/kvtier.sock", space)   # a sidecar on this host
client = kvtier.open(space, cpu="1GiB")                     # the same, inside this process
"""

from typing import TYPE_CHECKING, Any

from kvtier.version import __version__

__all__ = ["__version__", "connect", "open"]

if TYPE_CHECKING:
    from kvtier.client import connect
    from kvtier.service.embedded import open_in_process as open


def __getattr__(name: str) -> Any:
    # Imported on first use: an engine that only connects must not load LMDB and the service.
    if name == "connect":
        from kvtier.client import connect  # noqa: PLC0415

        return connect
    if name == "open":
        from kvtier.service.embedded import open_in_process  # noqa: PLC0415

        return open_in_process
    raise AttributeError(f"module 'kvtier' has no attribute {name!r}")
