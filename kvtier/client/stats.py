"""What a service says of itself."""

from dataclasses import dataclass

from kvtier.client.connection import describe
from kvtier.client.transport import SERVICE_FAILURES, GrpcTransport, Transport
from kvtier.errors import KvtierError
from kvtier.proto import cache_pb2 as pb


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


def fetch_stats(target: str, timeout_s: float = 5.0) -> ServiceStats:
    """The statistics of the service at a target. For people and tools, not engines: it raises
    Unreachable when no service answers."""
    transport = GrpcTransport(target)
    try:
        return read_stats(transport, timeout_s)
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
