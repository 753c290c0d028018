"""Many clients at once, cut off at any await: no wrong byte, no lost slot, no leaked lease."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvtier.chunks import ChunkKey, chain, pack_tokens
from kvtier.config import Config
from kvtier.errors import KvtierError
from kvtier.proto import cache_pb2 as pb
from kvtier.service.answers import CommitOutcome
from kvtier.service.curves import curves_of
from kvtier.service.explain import Explainer
from kvtier.service.leases import Lease
from kvtier.service.servicer import Servicer
from kvtier.service.sessions import Session
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import Outcome, Record, StoreJob
from kvtier.tiers.tree import TierId
from kvtier.transfer.paths import inline
from tests.core import Harness, harness
from tests.fakes import MemoryStore
from tests.sidecar import HANG_S, content_of

TOKENS = 4
CONTEXT: Any = None  # as in process: the servicer asks nothing of it
# Chunks of 1, 2 and 3 slots share one arena.
SPACES = [
    Space(f"m{planes}", Layout("int8", 4, 4, 64, tokens=TOKENS, planes=planes))
    for planes in (1, 2, 3)
]


class JumpyStore(MemoryStore):
    """Takes a while for everything, is small, and fails now and then."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(capacity_bytes=24 * 4096)
        self._chance = chance

    async def load(self, record: Record, into: memoryview) -> Outcome:
        into[: len(into) // 2] = bytes(len(into) // 2)  # undefined until it is a hit
        await pause(self._chance)
        fate = self._chance.random()
        if fate < 0.05:
            return Outcome.FAILED
        if fate < 0.08:
            return Outcome.CORRUPT
        return await super().load(record, into)

    async def store(self, jobs: list[StoreJob]) -> list[Record | None]:
        before = [bytes(job.source) for job in jobs]
        await pause(self._chance)
        assert before == [bytes(job.source) for job in jobs], "a chunk changed under the writer"
        if self._chance.random() < 0.1:
            return [None] * len(jobs)
        return await super().store(jobs)


async def pause(chance: random.Random) -> None:
    """Let the others go on for a while."""
    for _ in range(chance.randrange(6)):
        await asyncio.sleep(0)


class Actor:
    """A client that does one thing after another and checks each byte it sees."""

    def __init__(self, h: Harness, chance: random.Random) -> None:
        self.h = h
        self.chance = chance
        explainer = Explainer(h.placement.index, h.placement.history, Config())
        self.servicer = Servicer(h.cache, explainer, curves_of(Config()))
        self.session = self._connect()
        self.next_lease = 0
        self.read = 0

    def _connect(self) -> Session:
        self.next_lease = 0
        return self.h.session(self.chance.choice(SPACES))

    async def live(self, steps: int) -> None:
        doings = [
            self.put_in_place, self.put_in_place, self.put_inline, self.load, self.load, self.get,
            self.prefetch, self.evict, self.reconnect,
        ]  # fmt: skip
        weights = [4, 4, 4, 5, 5, 4, 2, 1, 1]
        for _ in range(steps):
            doing: Callable[[], Awaitable[None]] = self.chance.choices(doings, weights)[0]
            task = asyncio.ensure_future(doing())
            if self.chance.random() < 0.4:
                await pause(self.chance)
                task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
            except KvtierError:
                pass  # a limit, or a session that another doing of this one has ended
            self.h.placement.index.check()

    def keys(self) -> list[ChunkKey]:
        """A prompt of one of few families, so that prompts meet."""
        family, length = self.chance.randrange(6), self.chance.randrange(1, 8)
        tokens = [family * 1000 + n for n in range(length * TOKENS)]
        return list(chain(self.session.branch.digest, pack_tokens(tokens), TOKENS))

    def lease_id(self) -> int:
        self.next_lease += 1
        return self.next_lease

    def right(self, key: ChunkKey) -> bytes:
        return content_of(key, self.session.branch.space.layout.nbytes)

    # ── what it does ──────────────────────────────────────────────────────────────────────────────

    async def reserve(self, keys: list[ChunkKey]) -> tuple[int, list[int]]:
        lease_id = self.lease_id()
        request = pb.ReserveRequest(
            session_id=self.session.id,
            lease_id=lease_id,
            keys=b"".join(keys),
            parent=self.session.branch.digest,
        )
        answer = await self.servicer.Reserve(request, CONTEXT)
        granted = [
            index
            for index, chunk in enumerate(answer.chunks)
            if chunk.status == pb.RESERVE_STATUS_WRITE
        ]
        return lease_id, granted

    async def put_in_place(self) -> None:
        """Write slots half by half, then commit, abort, or forget about them."""
        keys, session = self.keys(), self.session
        lease_id, granted = await self.reserve(keys)
        lease = self.h.cache.write_lease(session, lease_id)
        try:
            for index in granted:
                await self._fill(session, lease, index, self.right(keys[index]))
            if self.chance.random() < 0.8:
                outcomes = self.h.cache.commit(session, lease_id, granted)
                assert CommitOutcome.CORRUPT not in outcomes
        finally:
            if not (lease is None or lease.ended):
                self.h.cache.abort(session, lease_id)

    async def _fill(self, session: Session, lease: Lease | None, index: int, chunk: bytes) -> None:
        assert lease is not None
        half = len(chunk) // 2
        for start in (0, half):
            if lease.ended:
                return  # its session ended: the slot is no longer this client's
            view = self.h.placement.memory.view(lease.replicas[index].slot)
            view[start : start + half] = chunk[start : start + half]
            await pause(self.chance)

    async def put_inline(self) -> None:
        keys = self.keys()
        lease_id, granted = await self.reserve(keys)

        async def messages() -> AsyncIterator[pb.PutRequest]:
            header = pb.PutHeader(session_id=self.session.id, lease_id=lease_id)
            yield pb.PutRequest(header=header)
            for index in granted:
                chunk = memoryview(self.right(keys[index]))
                half = len(chunk) // 2
                yield pb.PutRequest(piece=pb.ChunkPiece(index=index, data=bytes(chunk[:half])))
                await pause(self.chance)
                wrong = self.chance.random() < 0.1
                digest = inline.checksum(chunk) ^ wrong
                last = pb.ChunkPiece(index=index, data=bytes(chunk[half:]), checksum=digest)
                yield pb.PutRequest(piece=last)
                await pause(self.chance)

        session = self.session
        try:
            await self.servicer.Put(messages(), CONTEXT)
        finally:
            self.h.cache.abort(session, lease_id)  # as a client does after a failure

    async def load(self) -> None:
        keys, session, lease_id = self.keys(), self.session, self.lease_id()
        request = pb.LoadRequest(session_id=session.id, lease_id=lease_id, keys=b"".join(keys))
        seen: dict[int, int] = {}
        try:
            async for response in self.servicer.Load(request, CONTEXT):
                for chunk in response.chunks:
                    assert chunk.index == len(seen)
                    seen[chunk.index] = chunk.offset
                    self._check(session, lease_id, keys, seen)
                await pause(self.chance)
            for _ in range(3):
                self._check(session, lease_id, keys, seen)
                await pause(self.chance)
        finally:
            self._check(session, lease_id, keys, seen)
            self.h.cache.release(session, lease_id)

    def _check(
        self, session: Session, lease_id: int, keys: list[ChunkKey], seen: dict[int, int]
    ) -> None:
        if session.id not in self.h.cache.sessions._sessions:
            return  # it ended, and its slots with it
        nbytes = session.branch.space.layout.nbytes
        for index, offset in seen.items():
            found = bytes(self.h.placement.memory.region.view[offset : offset + nbytes])
            assert found == content_of(keys[index], nbytes), "wrong bytes under a lease"
            self.read += 1

    async def get(self) -> None:
        keys = self.keys()
        request = pb.GetRequest(session_id=self.session.id, keys=b"".join(keys))
        parts: list[bytes] = []
        done = 0
        async for message in self.servicer.Get(request, CONTEXT):
            response = pb.GetResponse.FromString(inline.write_get(message))  # as gRPC does: at once
            if response.HasField("piece"):
                parts.append(response.piece.data)
                assert response.piece.index == done
                if response.piece.checksum:
                    assert b"".join(parts) == self.right(keys[done])
                    parts, done = [], done + 1
                    self.read += 1
            await pause(self.chance)

    async def prefetch(self) -> None:
        await self.h.cache.prefetch(self.session, self.keys())

    async def evict(self) -> None:
        await self.h.cache.evict(self.session, self.keys()[-1:], whole_space=False)

    async def reconnect(self) -> None:
        ended, self.session = self.session, self._connect()
        self.h.cache.end_session(ended)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
async def test_clients_cut_off_anywhere(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    complaints: list[dict[str, Any]] = []  # of callbacks, which have nobody to raise to
    asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told))
    async with harness(tmp_path, slots=40, store=JumpyStore(chance)) as h:
        actors = [Actor(h, random.Random(f"{seed} {number}")) for number in range(6)]
        await asyncio.gather(*(actor.live(60) for actor in actors))
        for actor in actors:
            h.cache.end_session(actor.session)
        assert await h.write_behind.flush(HANG_S)
        await asyncio.gather(*(each.outcome for each in list(h.promotions._live.values())))
        assert h.cache.sessions.leases == 0
        assert len(h.cache.sessions) == 0
        assert h.placement.store is not None
        held = [
            (node, replica)
            for space in SPACES
            for node in h.placement.index.branch(space).nodes
            for replica in node.replicas
            if replica is not None
        ]
        assert all(replica.pins == 0 for _, replica in held)
        used = 0
        for node, replica in held:
            nbytes = node.branch.space.layout.nbytes
            if replica.tier is TierId.CPU:
                assert bytes(h.placement.memory.view(replica.slot)) == content_of(node.key, nbytes)
                used += nbytes
            else:
                assert h.store.chunks[replica.record.id][1] == content_of(node.key, nbytes)
        assert h.placement.memory.arena.used_bytes == used
        assert h.placement.store.used_bytes <= h.placement.store.capacity_bytes
        counted = h.placement.counters
        assert counted.reserved_chunks == counted.committed_chunks + counted.aborted_chunks
        assert complaints == []
        # The test is worth its time only if all of this really happened.
        assert sum(actor.read for actor in actors) > 100
        assert min(counted.evicted_cpu, counted.evicted_disk, counted.promoted_chunks) > 0
