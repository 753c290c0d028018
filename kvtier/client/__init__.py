"""What engines and connectors use: a client that never makes its engine wrong, slow or dead."""

from kvtier.client.client import Client, Explained, Held, KeyState, Path, connect
from kvtier.client.hints import Hints, StopReason
from kvtier.client.loading import Loaded, LoadedChunk
from kvtier.client.offloading import Offload, Offloaded, WriteSlot
from kvtier.client.paged import PagedEngine
from kvtier.client.paged_loading import PagedLoad
from kvtier.client.pinning import FIVE_MINUTES, ONE_HOUR, Pinned
from kvtier.client.stats import (
    CurvePoint,
    HitCurve,
    ServiceStats,
    TierUse,
    Unreachable,
    fetch_curves,
    fetch_stats,
)

__all__ = [
    "FIVE_MINUTES",
    "ONE_HOUR",
    "Client",
    "CurvePoint",
    "Explained",
    "Held",
    "Hints",
    "HitCurve",
    "KeyState",
    "Loaded",
    "LoadedChunk",
    "Offload",
    "Offloaded",
    "PagedEngine",
    "PagedLoad",
    "Path",
    "Pinned",
    "ServiceStats",
    "StopReason",
    "TierUse",
    "Unreachable",
    "WriteSlot",
    "connect",
    "fetch_curves",
    "fetch_stats",
]
