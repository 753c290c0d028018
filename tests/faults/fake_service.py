"""A service that is honest until it is told to lie: what a client must survive.

It speaks kvtier.v1 over a unix socket from threads of this process. `lies` maps a method's name to
what is done to its honest answers before they go out: bytes go out as they are.
"""

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from kvtier.proto import cache_pb2 as pb
from kvtier.spaces import Space
from kvtier.transfer.paths import inline

METHODS: dict[str, Any] = {
    "OpenSession": pb.OpenSessionRequest,
    "Lookup": pb.LookupRequest,
    "Load": pb.LoadRequest,
    "Get": pb.GetRequest,
    "Release": pb.ReleaseRequest,
    "Reserve": pb.ReserveRequest,
    "Commit": pb.CommitRequest,
    "Put": pb.PutRequest,
    "Abort": pb.AbortRequest,
    "Prefetch": pb.PrefetchRequest,
    "Evict": pb.EvictRequest,
    "Stats": pb.StatsRequest,
    "Explain": pb.ExplainRequest,
}
STREAMS = ("OpenSession", "Load", "Get")
ARENA_BYTES = 1 << 20
KEY_BYTES = 32

Answer = Message | bytes
Call = grpc.ServicerContext
# A lie sees the honest answer (of a stream: the iterator of its messages) and the call.
Lie = Callable[[Any, Call], Any]


class FakeService:
    """Holds chunks in one arena, forgets nothing and never evicts. A context manager."""

    def __init__(self, directory: Path, space: Space) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.target = f"unix://{directory / 'fake'}"
        self.space = space
        self.lies: dict[str, Lie] = {}
        self.calls: list[str] = []
        self.arena_path = directory / "arena"
        self.tether_path = directory / "tether"
        self.arena_path.write_bytes(bytes(ARENA_BYTES))
        self.tether_path.touch()
        with self.arena_path.open("r+b") as file:
            self.arena = mmap.mmap(file.fileno(), ARENA_BYTES)
        self.held: dict[bytes, int] = {}
        self._reserved: dict[int, list[bytes]] = {}
        self._offsets: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool)
        handlers = {name: self._handler(name) for name in METHODS}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("kvtier.v1.Cache", handlers),)
        )
        assert self._server.add_insecure_port(f"unix:{directory / 'fake'}")

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lies.clear()
        self._server.stop(0).wait()
        self._pool.shutdown()

    def slot(self, key: bytes) -> memoryview:
        """Where a chunk lies."""
        start = self._offsets[key]
        return memoryview(self.arena)[start : start + self.space.layout.nbytes]

    def hold(self, key: bytes, content: bytes) -> None:
        """Hold a chunk as if a client had stored it."""
        self._place(key)
        self.slot(key)[:] = content
        self.held[key] = self._offsets[key]

    # ── the wire ──────────────────────────────────────────────────────────────────────────────────

    def _handler(self, name: str) -> "grpc.RpcMethodHandler[Any, Any]":
        honest = getattr(self, f"_{name.lower()}")

        def unary(request: Any, call: Call) -> Answer:
            self.calls.append(name)
            lie = self.lies.get(name)
            answer: Answer = honest(request)
            return lie(answer, call) if lie else answer

        def stream(request: Any, call: Call) -> Iterator[Answer]:
            self.calls.append(name)
            lie = self.lies.get(name)
            answers = honest(request, call)
            yield from lie(answers, call) if lie else answers

        decode = METHODS[name].FromString
        if name in STREAMS:
            return grpc.unary_stream_rpc_method_handler(stream, decode, _encode)
        if name == "Put":
            return grpc.stream_unary_rpc_method_handler(unary, decode, _encode)
        return grpc.unary_unary_rpc_method_handler(unary, decode, _encode)

    def _opensession(self, request: pb.OpenSessionRequest, call: Call) -> Iterator[Answer]:
        ended = threading.Event()
        if not call.add_callback(ended.set):
            return
        yield pb.SessionEvent(opened=self.opened(request.paths[0]))
        ended.wait()

    def opened(self, path: "pb.DataPath.ValueType") -> pb.SessionOpened:
        """The honest first event of a session."""
        arena = pb.ShmArena(
            path=str(self.arena_path), nbytes=ARENA_BYTES, tether_path=str(self.tether_path)
        )
        return pb.SessionOpened(
            session_id=os.urandom(16),
            space_digest=self.space.digest,
            chunk_bytes=self.space.layout.nbytes,
            path=path,
            arena=arena if path == pb.DATA_PATH_SHM else None,
            max_keys=64,
            max_write_lease_bytes=ARENA_BYTES,
        )

    def _lookup(self, request: pb.LookupRequest) -> Answer:
        held = len(self._run(request.keys))
        return pb.LookupResponse(held=held, in_ram=held)

    def _load(self, request: pb.LoadRequest, call: Call) -> Iterator[Answer]:
        run = self._run(request.keys)
        for index, key in enumerate(run):
            yield pb.LoadResponse(chunks=[pb.LoadedChunk(index=index, offset=self.held[key])])
        yield pb.LoadResponse(end=pb.LoadEnd(reason=pb.END_REASON_MISS, chunks=len(run)))

    def _get(self, request: pb.GetRequest, call: Call) -> Iterator[Answer]:
        run = self._run(request.keys)
        for index, key in enumerate(run):
            slot = self.slot(key)
            half = len(slot) // 2
            yield pb.GetResponse(piece=pb.ChunkPiece(index=index, data=bytes(slot[:half])))
            last = pb.ChunkPiece(
                index=index, data=bytes(slot[half:]), checksum=inline.checksum(slot)
            )
            yield pb.GetResponse(piece=last)
        yield pb.GetResponse(end=pb.LoadEnd(reason=pb.END_REASON_MISS, chunks=len(run)))

    def _release(self, request: pb.ReleaseRequest) -> Answer:
        return pb.ReleaseResponse()

    def _reserve(self, request: pb.ReserveRequest) -> Answer:
        keys = _split(request.keys)
        self._reserved[request.lease_id] = keys
        chunks = []
        for key in keys:
            if key in self.held:
                chunks.append(pb.ReservedChunk(status=pb.RESERVE_STATUS_EXISTS))
                continue
            self._place(key)
            offset = self._offsets[key]
            chunks.append(pb.ReservedChunk(status=pb.RESERVE_STATUS_WRITE, offset=offset))
        return pb.ReserveResponse(chunks=chunks)

    def _commit(self, request: pb.CommitRequest) -> Answer:
        keys = self._reserved.pop(request.lease_id, [])
        for index in request.indexes:
            self.held[keys[index]] = self._offsets[keys[index]]
        return pb.CommitResponse(chunks=[_stored(index) for index in request.indexes])

    def _put(self, requests: Iterator[pb.PutRequest]) -> Answer:
        keys = self._reserved.pop(next(requests).header.lease_id, [])
        assemblies: dict[int, inline.Assembly] = {}
        done = []
        for request in requests:
            wire = request.piece
            if wire.index not in assemblies:
                assemblies[wire.index] = inline.Assembly(self.slot(keys[wire.index]))
            piece = inline.Piece(wire.index, wire.data, wire.checksum)
            if assemblies[wire.index].add(piece):
                self.held[keys[wire.index]] = self._offsets[keys[wire.index]]
                done.append(_stored(wire.index))
        return pb.PutResponse(chunks=done)

    def _abort(self, request: pb.AbortRequest) -> Answer:
        return pb.AbortResponse()

    def _prefetch(self, request: pb.PrefetchRequest) -> Answer:
        return pb.PrefetchResponse(in_ram=len(self._run(request.keys)))

    def _evict(self, request: pb.EvictRequest) -> Answer:
        gone = [key for key in _split(request.keys) if self.held.pop(key, None) is not None]
        return pb.EvictResponse(chunks=len(gone))

    def _stats(self, request: pb.StatsRequest) -> Answer:
        return pb.StatsResponse(version="fake")

    def _explain(self, request: pb.ExplainRequest) -> Answer:
        state = pb.KEY_STATE_NEVER_STORED
        return pb.ExplainResponse(keys=[pb.Explanation(state=state) for _ in _split(request.keys)])

    # ── its store ─────────────────────────────────────────────────────────────────────────────────

    def _run(self, packed: bytes) -> list[bytes]:
        run = []
        for key in _split(packed):
            if key not in self.held:
                break
            run.append(key)
        return run

    def _place(self, key: bytes) -> None:
        with self._lock:
            self._offsets.setdefault(key, len(self._offsets) * self.space.layout.nbytes)


def wait_for_end(call: Call) -> None:
    """Return when the client has given the call up, or the service stops."""
    ended = threading.Event()
    if call.add_callback(ended.set):
        ended.wait()


def _encode(answer: Answer) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


def _split(packed: bytes) -> list[bytes]:
    return [packed[start : start + KEY_BYTES] for start in range(0, len(packed), KEY_BYTES)]


def _stored(index: int) -> pb.CommittedChunk:
    return pb.CommittedChunk(index=index, status=pb.COMMIT_STATUS_STORED)
