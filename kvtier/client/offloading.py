"""Writing chunks: one offload, as the engine sees it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from kvtier.chunks import Prefix
from kvtier.client.batches import Batch, MappedBatch, Statuses, StreamedBatch
from kvtier.client.buffers import Workplace
from kvtier.client.connection import Connection
from kvtier.client.hints import Hints, to_hints
from kvtier.client.offering import offered
from kvtier.client.session import Session, pack_keys
from kvtier.client.transport import SERVICE_FAILURES
from kvtier.kernels.copying import Copier
from kvtier.kernels.device import DeviceError, Event, Span
from kvtier.proto import cache_pb2 as pb

# Reserved at once: large enough to amortise two calls, small enough to leave others their room.
BATCH_BYTES = 512 << 20
_LEAST_WAIT_S = 0.05  # for publishing what is written already, however late it is

_REFUSALS = {
    pb.RESERVE_STATUS_BEING_WRITTEN: "another client is writing it",
    pb.RESERVE_STATUS_NO_ROOM: "no room: everything else is leased",
    pb.RESERVE_STATUS_PARENT_MISSING: "the chunk before it is not held",
    pb.RESERVE_STATUS_LEASE_LIMIT: "this session has reserved all it may",
    pb.RESERVE_STATUS_NOT_WORTH: "everything else is likelier to be asked for again",
    pb.RESERVE_STATUS_QUOTA: "its tenant holds all it may",
}
_COMMIT_REFUSALS: dict[int, str] = {
    pb.COMMIT_STATUS_PARENT_MISSING: "the chunk before it was not committed",
    pb.COMMIT_STATUS_NOT_RESERVED: "the reservation was lost",
    pb.COMMIT_STATUS_CORRUPT: "it arrived with a wrong checksum",
}
UNREACHABLE = "the service could not be reached"
TOO_LATE = "the deadline had passed"
NOT_WRITTEN = "the caller did not write it"
NOT_ARRIVED = "the caller's device failed to write it, or one before it"


@dataclass(slots=True)
class Offloaded:
    """What became of each chunk, by its index in the prefix."""

    stored: list[int] = field(default_factory=list)
    existing: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class WriteSlot:
    """Room for one chunk. `data` is writable, has exactly the layout's bytes, and is valid until
    the loop goes on to the next slot. `span` is the same as the client's device reaches it: None
    without one, and on the path inline.

    What the device writes there must have arrived before the loop goes on. Or set `arrival` to an
    event behind it: then the chunk counts as written once that is done, and the loop goes on.
    """

    index: int
    data: memoryview
    copier: Copier = field(repr=False, compare=False)
    span: Span | None = None
    arrival: Event | None = None

    def write(self, source: memoryview) -> None:
        """Copy a chunk from a buffer of the same size, without the GIL."""
        self.copier.copy(self.data, source)


class Offload:
    """Iterates over the chunks that the service wants, to be filled one by one.

    A chunk counts as written when the loop goes on, so leaving the loop early or by an exception
    publishes nothing half filled. Chunks are reserved and committed in batches while the loop runs.
    Before a batch is committed or given up, all arrivals in it are waited for. When one fails, the
    chunks before it are published, and its DeviceError is raised.
    Whatever the service does, the loop only ends early; `outcome` says what became of each chunk.
    The deadline bounds all waiting for the service together; the caller's own time does not count.
    """

    def __init__(
        self,
        connection: Connection,
        workplace: Workplace,
        prefix: Prefix,
        deadline_s: float,
        hints: Hints | None,
    ) -> None:
        self._connection = connection
        self._workplace = workplace
        self._prefix = prefix
        self._hints = hints
        self._left_s = deadline_s  # what may still be spent on waiting for the service
        self._session: Session | None = None
        self._reservation: _Reservation | None = None
        self.outcome = Offloaded()

    def __enter__(self) -> Self:
        session = self._connection.session
        if session is not None and session.enter():
            self._session = session
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        session, self._session = self._session, None
        if session is None or session.inherited:
            self._refuse_rest(UNREACHABLE)
            return
        try:
            if self._reservation is not None:
                self._finish(self._reservation)
        except DeviceError:
            if kind is None:  # else what ended the loop tells more
                raise
        finally:
            self._refuse_rest(NOT_WRITTEN)
            session.leave()

    def __iter__(self) -> Iterator[WriteSlot]:
        session = self._session
        if session is None:
            return
        step = max(1, min(BATCH_BYTES, session.max_write_lease_bytes) // session.chunk_bytes)
        step = min(step, session.max_keys)
        for start in range(0, len(self._prefix), step):
            if self._left_s <= 0:
                self._refuse_rest(TOO_LATE)
                return
            reservation = self._reserve(session, start, self._prefix[start : start + step])
            if reservation is None:
                return
            self._reservation = reservation
            yield from self._fill(reservation)
            self._reservation = None
            if not self._finish(reservation):
                return

    def _fill(self, reservation: "_Reservation") -> Iterator[WriteSlot]:
        batch = reservation.batch
        try:
            for index in batch.wanted:
                view = batch.open(index)
                slot = WriteSlot(
                    index + reservation.start, view[:], self._workplace.copier, batch.span(index)
                )
                yield slot
                with suppress(BufferError):  # an array over it is its caller's problem
                    slot.data.release()
                reservation.coming.append((index, slot.arrival))
                if slot.arrival is None or slot.span is None:
                    reservation.land()
                del slot, view
        except SERVICE_FAILURES as failure:
            reservation.failure = failure

    def _reserve(self, session: Session, start: int, keys: Prefix) -> "_Reservation | None":
        lease_id = session.next_lease_id()
        request = pb.ReserveRequest(
            session_id=session.id,
            lease_id=lease_id,
            keys=pack_keys(keys.keys),
            parent=keys.parent,
            hints=to_hints(keys, self._hints),
            tokens=offered(keys, session.max_token_bytes, whole=True),
        )
        reservation = _Reservation(session, lease_id, start, self._new_batch(session, lease_id))
        try:
            started_s = time.monotonic()
            response = session.transport.call("Reserve", request, self._left_s)
            self._left_s -= time.monotonic() - started_s
            if len(response.chunks) != len(keys):
                raise ValueError(f"the service answered {len(response.chunks)} of {len(keys)} keys")
            for index, chunk in enumerate(response.chunks):
                self._sort(reservation, index, chunk)
        except SERVICE_FAILURES as failure:
            self._fail(reservation, "reserve", failure)
            return None
        self._connection.succeeded()
        return reservation

    def _new_batch(self, session: Session, lease_id: int) -> Batch:
        if session.attached is None:
            return StreamedBatch(session, self._workplace.buffers, lease_id)
        return MappedBatch(session, session.attached, lease_id)

    def _sort(self, reservation: "_Reservation", index: int, chunk: pb.ReservedChunk) -> None:
        if chunk.status == pb.RESERVE_STATUS_WRITE:
            reservation.batch.add(index, chunk.offset)
        elif chunk.status == pb.RESERVE_STATUS_EXISTS:
            self.outcome.existing.append(index + reservation.start)
        else:
            reason = _REFUSALS.get(chunk.status, "the service gave no reason")
            self.outcome.refused[index + reservation.start] = reason

    def _finish(self, reservation: "_Reservation") -> bool:
        """Publish what was written of a batch; False when the service could not be reached. Raises
        DeviceError when some of it did not arrive."""
        batch = reservation.batch
        try:
            reservation.land()
            if reservation.failure is not None:
                raise reservation.failure
            if batch.written:
                started_s = time.monotonic()
                statuses = batch.publish(max(_LEAST_WAIT_S, self._left_s))
                self._left_s -= time.monotonic() - started_s
                self._note(reservation, statuses)
            elif batch.wanted:
                self._abort(reservation.session, reservation.lease_id)
        except SERVICE_FAILURES as failure:
            self._fail(reservation, "commit", failure)
            return False
        finally:
            batch.close()
        self._connection.succeeded()
        if reservation.fault is not None:
            self._refuse_rest(NOT_ARRIVED)
            raise reservation.fault
        return True

    def _note(self, reservation: "_Reservation", statuses: Statuses) -> None:
        for index, status in statuses.items():
            if status == pb.COMMIT_STATUS_STORED:
                self.outcome.stored.append(index + reservation.start)
            else:
                reason = _COMMIT_REFUSALS.get(status, "the service gave no reason")
                self.outcome.refused[index + reservation.start] = reason

    def _fail(self, reservation: "_Reservation", what: str, failure: BaseException) -> None:
        reservation.batch.close()
        self._abort(reservation.session, reservation.lease_id)
        self._connection.failed(reservation.session, what, failure)
        self._refuse_rest(UNREACHABLE)

    def _abort(self, session: Session, lease_id: int) -> None:
        request = pb.AbortRequest(session_id=session.id, lease_id=lease_id)

        def give_up() -> None:
            self._connection.abandon(session, "a lease could not be given back")

        try:
            session.transport.post("Abort", request, give_up)
        except SERVICE_FAILURES:
            give_up()

    def _refuse_rest(self, reason: str) -> None:
        known = {*self.outcome.stored, *self.outcome.existing, *self.outcome.refused}
        for index in range(len(self._prefix)):
            if index not in known:
                self.outcome.refused[index] = reason


@dataclass(slots=True)
class _Reservation:
    """One Reserve and what comes of it. Indexes count from `start` in the prefix. `coming` are
    chunks that the caller's device may still be writing, in order."""

    session: Session
    lease_id: int
    start: int
    batch: Batch
    failure: BaseException | None = None
    fault: DeviceError | None = None
    coming: deque[tuple[int, Event | None]] = field(default_factory=deque)

    def land(self) -> None:
        """Wait for what is coming. It counts as written up to the first that fails, and is waited
        for beyond: nobody may write into a slot that is given up."""
        while self.coming:
            index, arrival = self.coming.popleft()
            try:
                if arrival is not None:
                    arrival.synchronize()
            except DeviceError as error:
                self.fault = self.fault or error
            if self.fault is None:
                self.batch.wrote(index)
