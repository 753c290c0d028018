"""The curves of a service: for all tenants together and for each, for RAM and for RAM with disk.

Nothing is replayed on the way of an answer: `asked` queues, and `work`, which the event loop calls,
takes small pieces of it with pauses between them. When the queue does not keep up, the rates go
down instead.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvtier.chunks import ChunkKey
from kvtier.tiers.curve import Curve, Point, Request
from kvtier.tiers.curve_popular import Popular
from kvtier.tiers.curve_replay import MakeFamily

MOST_TENANTS = 16
# What may be held by each replay: of all tenants' chunks, and of one tenant's.
MOST_CHUNKS = 8192
MOST_TENANT_CHUNKS = 1024
_SIXTEENTHS = (16, 20, 24, 32, 64)  # of today's capacity: up to four times
_MOST_WAITING = 32_768  # keys
_PIECE = 256  # sampled chunks that are replayed between two pauses
_REQUEST = 8  # what a request costs of which no chunk is sampled, in sampled chunks


@dataclass(frozen=True, slots=True)
class Reading:
    """One curve. `tenant` is None for all of them together; a tenant's own curve gives it the whole
    capacity. `tier` is "cpu", or "disk" for RAM and disk together."""

    tenant: str | None
    tier: str
    capacity_bytes: int  # today's
    points: list[Point]
    rate: float  # share of the chunks that are sampled
    requests: int
    sampled_chunks: int  # references to sampled chunks: what the points stand on
    seen_bytes: int  # what the largest capacity would hold now


class Curves:
    """Replays what is asked for against other capacities of each tier.

    `capacities` are today's bytes by the tier's name. `defer` is to call what it gets a few
    milliseconds later, on the same thread.
    """

    def __init__(
        self,
        capacities: dict[str, int],
        make_family: MakeFamily,
        defer: Callable[[Callable[[], None]], object],
    ) -> None:
        self._capacities = capacities
        self._make_family = make_family
        self._defer = defer
        self._all = self._stream(MOST_CHUNKS)
        self._tenants: dict[str, _Stream] = {}
        self._waiting: deque[tuple[str, Request]] = deque()
        self._keys_waiting = 0
        self._under_way: Iterator[int] = iter(())
        self._scheduled = False

    def _stream(self, most_chunks: int) -> "_Stream":
        curves = {
            tier: Curve(
                [nbytes * part // 16 for part in _SIXTEENTHS], self._make_family, most_chunks
            )
            for tier, nbytes in self._capacities.items()
        }
        return _Stream(Popular(), curves)

    def asked(
        self,
        tenant: str,
        chunk_bytes: int,
        keys: Sequence[ChunkKey],
        now_s: float,
        *,
        reads: bool = True,
    ) -> None:
        """A prompt's full chunks are asked for, in prompt order and from its first one on; without
        `reads` they are offered only. Costs the same for any prompt."""
        if self._keys_waiting + len(keys) > _MOST_WAITING:
            self._fall_behind()
        self._waiting.append((tenant, Request(chunk_bytes, keys, now_s, reads)))
        self._keys_waiting += len(keys)
        self._schedule()

    def work(self) -> None:
        """Replay a piece of what waits; asks to be called again while there is more."""
        self._scheduled = False
        left = _PIECE
        while left > 0:
            done = self._step()
            if done is None:
                return
            left -= done
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._defer(self.work)

    def settle(self) -> None:
        """Replay all that waits, now: for benchmarks and tests."""
        while self._step() is not None:
            pass

    def _step(self) -> int | None:
        """One small piece of work: its cost, in sampled chunks. None when nothing waits."""
        while (done := next(self._under_way, None)) is None:
            if not self._waiting:
                return None
            tenant, request = self._waiting.popleft()
            self._keys_waiting -= len(request.keys)
            self._under_way = self._replay(tenant, request)
        return done

    def _replay(self, tenant: str, request: Request) -> Iterator[int]:
        yield _REQUEST
        yield from self._all.steps(request)
        own = self._tenants.get(tenant)
        if own is None and len(self._tenants) < MOST_TENANTS:
            own = self._tenants[tenant] = self._stream(MOST_TENANT_CHUNKS)
        if own is not None and len(self._tenants) > 1:  # of a single one, all is said already
            yield from own.steps(request)

    def _fall_behind(self) -> None:
        """Give up what waits, and sample less from now on."""
        self._waiting.clear()
        self._keys_waiting = 0
        streams = (self._all, *self._tenants.values())
        curves = [curve for stream in streams for curve in stream.curves.values()]
        finest = max(curve.rate for curve in curves)
        for curve in curves:
            if curve.rate > finest / 4:  # the others are not what takes the time
                curve.coarsen()

    def read(self) -> list[Reading]:
        """Every curve, that of all tenants first."""
        named: list[tuple[str | None, _Stream]] = [(None, self._all)]
        if len(self._tenants) > 1:
            named += self._tenants.items()
        return [
            Reading(
                tenant=name,
                tier=tier,
                capacity_bytes=self._capacities[tier],
                points=curve.points(),
                rate=curve.rate,
                requests=curve.requests,
                sampled_chunks=curve.sampled_chunks,
                seen_bytes=curve.seen_bytes,
            )
            for name, stream in named
            for tier, curve in stream.curves.items()
        ]


@dataclass(frozen=True, slots=True)
class _Stream:
    """What is replayed for a tenant, or for all."""

    popular: Popular
    curves: dict[str, Curve]

    def steps(self, request: Request) -> Iterator[int]:
        if request.reads:
            self.popular.count(request.keys)
        popular = self.popular.run(request.keys)
        for curve in self.curves.values():
            yield from curve.steps(request, popular)
