"""How chunks move between RAM and a device's memory: both directions at once, loads first.

Each direction has two lanes, one for loads, which somebody waits for, and one for offloads. A lane
is a thread with a stream of its own: it queues copies on the stream, and reports each one to the
event loop once its bytes have arrived. An offload starts only while no load is under way in its
direction, in pieces, so that a load that comes in between waits for two pieces at most. One that
somebody comes to wait for changes lanes, if it was not begun.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

from kvtier.kernels.device import Device, DeviceFault, Event, Place, Span, Stream, Urgency
from kvtier.tiers.base import Outcome

logger = logging.getLogger(__name__)

# Of one lane of loads: enough to keep the bus busy while the host is told of what has arrived.
LOADS_IN_FLIGHT_BYTES = 256 << 20


class Direction(Enum):
    """Seen from the engine: up is faster."""

    UP = "up"  # RAM to the device
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Pacing:
    """What offloads may take of the bus. At most `in_flight_bytes` are on their way at once, in two
    pieces; with a `share` below 1, the lane rests after each, so that it uses that part of the
    time."""

    in_flight_bytes: int = 32 << 20
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.in_flight_bytes <= 0 or not 0.0 < self.share <= 1.0:
            raise ValueError(f"pacing: {self} needs positive bytes and a share in (0, 1]")


@dataclass(slots=True, eq=False)
class Haul:
    """One copy. Its bytes have arrived once `outcome` is HIT; FAILED leaves the target undefined.
    Until then both spans must stay as they are."""

    target: Span
    source: Span
    outcome: "asyncio.Future[Outcome]"
    lock: threading.Condition  # its direction's: guards what its lane takes
    sent_bytes: int = 0
    given_up: bool = False
    failed: bool = False

    def cancel(self) -> bool:
        """Give up a copy that was not begun: its outcome is then FAILED. False once it was."""
        with self.lock:
            self.given_up |= self.sent_bytes == 0 and not self.outcome.done()
        if self.given_up and not self.outcome.done():
            self.outcome.set_result(Outcome.FAILED)
        return self.given_up


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a haul; with the last one it is whole."""

    haul: Haul
    target: Span
    source: Span
    last: bool


@dataclass(frozen=True, slots=True)
class _Flight:
    """Pieces that were queued together, and when they have arrived."""

    pieces: list[_Piece]
    nbytes: int
    started_s: float
    arrived: Event


class Bus:
    """All copies between RAM and one device. Its methods belong to the event loop's thread.

    A `fault` of the device stops the lanes: copies end as FAILED, also those that are asked for
    later. `on_fault` is told of it once, before any of them.

    Raises DeviceError when the device has no streams for it.
    """

    def __init__(self, device: Device, pacing: Pacing) -> None:
        self._device = device
        self._pacing = pacing
        self._streams = {
            (direction, urgency): device.stream(urgency)
            for direction in Direction
            for urgency in Urgency
        }
        self._lanes: dict[tuple[Direction, Urgency], _Lane] = {}
        self.fault: DeviceFault | None = None
        self.on_fault: Callable[[DeviceFault], None] = lambda fault: None

    def start(self) -> None:
        """Start the lanes; needs the running loop."""
        loop = asyncio.get_running_loop()

        def tell(fault: DeviceFault) -> None:
            loop.call_soon_threadsafe(self._stop_at, fault)

        traffic = {direction: _Traffic() for direction in Direction}
        for (direction, urgency), stream in self._streams.items():
            paced = self._pacing if urgency is Urgency.OFFLOADS else None
            side = traffic[direction]
            lane = _Lane(_End(self._device, stream, tell), loop, side, paced)
            lane.start(f"kvtier-{direction.value}-{urgency.value}")
            self._lanes[direction, urgency] = lane

    def move(self, target: Span, source: Span, urgency: Urgency) -> Haul:
        """Queue a copy between host and device memory.

        Raises ValueError when the sizes differ or both are in the same place.
        """
        ends = (source.region.place, target.region.place)
        if target.nbytes != source.nbytes or ends[0] is ends[1]:
            raise ValueError(f"move: {source.nbytes} bytes {ends} to {target.nbytes}")
        lane = self._lanes[_direction(source), urgency]
        haul = Haul(target, source, asyncio.get_running_loop().create_future(), lane.lock)
        if self.fault is None:
            lane.add(haul)
        else:
            haul.outcome.set_result(Outcome.FAILED)
        return haul

    def hurry(self, haul: Haul) -> None:
        """Somebody waits for a copy now: an offload that was not begun goes with the loads."""
        if self.fault is not None:
            return  # its lane tells of it
        direction = _direction(haul.source)
        with haul.lock:  # both lanes' own
            if self._lanes[direction, Urgency.OFFLOADS].give_back(haul):
                self._lanes[direction, Urgency.LOADS].add(haul)

    async def close(self) -> None:
        """Stop: copies not begun end as FAILED, those under way finish first."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.stop()
        for lane in lanes.values():
            await asyncio.to_thread(lane.join)

    def _stop_at(self, fault: DeviceFault) -> None:
        if self.fault is None:
            self.fault = fault
            for lane in self._lanes.values():
                lane.stop()
            self.on_fault(fault)


@dataclass(slots=True)
class _Traffic:
    """One direction's lanes meet here. `loads` are those waiting or under way."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    loads: int = 0


@dataclass(frozen=True, slots=True)
class _End:
    """A lane's end at the device, and whom it tells of a fault."""

    device: Device
    stream: Stream
    tell: Callable[[DeviceFault], None]


class _Lane:
    """One direction and urgency: a queue, a stream and the thread between them."""

    def __init__(
        self,
        end: _End,
        loop: asyncio.AbstractEventLoop,
        traffic: _Traffic,
        pacing: Pacing | None,
    ) -> None:
        self._end = end
        self._loop = loop
        self._traffic = traffic
        self._pacing = pacing
        self._waiting: deque[Haul] = deque()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def lock(self) -> threading.Condition:
        return self._traffic.changed

    def add(self, haul: Haul) -> None:
        with self._traffic.changed:
            self._waiting.append(haul)
            if self._pacing is None:
                self._traffic.loads += 1
            self._traffic.changed.notify_all()

    def give_back(self, haul: Haul) -> bool:
        """Take out a copy that waits here and was not begun; False when there is none such."""
        with self._traffic.changed:
            waits = not haul.sent_bytes and not haul.given_up and haul in self._waiting
            if waits:
                self._waiting.remove(haul)
                self._one_less()
            return waits

    def stop(self) -> None:
        with self._traffic.changed:
            self._stopped = True
            self._traffic.changed.notify_all()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join()

    # ── the thread ────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        flying: deque[_Flight] = deque()
        while True:
            room = self._most_bytes - sum(flight.nbytes for flight in flying)
            # Half at a time, so that one is under way while the host hears of the other.
            pieces = self._take(min(room, -(-self._most_bytes // 2)), wait=not flying)
            if pieces:
                self._send(pieces, flying)
            elif flying:
                flight = flying.popleft()
                self._land(flight)
                self._rest(time.monotonic() - flight.started_s)
            else:
                self._give_up()
                return

    @property
    def _most_bytes(self) -> int:
        return LOADS_IN_FLIGHT_BYTES if self._pacing is None else self._pacing.in_flight_bytes

    def _take(self, room: int, *, wait: bool) -> list[_Piece]:
        """The next pieces, of `room` bytes together; none when the lane has stopped, or without
        `wait` when none may go now."""
        with self._traffic.changed:
            while True:
                if self._stopped:
                    return []
                pieces = self._cut(room) if self._may_go() else []
                if pieces or not wait:
                    return pieces
                self._traffic.changed.wait()

    def _may_go(self) -> bool:
        return self._pacing is None or self._traffic.loads == 0

    def _cut(self, room: int) -> list[_Piece]:
        pieces: list[_Piece] = []
        while self._waiting and room > 0:
            haul = self._waiting[0]
            if haul.given_up:
                self._waiting.popleft()
                self._one_less()
                continue
            start = haul.sent_bytes
            nbytes = min(room, haul.source.nbytes - start)
            haul.sent_bytes = start + nbytes
            last = haul.sent_bytes == haul.source.nbytes
            pieces.append(_Piece(haul, _part(haul.target, start, nbytes),
                                 _part(haul.source, start, nbytes), last))  # fmt: skip
            room -= nbytes
            if last:
                self._waiting.popleft()
        return pieces

    def _send(self, pieces: list[_Piece], flying: "deque[_Flight]") -> None:
        nbytes = sum(piece.source.nbytes for piece in pieces)
        started_s = time.monotonic()
        try:
            pairs = [(piece.target, piece.source) for piece in pieces]
            self._end.device.copy(self._end.stream, pairs)
            flying.append(_Flight(pieces, nbytes, started_s, self._end.stream.record()))
        except Exception as error:  # noqa: BLE001 - costs these copies, not the lane
            with suppress(Exception):
                self._end.stream.synchronize()  # earlier pieces, or some of these, may be under way
            self._report(pieces, error)

    def _land(self, flight: _Flight) -> None:
        try:
            flight.arrived.synchronize()
        except Exception as error:  # noqa: BLE001 - as above
            self._report(flight.pieces, error)
        else:
            self._report(flight.pieces, None)

    def _report(self, pieces: Iterable[_Piece], error: Exception | None) -> None:
        """Tell the loop of the hauls that are whole now, or have failed."""
        if isinstance(error, DeviceFault):
            self._end.tell(error)
        elif error is not None:
            logger.warning("copies between RAM and %s failed: %s", self._end.device.name, error)
        whole: list[Haul] = []
        for piece in pieces:
            piece.haul.failed |= error is not None
            if piece.last:
                whole.append(piece.haul)
        if whole:
            with self._traffic.changed:
                self._one_less(len(whole))
            self._loop.call_soon_threadsafe(_settle, whole)

    def _rest(self, busy_s: float) -> None:
        """Leave the bus to others for as long as the share asks."""
        if self._pacing is None or self._pacing.share >= 1.0:
            return
        until_s = time.monotonic() + busy_s * (1.0 / self._pacing.share - 1.0)
        with self._traffic.changed:
            while not self._stopped and (left_s := until_s - time.monotonic()) > 0:
                self._traffic.changed.wait(left_s)

    def _one_less(self, count: int = 1) -> None:
        if self._pacing is None:
            self._traffic.loads -= count
            self._traffic.changed.notify_all()

    def _give_up(self) -> None:
        """Tell of what is left, once no piece of it is under way any more."""
        with self._traffic.changed:
            abandoned = list(self._waiting)
            self._waiting.clear()
            self._one_less(len(abandoned))
        for haul in abandoned:
            haul.failed = True
        if abandoned:
            self._loop.call_soon_threadsafe(_settle, abandoned)


def _direction(source: Span) -> Direction:
    return Direction.UP if source.region.place is Place.HOST else Direction.DOWN


def _part(span: Span, start: int, nbytes: int) -> Span:
    return span.region.span(span.offset + start, nbytes)


def _settle(hauls: list[Haul]) -> None:
    for haul in hauls:
        if not haul.outcome.done():
            haul.outcome.set_result(Outcome.FAILED if haul.failed else Outcome.HIT)
