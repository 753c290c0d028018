"""The RPCs: from messages to the cache and back. Errors are mapped to statuses by `status.py`."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import count
from typing import Any, TypeAlias

import grpc
from grpc import aio

from kvtier.chunks import ChunkKey
from kvtier.errors import InvalidRequest
from kvtier.proto import cache_pb2 as pb
from kvtier.proto.cache_pb2_grpc import CacheServicer
from kvtier.service.answers import CommitOutcome, LoadStop
from kvtier.service.cache import MOST_COMMITTED, Cache
from kvtier.service.convert import (
    client_of,
    deadline_of,
    hints_of,
    keys_of,
    offered_of,
    parent_of,
    pinned_to,
    pins_to,
    space_of,
    terms_of,
)
from kvtier.service.explain import Explainer
from kvtier.service.hints import Hints
from kvtier.service.leases import Lease
from kvtier.service.overlaps import Offered
from kvtier.service.pace import in_turns
from kvtier.service.reserving import MOST_AT_ONCE
from kvtier.service.sessions import Session
from kvtier.tiers.curve_tenants import Curves
from kvtier.tiers.tree import TierId
from kvtier.transfer.paths import inline
from kvtier.version import __version__

Context: TypeAlias = "aio.ServicerContext[Any, Any]"
SERVICE = pb.DESCRIPTOR.services_by_name["Cache"].full_name
# Read leases of Get calls are the service's own: clients choose 64-bit ids, these lie above.
_OWN_LEASES = 1 << 64
# Messages with a piece are read and written by hand, see `transfer/paths/inline.py`.
PutMessage: TypeAlias = inline.Piece | pb.PutRequest
GetMessage: TypeAlias = inline.Piece | pb.GetResponse
Hinted: TypeAlias = pb.LookupRequest | pb.LoadRequest | pb.GetRequest | pb.ReserveRequest


class Servicer(CacheServicer):
    """Speaks kvtier.v1 for one cache."""

    def __init__(self, cache: Cache, explainer: Explainer, curves: Curves) -> None:
        self._cache = cache
        self._explainer = explainer
        self._curves = curves
        self._started_s = time.monotonic()
        self._own_leases = count(_OWN_LEASES)

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Context
    ) -> AsyncIterator[pb.SessionEvent]:
        vram = self._cache.placement.vram
        usable = _PATHS if vram is None or vram.lost else (*_PATHS, pb.DATA_PATH_CUDA_IPC)
        path = next((path for path in request.paths if path in usable), None)
        if path is None:
            raise InvalidRequest("paths: none usable; offer DATA_PATH_SHM or DATA_PATH_INLINE")
        session = self._cache.open_session(
            client_of(request.client),
            space_of(request.space),
            tethered=path != pb.DATA_PATH_INLINE,
            in_vram=path == pb.DATA_PATH_CUDA_IPC,
        )
        try:
            yield pb.SessionEvent(opened=self._opened(session, path))
            await session.closing.wait()
            yield pb.SessionEvent(closing=pb.SessionClosing(reason="the service ends it"))
        finally:
            self._cache.end_session(session)

    def _opened(self, session: Session, path: "pb.DataPath.ValueType") -> pb.SessionOpened:
        region, vram = self._cache.placement.memory.region, self._cache.placement.vram
        arena = None
        if session.tether is not None:
            arena = pb.ShmArena(
                path=str(region.path), nbytes=region.nbytes, tether_path=str(session.tether.path)
            )
        return pb.SessionOpened(
            session_id=session.id,
            space_digest=session.branch.digest,
            chunk_bytes=session.branch.space.layout.nbytes,
            path=path,
            arena=arena,
            max_keys=self._cache.rules.limits.keys_per_request,
            max_write_lease_bytes=self._cache.write_lease_limit,
            server_version=__version__,
            max_token_bytes=self._cache.overlaps.max_token_bytes,
            vram=(
                pb.VramArena(handle=vram.handle, nbytes=vram.region.nbytes)
                if vram is not None and session.in_vram
                else None
            ),
        )

    # ── reading ───────────────────────────────────────────────────────────────────────────────────

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        session, keys = self._session_and_keys(request.session_id, request.keys)
        held, in_ram = self._cache.lookup(session, keys, self._hints(request))
        return pb.LookupResponse(held=held, in_ram=in_ram)

    async def Load(
        self, request: pb.LoadRequest, context: Context
    ) -> AsyncIterator[pb.LoadResponse]:
        session, keys = self._session_and_keys(request.session_id, request.keys)
        offered = _offered(request, session, len(keys))
        lease = self._cache.open_read(session, request.lease_id)
        deadline_s = deadline_of(request.deadline_ms)
        chunks, loading = self._cache.load(
            session,
            lease,
            keys,
            deadline_s,
            hints=self._hints(request),
            in_vram=request.in_vram,
            offered=offered,
        )
        brought = 0
        async for landed in chunks:
            brought += len(landed.chunks)
            yield pb.LoadResponse(
                chunks=[
                    pb.LoadedChunk(
                        index=index,
                        offset=replica.slot.offset,
                        in_vram=replica.tier is TierId.GPU,
                        tokens=loading.overlapping(index),
                    )
                    for index, replica in landed.chunks
                ]
            )
        yield pb.LoadResponse(end=_end(loading.stop, brought))

    async def Get(  # type: ignore[override]
        self, request: pb.GetRequest, context: Context
    ) -> AsyncIterator[GetMessage]:
        session, keys = self._session_and_keys(request.session_id, request.keys)
        offered = _offered(request, session, len(keys))
        lease = self._cache.open_read(session, next(self._own_leases))
        view = self._cache.placement.memory.view
        try:
            deadline_s = deadline_of(request.deadline_ms)
            hints = self._hints(request)
            chunks, loading = self._cache.load(
                session, lease, keys, deadline_s, hints=hints, offered=offered
            )
            brought = 0
            async for landed in chunks:
                for index, replica in landed.chunks:
                    if overlapping := loading.overlapping(index):
                        yield pb.GetResponse(tokens=overlapping)
                    for piece in _pieces(lease, index, view(replica.slot)):
                        yield piece
                    brought += 1
            yield pb.GetResponse(end=_end(loading.stop, brought))
        finally:
            if not lease.ended:
                session.leases.end(lease)

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        self._cache.release(self._session(request.session_id), request.lease_id)
        return pb.ReleaseResponse()

    async def Prefetch(self, request: pb.PrefetchRequest, context: Context) -> pb.PrefetchResponse:
        session, keys = self._session_and_keys(request.session_id, request.keys)
        if request.cancel:
            return pb.PrefetchResponse(promoting=self._cache.cancel_prefetch(session, keys))
        in_ram, promoting = await self._cache.prefetch(session, keys)
        return pb.PrefetchResponse(in_ram=in_ram, promoting=promoting)

    # ── writing ───────────────────────────────────────────────────────────────────────────────────

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        session, keys = self._session_and_keys(request.session_id, request.keys)
        parent = parent_of(request.parent)
        layout = session.branch.space.layout
        offered = offered_of(request.tokens, request.parent, len(keys), layout.tokens)
        hints = self._hints(request)
        pieces = self._cache.reserve_in_pieces(session, request.lease_id, keys, parent, hints)
        answers = await in_turns(pieces, MOST_AT_ONCE)
        if offered is not None:
            self._cache.learn(session, keys, offered)
        return pb.ReserveResponse(
            chunks=[
                pb.ReservedChunk(
                    status=answer.outcome.value,  # type: ignore[arg-type]
                    offset=answer.slot.offset if answer.slot is not None else 0,
                )
                for answer in answers
            ]
        )

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        session = self._session(request.session_id)
        if session.tether is None:  # its slots still hold what others had in them
            raise InvalidRequest("session_id: on the path inline only Put commits")
        limit = self._cache.rules.limits.keys_per_request
        if len(request.indexes) > limit:
            raise InvalidRequest(f"indexes: {len(request.indexes)} given, at most {limit}")
        pieces = self._cache.commit_in_pieces(session, request.lease_id, request.indexes)
        outcomes = await in_turns(pieces, MOST_COMMITTED)
        return pb.CommitResponse(chunks=_committed(request.indexes, outcomes))

    async def Put(
        self, request_iterator: AsyncIterator[PutMessage], context: Context
    ) -> pb.PutResponse:
        first = await anext(aiter(request_iterator), None)
        if not isinstance(first, pb.PutRequest) or not first.HasField("header"):
            raise InvalidRequest("header: the first message of a Put must carry it")
        session, lease_id = self._session(first.header.session_id), first.header.lease_id
        lease = self._cache.write_lease(session, lease_id)
        if lease is not None and lease.filling:
            raise InvalidRequest(f"lease_id: another Put fills lease {lease_id}")
        try:
            whole, corrupt = await self._receive(lease, request_iterator)
            pieces = self._cache.commit_in_pieces(session, lease_id, whole)
            outcomes = await in_turns(pieces, MOST_COMMITTED)
        except BaseException:  # also a client that went away: its chunks are not to be published
            self._cache.abort(session, lease_id)
            raise
        broken = [CommitOutcome.CORRUPT] * len(corrupt)
        return pb.PutResponse(chunks=_committed(whole, outcomes) + _committed(corrupt, broken))

    async def _receive(
        self, lease: Lease | None, requests: AsyncIterator[PutMessage]
    ) -> tuple[list[int], list[int]]:
        """Fill the lease's slots; returns the indexes that arrived whole and those that are
        corrupt."""
        view = self._cache.placement.memory.view
        if lease is not None:
            lease.filling = True
        assemblies: dict[int, inline.Assembly] = {}
        verdicts: dict[int, bool] = {}
        async for request in requests:
            piece = request if isinstance(request, inline.Piece) else inline.piece_of(request.piece)
            if lease is None or lease.ended or piece.index not in lease.replicas:
                raise InvalidRequest(f"piece: chunk {piece.index} is not reserved by this lease")
            assembly = assemblies.get(piece.index)
            if assembly is None:
                target = view(lease.replicas[piece.index].slot)
                assembly = assemblies[piece.index] = inline.Assembly(target)
            verdict = assembly.add(piece)
            if verdict is not None:
                verdicts[piece.index] = verdict
        whole = sorted(index for index, right in verdicts.items() if right)
        return whole, sorted(index for index, right in verdicts.items() if not right)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        self._cache.abort(self._session(request.session_id), request.lease_id)
        return pb.AbortResponse()

    # ── the operator's ────────────────────────────────────────────────────────────────────────────

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictResponse:
        session, keys = self._session_and_keys(request.session_id, request.keys)
        if request.whole_space and keys:
            raise InvalidRequest("keys: must be empty with whole_space")
        chunks = await self._cache.evict(session, keys, whole_space=request.whole_space)
        return pb.EvictResponse(chunks=chunks)

    async def Pin(self, request: pb.PinRequest, context: Context) -> pb.PinResponse:
        await self._cache.pins.end_expired()  # that is not to count against it
        session, keys = self._session_and_keys(request.session_id, request.keys)
        return pinned_to(self._cache.pin(session, keys, terms_of(request)))

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:
        self._cache.pins.unpin(self._session(request.session_id), request.pin_id)
        return pb.UnpinResponse()

    async def ListPins(self, request: pb.ListPinsRequest, context: Context) -> pb.ListPinsResponse:
        return pins_to(self._cache.pins.listed(self._session(request.session_id)))

    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        return pb.StatsResponse(
            version=__version__,
            uptime_s=time.monotonic() - self._started_s,
            tiers=[
                pb.TierStats(
                    name=tier.name,
                    capacity_bytes=tier.capacity_bytes,
                    used_bytes=tier.used_bytes,
                    chunks=tier.chunks,
                )
                for tier in self._cache.tiers()
            ],
            sessions=len(self._cache.sessions),
            leases=self._cache.sessions.leases,
            spaces=len(self._cache.placement.index.spaces),
            counters=self._cache.placement.counters.as_dict(),
        )

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        session, keys = self._session_and_keys(request.session_id, request.keys)
        answers = self._explainer.explain(
            session.branch, keys, request.token_ids, list(request.extras)
        )
        return pb.ExplainResponse(
            keys=[
                pb.Explanation(
                    state=answer.state.value,  # type: ignore[arg-type]
                    detail=answer.detail,
                    fields=answer.fields,
                )
                for answer in answers
            ]
        )

    async def Curve(self, request: pb.CurveRequest, context: Context) -> pb.CurveResponse:
        readings = self._curves.read()
        return pb.CurveResponse(
            curves=[
                pb.HitCurve(
                    all_tenants=reading.tenant is None,
                    tenant=reading.tenant or "",
                    tier=reading.tier,
                    capacity_bytes=reading.capacity_bytes,
                    points=[
                        pb.CurvePoint(
                            capacity_bytes=point.capacity_bytes, hit_percent=point.hit_percent
                        )
                        for point in reading.points
                    ],
                    rate=reading.rate,
                    requests=reading.requests,
                    sampled_chunks=reading.sampled_chunks,
                    seen_bytes=reading.seen_bytes,
                )
                for reading in readings
            ]
        )

    # ── shared ────────────────────────────────────────────────────────────────────────────────────

    def _session(self, session_id: bytes) -> Session:
        return self._cache.sessions.get(session_id)

    def _session_and_keys(self, session_id: bytes, packed: bytes) -> tuple[Session, list[ChunkKey]]:
        session = self._session(session_id)
        return session, keys_of(packed, self._cache.rules.limits.keys_per_request)

    def _hints(self, request: Hinted) -> Hints:
        return hints_of(request.hints, self._cache.placement.counters)


def inline_handlers(servicer: Servicer) -> grpc.GenericRpcHandler:
    """Put and Get with the inline path's own reading and writing of messages; to be added before
    the generated handlers, which would answer them otherwise."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Put": grpc.stream_unary_rpc_method_handler(
            servicer.Put, inline.read_put, pb.PutResponse.SerializeToString
        ),
        "Get": grpc.unary_stream_rpc_method_handler(
            servicer.Get, pb.GetRequest.FromString, inline.write_get
        ),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


_PATHS = (pb.DATA_PATH_SHM, pb.DATA_PATH_INLINE)


def _pieces(lease: Lease, index: int, chunk: memoryview) -> Iterator[inline.Piece]:
    for piece in inline.cut(index, chunk, inline.checksum(chunk)):
        if lease.ended:  # the session ended between two messages: the slot is no longer ours
            raise InvalidRequest("session_id: the session ended during the call")
        yield piece


def _offered(
    request: pb.LoadRequest | pb.GetRequest, session: Session, keys: int
) -> Offered | None:
    """The tokens of a prompt that is asked for, of one chunk more than it has keys."""
    layout = session.branch.space.layout
    return offered_of(request.tokens, request.tokens.parent, keys + 1, layout.tokens)


def _end(stop: LoadStop, chunks: int) -> pb.LoadEnd:
    return pb.LoadEnd(reason=stop.value, chunks=chunks)  # type: ignore[arg-type]


def _committed(
    indexes: Sequence[int], outcomes: Sequence[CommitOutcome]
) -> list[pb.CommittedChunk]:
    return [
        pb.CommittedChunk(index=index, status=outcome.value)  # type: ignore[arg-type]
        for index, outcome in zip(indexes, outcomes, strict=True)
    ]
