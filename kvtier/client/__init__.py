"""What engines and connectors use: a client that never makes its engine wrong, slow or dead."""

from kvtier.client.client import Client, Explained, Held, KeyState, Path, connect
from kvtier.client.loading import Loaded, LoadedChunk
from kvtier.client.offloading import Offload, Offloaded, WriteSlot
from kvtier.client.paged import PagedEngine
from kvtier.client.paged_loading import PagedLoad
from kvtier.client.stats import ServiceStats, TierUse, Unreachable, fetch_stats

__all__ = [
    "Client",
    "Explained",
    "Held",
    "KeyState",
    "Loaded",
    "LoadedChunk",
    "Offload",
    "Offloaded",
    "PagedEngine",
    "PagedLoad",
    "Path",
    "ServiceStats",
    "TierUse",
    "Unreachable",
    "WriteSlot",
    "connect",
    "fetch_stats",
]
