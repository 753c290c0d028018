"""What a service says of itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kvtier.client.connection import describe
from kvtier.client.transport import SERVICE_FAILURES, GrpcTransport, Transport
from kvtier.errors import KvtierError
from kvtier.proto import cache_pb2 as pb

_T = TypeVar("_T")


class Unreachable(KvtierError):
    """No service answered at the given target."""

    status = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class TierUse:
    """What a tier holds."""

    name: str
    capacity_bytes: int
    used_bytes: int
    chunks: int


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """A service's state and its counters since start."""

    version: str
    uptime_s: float
    tiers: tuple[TierUse, ...]
    sessions: int
    leases: int
    spaces: int
    counters: dict[str, int]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The hit percentage of the chunks asked for that a capacity would have."""

    capacity_bytes: int
    hit_percent: float


@dataclass(frozen=True, slots=True)
class HitCurve:
    """The hit ratio by capacity. `tenant` is None for all of them together; a tenant's own curve
    gives it the whole capacity. `tier` is "cpu", or "disk" for RAM and disk together."""

    tenant: str | None
    tier: str
    capacity_bytes: int  # today's
    points: tuple[CurvePoint, ...]  # smallest capacity first
    rate: float  # share of the chunks that are sampled, 0 to 1
    requests: int
    sampled_chunks: int  # references to sampled chunks: what the points stand on
    seen_bytes: int  # what the largest capacity would hold now: beyond, nothing is known

    def hit_percent_at(self, capacity_bytes: int) -> float:
        """The hit percentage at a capacity between the points: a straight line joins them, and the
        last one holds beyond it."""
        below = CurvePoint(0, 0.0)
        for point in self.points:
            if capacity_bytes <= point.capacity_bytes:
                along = capacity_bytes - below.capacity_bytes
                share = along / max(1, point.capacity_bytes - below.capacity_bytes)
                return below.hit_percent + share * (point.hit_percent - below.hit_percent)
            below = point
        return below.hit_percent


def fetch_stats(target: str, timeout_s: float = 5.0) -> ServiceStats:
    """The statistics of the service at a target. For people and tools, not engines: it raises
    Unreachable when no service answers."""
    return _fetch(target, lambda transport: read_stats(transport, timeout_s))


def fetch_curves(target: str, timeout_s: float = 5.0) -> list[HitCurve]:
    """What other capacities would hit, of the service at a target, all tenants' first. Raises
    Unreachable when no service answers."""
    return _fetch(target, lambda transport: read_curves(transport, timeout_s))


def _fetch(target: str, read: Callable[[Transport], _T]) -> _T:
    transport = GrpcTransport(target)
    try:
        return read(transport)
    except SERVICE_FAILURES as error:
        raise Unreachable(f"no kvtier service answers at {target}: {describe(error)}") from None
    finally:
        transport.close()


def read_stats(transport: Transport, timeout_s: float) -> ServiceStats:
    """The statistics through a transport. Raises SERVICE_FAILURES."""
    response: pb.StatsResponse = transport.call("Stats", pb.StatsRequest(), timeout_s)
    return ServiceStats(
        version=response.version,
        uptime_s=response.uptime_s,
        tiers=tuple(
            TierUse(tier.name, tier.capacity_bytes, tier.used_bytes, tier.chunks)
            for tier in response.tiers
        ),
        sessions=response.sessions,
        leases=response.leases,
        spaces=response.spaces,
        counters=dict(response.counters),
    )


def read_curves(transport: Transport, timeout_s: float) -> list[HitCurve]:
    """The curves through a transport. Raises SERVICE_FAILURES."""
    response: pb.CurveResponse = transport.call("Curve", pb.CurveRequest(), timeout_s)
    return [
        HitCurve(
            tenant=None if curve.all_tenants else curve.tenant,
            tier=curve.tier,
            capacity_bytes=curve.capacity_bytes,
            points=tuple(
                CurvePoint(point.capacity_bytes, point.hit_percent) for point in curve.points
            ),
            rate=curve.rate,
            requests=curve.requests,
            sampled_chunks=curve.sampled_chunks,
            seen_bytes=curve.seen_bytes,
        )
        for curve in response.curves
    ]
