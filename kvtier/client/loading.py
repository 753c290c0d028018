"""Reading chunks: one load, as the engine sees it."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeAlias

from kvtier.chunks import Prefix
from kvtier.client.buffers import Workplace, is_idle
from kvtier.client.connection import Connection
from kvtier.client.hints import Hints, to_hints
from kvtier.client.offering import offered
from kvtier.client.session import Session, pack_keys
from kvtier.client.transport import SERVICE_FAILURES, Stream
from kvtier.kernels.copying import Copier
from kvtier.kernels.device import Span
from kvtier.proto import cache_pb2 as pb
from kvtier.transfer.paths import inline

GetMessage: TypeAlias = inline.Piece | pb.GetResponse

# The service ends a load by itself at its deadline; the call gets a little longer to say so.
_GRACE_S = 0.25


@dataclass(frozen=True, slots=True)
class LoadedChunk:
    """One chunk of a load. `data` is read-only, has exactly the layout's bytes, and is valid until
    the load's `with` block ends; it is empty where the chunk is in VRAM. Its first `tokens` tokens
    are the prompt's: all, but in the last chunk of a load that takes parts. `span` is the chunk as
    the client's device reaches it: None without one, and on the path inline."""

    index: int
    data: memoryview
    tokens: int
    copier: Copier = field(repr=False, compare=False)
    span: Span | None = None

    def read_into(self, target: memoryview) -> None:
        """Copy the chunk into a writable buffer of the same size, without the GIL."""
        self.copier.copy(target, self.data)


@dataclass(frozen=True, slots=True)
class Manner:
    """How a load is to be carried out: see `Client.load`."""

    in_vram: bool
    partial: bool
    hints: Hints | None


class Loaded:
    """Chunks of a prefix in order, as they land. Ends early where the service has no more, fails or
    is too late: a shorter prefix, never an exception.

    Use it as a context manager, iterate it once, and do not keep `data` beyond the block.
    """

    def __init__(
        self,
        connection: Connection,
        workplace: Workplace,
        prefix: Prefix,
        deadline_s: float,
        manner: Manner,
    ) -> None:
        self._manner = manner
        self._offered: pb.Tokens | None = None
        self._part_came = False
        self._connection = connection
        self._buffers = workplace.buffers
        self._copier = workplace.copier
        self._prefix = prefix
        self._until = time.monotonic() + deadline_s
        self._session: Session | None = None
        self._lease_id = 0
        self._stream: Stream[pb.LoadResponse] | Stream[GetMessage] | None = None
        self._released = False
        self._views: list[memoryview] = []
        self._borrowed: list[bytearray] = []

    def __enter__(self) -> Self:
        session = self._connection.session
        if session is None:
            return self
        self._prefix = self._prefix[: session.max_keys]
        if self._manner.partial:
            self._offered = offered(self._prefix, session.max_token_bytes)
        if (len(self._prefix) or self._offered is not None) and session.enter():
            self._session = session
            self._lease_id = session.next_lease_id()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        session, self._session = self._session, None
        if session is None or session.inherited:
            return
        if self._stream is not None:
            self._stream.cancel()
        self._let_go_of_views()
        if session.attached is not None and self._stream is not None and not self._released:
            request = pb.ReleaseRequest(session_id=session.id, lease_id=self._lease_id)
            self._post_release(session, request)
        session.leave()

    def release(self) -> bool:
        """End the lease before the block ends, and wait for the service to say that it held it
        until now. False when it does not: it may have died, and its VRAM be another's. Either way
        no chunk may be read any more."""
        session = self._session
        if session is None or session.inherited or session.attached is None or self._stream is None:
            return False
        self._stream.cancel()
        request = pb.ReleaseRequest(session_id=session.id, lease_id=self._lease_id)
        try:
            session.transport.call("Release", request, self._remaining_ms() / 1000 + _GRACE_S)
        except SERVICE_FAILURES as failure:
            self._connection.failed(session, "release", failure)
            return False
        self._connection.succeeded()
        self._released = True
        return True

    def _let_go_of_views(self) -> None:
        self._buffers.give_back(self._borrowed)
        with suppress(BufferError):  # an array over a slot that outlives the block is its problem
            for view in self._views:
                view.release()

    def _post_release(self, session: Session, request: pb.ReleaseRequest) -> None:
        # A lease that could not be released ends with its session, so the session has to go.
        def give_up() -> None:
            self._connection.abandon(session, "a lease could not be released")

        try:
            session.transport.post("Release", request, give_up)
        except SERVICE_FAILURES:
            give_up()

    def __iter__(self) -> Iterator[LoadedChunk]:
        session = self._session
        if session is None:
            return
        chunks = self._mapped(session) if session.attached is not None else self._streamed(session)
        expected = 0
        try:
            for chunk in chunks:
                if chunk.index != expected:
                    raise ValueError(f"the service sent chunk {chunk.index}, not {expected}")
                expected += 1
                yield chunk
                del chunk  # so that its buffer can be used again
        except SERVICE_FAILURES as failure:
            self._connection.failed(session, "load", failure)
        else:
            self._connection.succeeded()

    def _tokens_of(self, index: int, told: int) -> int:
        """How many leading tokens of a chunk are the prompt's; the service tells 0 where it is the
        one of that key. Raises ValueError for what cannot be."""
        if self._part_came:
            raise ValueError("the service sent another chunk after a part of one")
        tokens = self._prefix.chunk_tokens
        if not told:
            if index >= len(self._prefix):
                raise ValueError(f"the service sent chunk {index} of {len(self._prefix)}")
            return tokens
        self._part_came = True
        known = len(self._offered.ids) // 4 if self._offered is not None else 0
        if told > min(tokens, known - index * tokens):
            raise ValueError(
                f"the service says that {told} tokens of chunk {index} are the prompt's"
            )
        return told

    def _remaining_ms(self) -> int:
        return max(1, int(1000 * (self._until - time.monotonic())))

    def _mapped(self, session: Session) -> Iterator[LoadedChunk]:
        attached = session.attached
        assert attached is not None
        request = pb.LoadRequest(
            session_id=session.id,
            lease_id=self._lease_id,
            keys=pack_keys(self._prefix.keys),
            deadline_ms=self._remaining_ms(),
            in_vram=self._manner.in_vram and session.reaches_vram,
            hints=to_hints(self._prefix, self._manner.hints),
            tokens=self._offered,
        )
        timeout_s = request.deadline_ms / 1000 + _GRACE_S
        stream: Stream[pb.LoadResponse] = session.transport.stream("Load", request, timeout_s)
        self._stream = stream
        for response in stream:
            for chunk in response.chunks:
                if chunk.in_vram and not request.in_vram:
                    raise ValueError(
                        "the service sent a chunk in VRAM that was not asked for there"
                    )
                tokens = self._tokens_of(chunk.index, chunk.tokens)
                nbytes = session.chunk_bytes
                span = attached.span(chunk.offset, nbytes, in_vram=chunk.in_vram)
                if chunk.in_vram:
                    yield LoadedChunk(chunk.index, memoryview(b""), tokens, self._copier, span)
                    continue
                data = attached.slot(chunk.offset, nbytes).toreadonly()
                self._views.append(data)
                yield LoadedChunk(chunk.index, data, tokens, self._copier, span)

    def _streamed(self, session: Session) -> Iterator[LoadedChunk]:
        request = pb.GetRequest(
            session_id=session.id,
            keys=pack_keys(self._prefix.keys),
            deadline_ms=self._remaining_ms(),
            hints=to_hints(self._prefix, self._manner.hints),
            tokens=self._offered,
        )
        timeout_s = request.deadline_ms / 1000 + _GRACE_S
        stream: Stream[GetMessage] = session.transport.stream("Get", request, timeout_s)
        self._stream = stream
        assembly: inline.Assembly | None = None
        buffer = bytearray()
        told = 0
        for message in stream:
            if isinstance(message, inline.Piece):
                piece = message
            elif message.HasField("piece"):
                piece = inline.piece_of(message.piece)
            elif message.tokens:
                told = message.tokens
                continue
            else:
                return
            if assembly is None:
                buffer = self._idle_buffer(session.chunk_bytes)
                assembly = inline.Assembly(memoryview(buffer))
            verdict = assembly.add(piece)
            if verdict is None:
                continue
            if not verdict:
                raise ValueError(f"chunk {piece.index} arrived with a wrong checksum")
            assembly = None
            data = memoryview(buffer).toreadonly()
            yield LoadedChunk(piece.index, data, self._tokens_of(piece.index, told), self._copier)
            del data

    def _idle_buffer(self, nbytes: int) -> bytearray:
        """One of this load's buffers that its reader has let go of, or one more."""
        for buffer in self._borrowed:
            if is_idle(buffer):
                return buffer
        buffer = self._buffers.take(nbytes)
        self._borrowed.append(buffer)
        return buffer
