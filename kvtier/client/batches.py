"""The chunks of one reservation on their way out: into mapped slots, or through a stream."""

import queue
from collections.abc import Iterable, Iterator
from typing import Protocol

from kvtier.client.buffers import Buffers
from kvtier.client.session import Attached, Session
from kvtier.client.transport import Pending
from kvtier.kernels.device import Span
from kvtier.proto import cache_pb2 as pb
from kvtier.transfer.paths import inline

Statuses = dict[int, int]
"""CommitStatus by index."""

# Chunks of a stream that this process holds: one being filled, one being sent, one in between.
_STREAM_DEPTH = 3
# A tenth of what gRPC reaches locally.
_LEAST_BYTES_PER_S = 50e6


class Batch(Protocol):
    """Chunks under one write lease, by their index in the reservation, filled in ascending order.

    All methods may raise SERVICE_FAILURES.
    """

    @property
    def wanted(self) -> list[int]:
        """The chunks that the service wants."""
        ...

    @property
    def written(self) -> int:
        """How many of them were filled."""
        ...

    def add(self, index: int, offset: int) -> None:
        """Note that a chunk is wanted; `offset` is its place in the arena, if there is one."""
        ...

    def open(self, index: int) -> memoryview:
        """Room to fill with a chunk, writable."""
        ...

    def span(self, index: int) -> Span | None:
        """That room as the client's device reaches it."""
        ...

    def wrote(self, index: int) -> None:
        """The room opened last is filled."""
        ...

    def publish(self, timeout_s: float) -> Statuses:
        """Commit what was filled, and say what became of it."""
        ...

    def close(self) -> None:
        """Let go of everything; what was not published is not. May be called again."""
        ...


class MappedBatch:
    """Path shm: chunks are filled in place."""

    def __init__(self, session: Session, attached: Attached, lease_id: int) -> None:
        self._session = session
        self._attached = attached
        self._lease_id = lease_id
        self._slots: dict[int, memoryview] = {}
        self._spans: dict[int, Span | None] = {}
        self._filled: list[int] = []

    @property
    def wanted(self) -> list[int]:
        return list(self._slots)

    @property
    def written(self) -> int:
        return len(self._filled)

    def add(self, index: int, offset: int) -> None:
        nbytes = self._session.chunk_bytes
        self._slots[index] = self._attached.slot(offset, nbytes)
        self._spans[index] = self._attached.span(offset, nbytes, in_vram=False)

    def span(self, index: int) -> Span | None:
        return self._spans[index]

    def open(self, index: int) -> memoryview:
        return self._slots[index]

    def wrote(self, index: int) -> None:
        self._filled.append(index)

    def publish(self, timeout_s: float) -> Statuses:
        session = self._session
        request = pb.CommitRequest(
            session_id=session.id, lease_id=self._lease_id, indexes=self._filled
        )
        response = session.transport.call("Commit", request, timeout_s)
        return _statuses(response.chunks, self._filled)

    def close(self) -> None:
        self._slots.clear()


class StreamedBatch:
    """Path inline: each chunk is sent while the caller fills the next one.

    gRPC's own thread takes the messages from `_messages`; the two meet in queues. No wait for room
    is longer than a second and the time that the bytes need at a tenth of the usual speed.
    """

    def __init__(self, session: Session, buffers: Buffers, lease_id: int) -> None:
        self._session = session
        self._buffers = buffers
        self._lease_id = lease_id
        self._patience_s = 1.0 + _STREAM_DEPTH * session.chunk_bytes / _LEAST_BYTES_PER_S
        self._wanted: list[int] = []
        self._filled: list[int] = []
        self._owned: list[bytearray] = []
        self._filling = bytearray()
        self._to_send: queue.SimpleQueue[tuple[int, bytearray] | None] = queue.SimpleQueue()
        self._sent: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        self._put: Pending | None = None

    @property
    def wanted(self) -> list[int]:
        return self._wanted

    @property
    def written(self) -> int:
        return len(self._filled)

    def add(self, index: int, offset: int) -> None:
        self._wanted.append(index)

    def open(self, index: int) -> memoryview:
        self._filling = self._next_buffer()
        return memoryview(self._filling)

    def span(self, index: int) -> Span | None:
        return None

    def wrote(self, index: int) -> None:
        if self._put is None:
            self._put = self._session.transport.upload("Put", self._messages())
            self._put.add_done_callback(lambda _: self._sent.put(None))
        self._to_send.put((index, self._filling))
        self._filled.append(index)

    def publish(self, timeout_s: float) -> Statuses:
        assert self._put is not None, "publish of a batch of which nothing was written"
        self._to_send.put(None)
        response: pb.PutResponse = self._put.result(timeout_s + self._patience_s)
        return _statuses(response.chunks, self._filled)

    def close(self) -> None:
        self._to_send.put(None)
        if self._put is not None:
            self._put.cancel()
        self._filling = bytearray()
        owned, self._owned = self._owned, []  # given back once, however often this is called
        self._buffers.give_back(owned)

    def _next_buffer(self) -> bytearray:
        if len(self._owned) < _STREAM_DEPTH:
            buffer = self._buffers.take(self._session.chunk_bytes)
            self._owned.append(buffer)
            return buffer
        try:
            sent = self._sent.get(timeout=self._patience_s)
        except queue.Empty:
            raise TimeoutError("the service takes no more bytes") from None
        if sent is None:  # the call is over, before its time
            assert self._put is not None
            self._put.result(0)
            raise ValueError("the service ended a Put that was not complete")
        return sent

    def _messages(self) -> Iterator[inline.Piece | pb.PutRequest]:
        header = pb.PutHeader(session_id=self._session.id, lease_id=self._lease_id)
        yield pb.PutRequest(header=header)
        while (filled := self._to_send.get()) is not None:
            index, buffer = filled
            chunk = memoryview(buffer)
            yield from inline.cut(index, chunk, inline.checksum(chunk))
            self._sent.put(buffer)
            del filled, buffer, chunk  # or it would not be idle


def _statuses(answered: Iterable[pb.CommittedChunk], filled: list[int]) -> Statuses:
    """Raises ValueError when the answer is about other chunks."""
    statuses: Statuses = {chunk.index: chunk.status for chunk in answered}
    if len(statuses) < sum(1 for _ in answered) or not statuses.keys() <= {*filled}:
        raise ValueError("the service answered for chunks that were not sent")
    return statuses
