"""Writing chunks: one offload, as the engine sees it."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from kvtier.chunks import Prefix
from kvtier.client.buffers import Buffers, Workplace
from kvtier.client.connection import Connection
from kvtier.client.session import Session, pack_keys
from kvtier.client.transport import SERVICE_FAILURES
from kvtier.kernels.copying import Copier
from kvtier.proto import cache_pb2 as pb
from kvtier.transfer.paths import inline

# Reserved at once: large enough to amortise two calls, small enough to leave others their room.
BATCH_BYTES = 512 << 20
# Held in this process's own memory until it is sent: enough to amortise the calls.
INLINE_BATCH_BYTES = 64 << 20

_REFUSALS = {
    pb.RESERVE_STATUS_BEING_WRITTEN: "another client is writing it",
    pb.RESERVE_STATUS_NO_ROOM: "no room: everything else is leased",
    pb.RESERVE_STATUS_PARENT_MISSING: "the chunk before it is not held",
    pb.RESERVE_STATUS_LEASE_LIMIT: "this session has reserved all it may",
}
_COMMIT_REFUSALS: dict[int, str] = {
    pb.COMMIT_STATUS_PARENT_MISSING: "the chunk before it was not committed",
    pb.COMMIT_STATUS_NOT_RESERVED: "the reservation was lost",
    pb.COMMIT_STATUS_CORRUPT: "it arrived with a wrong checksum",
}
UNREACHABLE = "the service could not be reached"
NOT_WRITTEN = "the caller did not write it"


@dataclass(slots=True)
class Offloaded:
    """What became of each chunk, by its index in the prefix."""

    stored: list[int] = field(default_factory=list)
    existing: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WriteSlot:
    """Room for one chunk. `data` is writable, has exactly the layout's bytes, and is valid until
    the loop goes on to the next slot."""

    index: int
    data: memoryview
    copier: Copier = field(repr=False, compare=False)

    def write(self, source: memoryview) -> None:
        """Copy a chunk from a buffer of the same size, without the GIL."""
        self.copier.copy(self.data, source)


class Offload:
    """Iterates over the chunks that the service wants, to be filled one by one.

    A chunk counts as written when the loop goes on, so leaving the loop early or by an exception
    publishes nothing half filled. Chunks are reserved and committed in batches while the loop runs.
    Whatever the service does, the loop only ends early; `outcome` says what became of each chunk.
    """

    def __init__(
        self, connection: Connection, workplace: Workplace, prefix: Prefix, deadline_s: float
    ) -> None:
        self._connection = connection
        self._workplace = workplace
        self._prefix = prefix
        self._deadline_s = deadline_s
        self._session: Session | None = None
        self._batch: _Batch | None = None
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
        if session is None:
            self._refuse_rest(UNREACHABLE)
            return
        try:
            if self._batch is not None:
                self._finish(self._batch)
        finally:
            self._refuse_rest(NOT_WRITTEN)
            session.leave()

    def __iter__(self) -> Iterator[WriteSlot]:
        session = self._session
        if session is None:
            return
        most = BATCH_BYTES if session.attached is not None else INLINE_BATCH_BYTES
        step = max(1, min(most, session.max_write_lease_bytes) // session.chunk_bytes)
        step = min(step, session.max_keys)
        for start in range(0, len(self._prefix), step):
            batch = self._reserve(session, start, self._prefix[start : start + step])
            if batch is None:
                return
            self._batch = batch
            for index, view in batch.views.items():
                slot = WriteSlot(index, view[:], self._workplace.copier)
                yield slot
                with suppress(BufferError):  # an array over it is its caller's problem
                    slot.data.release()
                batch.written.append(index)
            self._batch = None
            if not self._finish(batch):
                return

    def _reserve(self, session: Session, start: int, keys: Prefix) -> "_Batch | None":
        lease_id = session.next_lease_id()
        request = pb.ReserveRequest(
            session_id=session.id,
            lease_id=lease_id,
            keys=pack_keys(keys.keys),
            parent=keys.parent,
        )
        try:
            response = session.transport.call("Reserve", request, self._deadline_s)
            if len(response.chunks) != len(keys):
                raise ValueError(f"the service answered {len(response.chunks)} of {len(keys)} keys")
            batch = _Batch(session, self._workplace.buffers, lease_id, start)
            for index, chunk in enumerate(response.chunks, start):
                self._sort(batch, index, chunk)
        except SERVICE_FAILURES as failure:
            self._abort(session, lease_id)
            self._connection.failed(session, "reserve", failure)
            self._refuse_rest(UNREACHABLE)
            return None
        self._connection.succeeded()
        return batch

    def _sort(self, batch: "_Batch", index: int, chunk: pb.ReservedChunk) -> None:
        if chunk.status == pb.RESERVE_STATUS_WRITE:
            batch.add(index, chunk.offset)
        elif chunk.status == pb.RESERVE_STATUS_EXISTS:
            self.outcome.existing.append(index)
        else:
            reason = _REFUSALS.get(chunk.status, "the service gave no reason")
            self.outcome.refused[index] = reason

    def _finish(self, batch: "_Batch") -> bool:
        """Publish what was written of a batch; False when the service could not be reached."""
        session = batch.session
        if not batch.written:
            if batch.views:
                self._abort(session, batch.lease_id)
            batch.release()
            return True
        try:
            for index, status in batch.publish(self._deadline_s):
                if status == pb.COMMIT_STATUS_STORED:
                    self.outcome.stored.append(index)
                else:
                    reason = _COMMIT_REFUSALS.get(status, "the service gave no reason")
                    self.outcome.refused[index] = reason
        except SERVICE_FAILURES as failure:
            self._abort(session, batch.lease_id)
            self._connection.failed(session, "commit", failure)
            self._refuse_rest(UNREACHABLE)
            return False
        finally:
            batch.release()
        self._connection.succeeded()
        return True

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


class _Batch:
    """The chunks of one reservation that this client writes, by their index in the prefix."""

    def __init__(self, session: Session, buffers: Buffers, lease_id: int, start: int) -> None:
        self.session = session
        self.lease_id = lease_id
        self.start = start
        self.views: dict[int, memoryview] = {}
        self.written: list[int] = []
        self.buffers = buffers
        self.borrowed: list[bytearray] = []

    def add(self, index: int, offset: int) -> None:
        """Take a slot into the batch. Raises ValueError when the service named no valid one."""
        nbytes = self.session.chunk_bytes
        if self.session.attached is not None:
            self.views[index] = self.session.attached.slot(offset, nbytes)
        else:
            buffer = self.buffers.take(nbytes)
            self.borrowed.append(buffer)
            self.views[index] = memoryview(buffer)

    def publish(self, deadline_s: float) -> Sequence[tuple[int, int]]:
        """Commit what was written; returns (index in the prefix, CommitStatus). Raises ValueError
        when the answer is about other chunks."""
        session = self.session
        transport = session.transport
        if session.attached is None:
            timeout_s = deadline_s + time_to_send(len(self.written) * session.chunk_bytes)
            response = transport.upload("Put", self._messages(), timeout_s)
        else:
            request = pb.CommitRequest(
                session_id=session.id,
                lease_id=self.lease_id,
                indexes=[index - self.start for index in self.written],
            )
            response = transport.call("Commit", request, deadline_s)
        answered = {chunk.index + self.start: chunk.status for chunk in response.chunks}
        if len(answered) < len(response.chunks) or not answered.keys() <= {*self.written}:
            raise ValueError("the service answered for chunks that were not sent")
        return list(answered.items())

    def _messages(self) -> Iterator[inline.Piece | pb.PutRequest]:
        header = pb.PutHeader(session_id=self.session.id, lease_id=self.lease_id)
        yield pb.PutRequest(header=header)
        for index in self.written:
            view = self.views[index]
            yield from inline.cut(index - self.start, view, inline.checksum(view))

    def release(self) -> None:
        """Give the buffers of an inline batch back."""
        self.views.clear()
        self.buffers.give_back(self.borrowed)


def time_to_send(nbytes: int) -> float:
    """Seconds to allow for sending so many bytes inline, at a tenth of what gRPC reaches
    locally."""
    return nbytes / 50e6
