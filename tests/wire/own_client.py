"""A client of kvtier.v1 from `proto/cache.proto` alone: nothing of ours but the generated stubs.

What it does is what the comments in that file say. It checks nothing and hides nothing, so that
tests can also lie with it.
"""

import fcntl
import hashlib
import itertools
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import grpc
import xxhash

from kvtier.proto import cache_pb2 as pb
from kvtier.proto.cache_pb2_grpc import CacheStub

KEY_BYTES = 32
TIMEOUT_S = 60.0
PIECE_BYTES = 1 << 20
TOKENS = 16


def space_of(model: str = "own", **fields: Any) -> pb.Space:
    """A space with chunks of 4 KiB; `fields` of the space or, with `layout_` before it, of its
    layout."""
    layout: dict[str, Any] = {
        "dtype": "float16", "layers": 2, "planes": 2, "heads": 2, "head_dim": 16,
        "tokens": TOKENS, "axes": "layer,plane,head,token,dim", "rank": 0, "ranks": 1,
    }  # fmt: skip
    space: dict[str, Any] = {"model": model, "format_version": 1}
    for name, value in fields.items():
        inner = name.removeprefix("layout_")
        (layout if inner != name else space)[inner] = value
    return pb.Space(layout=pb.Layout(**layout), **space)


def chain(root: bytes, tokens: Sequence[int], extra: bytes = b"") -> list[bytes]:
    """Keys of the full chunks of a prompt, as the proto's header says."""
    keys = []
    parent = root
    for start in range(0, len(tokens) - TOKENS + 1, TOKENS):
        packed = struct.pack(f"<{TOKENS}I", *tokens[start : start + TOKENS])
        parts = (
            b"kvtier.chunk.v1", parent, struct.pack("<I", TOKENS), packed,
            struct.pack("<I", len(extra)), extra,
        )  # fmt: skip
        parent = hashlib.sha256(b"".join(parts)).digest()
        keys.append(parent)
    return keys


def checksum(chunk: bytes) -> int:
    return xxhash.xxh3_64_intdigest(chunk) or 1


def content_of(key: bytes, nbytes: int) -> bytes:
    """The bytes that tests store under a key."""
    return hashlib.shake_128(key).digest(nbytes)


class OwnClient:
    """One session over a channel of its own. A context manager."""

    def __init__(
        self,
        target: str,
        space: pb.Space | None = None,
        path: "pb.DataPath.ValueType" = pb.DATA_PATH_SHM,
        name: str = "own",
    ) -> None:
        address = "unix:" + target.removeprefix("unix://") if "unix:" in target else target
        # A pool of its own: else two channels to one address share a connection and its end.
        self.target = target
        self.channel = grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub = CacheStub(self.channel)
        request = pb.OpenSessionRequest(client=name, space=space or space_of(), paths=[path])
        self.events = self.stub.OpenSession(request, wait_for_ready=True)
        self.opened = next(self.events).opened
        self.id = self.opened.session_id
        self.nbytes = self.opened.chunk_bytes
        self.root = self.opened.space_digest
        self.arena: mmap.mmap | None = None
        self.tether: int | None = None
        self._leases = itertools.count(1_000_000)
        if self.opened.path == pb.DATA_PATH_SHM:
            self._attach(self.opened.arena)

    def _attach(self, arena: pb.ShmArena) -> None:
        self.tether = os.open(arena.tether_path, os.O_RDWR)
        fcntl.lockf(self.tether, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file = os.open(arena.path, os.O_RDWR)
        self.arena = mmap.mmap(file, arena.nbytes)
        os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def disconnect(self) -> None:
        """Cut the connection, but keep the arena and the tether."""
        self.events.cancel()
        self.channel.close()

    def close(self) -> None:
        """End the session as the protocol wants it."""
        self.events.cancel()
        if self.arena is not None:
            self.arena.close()
        self.let_tether_go()
        self.channel.close()

    def let_tether_go(self) -> None:
        if self.tether is not None:
            os.close(self.tether)
            self.tether = None

    # ── keys and bytes ────────────────────────────────────────────────────────────────────────────

    def keys(self, seed: int, chunks: int) -> list[bytes]:
        """Keys of a prompt of that many chunks; two seeds share none."""
        return chain(self.root, range(seed * 1_000_000, seed * 1_000_000 + chunks * TOKENS))

    def content(self, key: bytes) -> bytes:
        return content_of(key, self.nbytes)

    def slot(self, offset: int) -> bytes:
        assert self.arena is not None
        return self.arena[offset : offset + self.nbytes]

    def fill(self, offset: int, chunk: bytes) -> None:
        assert self.arena is not None
        self.arena[offset : offset + len(chunk)] = chunk

    def next_lease(self) -> int:
        return next(self._leases)

    # ── calls ─────────────────────────────────────────────────────────────────────────────────────

    def reserve(
        self, lease: int, keys: Sequence[bytes], parent: bytes | None = None
    ) -> list[pb.ReservedChunk]:
        request = pb.ReserveRequest(
            session_id=self.id, lease_id=lease, keys=b"".join(keys), parent=parent or self.root
        )
        return list(self.stub.Reserve(request, timeout=TIMEOUT_S).chunks)

    def commit(self, lease: int, indexes: Iterable[int]) -> list[tuple[int, int]]:
        request = pb.CommitRequest(session_id=self.id, lease_id=lease, indexes=indexes)
        answer = self.stub.Commit(request, timeout=TIMEOUT_S)
        return [(chunk.index, chunk.status) for chunk in answer.chunks]

    def abort(self, lease: int) -> None:
        request = pb.AbortRequest(session_id=self.id, lease_id=lease)
        self.stub.Abort(request, timeout=TIMEOUT_S)

    def release(self, lease: int) -> None:
        request = pb.ReleaseRequest(session_id=self.id, lease_id=lease)
        self.stub.Release(request, timeout=TIMEOUT_S)

    def lookup(self, keys: Sequence[bytes]) -> pb.LookupResponse:
        request = pb.LookupRequest(session_id=self.id, keys=b"".join(keys))
        return self.stub.Lookup(request, timeout=TIMEOUT_S)

    def load(
        self, lease: int, keys: Sequence[bytes], deadline_ms: int = 0
    ) -> tuple[dict[int, int], pb.LoadEnd]:
        """Offsets by index, under a lease that stays; and how the stream ended."""
        request = pb.LoadRequest(
            session_id=self.id, lease_id=lease, keys=b"".join(keys), deadline_ms=deadline_ms
        )
        offsets: dict[int, int] = {}
        end = pb.LoadEnd()
        for response in self.stub.Load(request, timeout=TIMEOUT_S):
            for chunk in response.chunks:
                assert chunk.index == len(offsets), "out of order"
                offsets[chunk.index] = chunk.offset
            end = response.end
        return offsets, end

    def get(self, keys: Sequence[bytes], deadline_ms: int = 0) -> tuple[list[bytes], pb.LoadEnd]:
        """Chunks whose checksum was right; and how the stream ended."""
        request = pb.GetRequest(session_id=self.id, keys=b"".join(keys), deadline_ms=deadline_ms)
        chunks: list[bytes] = []
        parts: list[bytes] = []
        for response in self.stub.Get(request, timeout=TIMEOUT_S):
            if not response.HasField("piece"):
                return chunks, response.end
            piece = response.piece
            assert piece.index == len(chunks), "out of order"
            assert 0 < len(piece.data) <= PIECE_BYTES
            parts.append(piece.data)
            if piece.checksum:
                chunks.append(b"".join(parts))
                parts = []
                assert len(chunks[-1]) == self.nbytes
                assert checksum(chunks[-1]) == piece.checksum
        raise AssertionError("a Get without an end")

    def put(self, messages: Iterable[pb.PutRequest]) -> list[tuple[int, int]]:
        answer = self.stub.Put(iter(messages), timeout=TIMEOUT_S)
        return [(chunk.index, chunk.status) for chunk in answer.chunks]

    def pieces(
        self, lease: int, chunks: dict[int, bytes], size: int = 1000
    ) -> Iterator[pb.PutRequest]:
        """The messages of a right Put, in pieces of `size` bytes."""
        yield self.header(lease)
        for index, chunk in chunks.items():
            for start in range(0, len(chunk), size):
                last = start + size >= len(chunk)
                yield piece_of(index, chunk[start : start + size], checksum(chunk) if last else 0)

    def header(self, lease: int) -> pb.PutRequest:
        return pb.PutRequest(header=pb.PutHeader(session_id=self.id, lease_id=lease))

    # ── whole lives ───────────────────────────────────────────────────────────────────────────────

    def store(self, keys: Sequence[bytes], parent: bytes | None = None) -> int:
        """Store the right bytes of what is wanted; returns how many chunks were stored."""
        lease = self.next_lease()
        wanted = {
            index: answer.offset
            for index, answer in enumerate(self.reserve(lease, keys, parent))
            if answer.status == pb.RESERVE_STATUS_WRITE
        }
        if self.arena is None:
            chunks = {index: self.content(keys[index]) for index in wanted}
            done = self.put(self.pieces(lease, chunks)) if wanted else []
        else:
            for index, offset in wanted.items():
                self.fill(offset, self.content(keys[index]))
            done = self.commit(lease, wanted) if wanted else []
        return sum(status == pb.COMMIT_STATUS_STORED for _, status in done)

    def verify(self, keys: Sequence[bytes]) -> int:
        """Load the leading run, compare every byte, and release it; returns its length."""
        if self.arena is None:
            chunks, _ = self.get(keys)
        else:
            lease = self.next_lease()
            offsets, _ = self.load(lease, keys)
            chunks = [self.slot(offset) for offset in offsets.values()]
            self.release(lease)
        for key, chunk in zip(keys, chunks, strict=False):
            assert chunk == self.content(key), "wrong bytes"
        return len(chunks)


def piece_of(index: int, data: bytes, digest: int = 0) -> pb.PutRequest:
    """One message of a Put."""
    return pb.PutRequest(piece=pb.ChunkPiece(index=index, data=data, checksum=digest))


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """The status and the message with which a call ends; (OK, "") for one that is answered."""
    try:
        answer = call()
        if isinstance(answer, Iterator):
            list(answer)
    except grpc.RpcError as error:
        if not isinstance(error, grpc.Call):
            raise
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""
