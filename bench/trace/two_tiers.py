"""Two tiers, RAM and a disk ten times as large: what each serves, and what the disk has to take.

The trace goes through the service's own core, one request after the other, as from an engine: it is
looked up, what is held is loaded, and the rest is reserved and committed. Then the disk takes what
it is to have, and the next request comes; so the disk is never behind.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.bench.trace.core import CHUNK_BYTES, SPACE, Core, running
from kvtier.bench.trace.replay import Keys, Progress
from kvtier.bench.trace.requests import Trace
from kvtier.chunks import ChunkKey
from kvtier.metrics import Counters
from kvtier.service.answers import ReserveOutcome
from kvtier.service.demotion import Cause, Writing
from kvtier.service.hints import Hints, Label
from kvtier.service.sessions import Session
from kvtier.tiers.tree import TierId

_DISK_TIMES_RAM = 10
_SETTLED_S = 60.0  # by far: nothing is written anywhere
_CAUSES = (Cause.COMMIT, Cause.DEMOTION, Cause.SECOND_TOUCH)  # a replay does not stop the service
_REFUSALS = ("not_worth", "no_room")  # one request at a time meets no other bound


@dataclass(frozen=True, slots=True)
class TierResult:
    """Percent of the chunks that were asked for. What is written is the sum of its causes; what is
    refused was offered and not taken."""

    policy: str
    mode: str
    ram_chunks: int
    disk_chunks: int
    ram_hit_percent: float
    disk_hit_percent: float
    written_percent: float
    written_by_cause: dict[str, float]
    refused_by_cause: dict[str, float]


def two_tiers(ram_chunks: int) -> dict[TierId, int]:
    """What fits in each tier."""
    return {TierId.CPU: ram_chunks, TierId.DISK: _DISK_TIMES_RAM * ram_chunks}


class TwoTiers:
    """A replay of a trace with room for so many chunks in each tier. For the service the unfilled
    end of a prompt is no chunk."""

    def __init__(
        self,
        trace: Trace,
        policy: str,
        chunks: dict[TierId, int],
        writing: Writing,
        labels: Sequence[int],
    ) -> None:
        """`labels`: what the engine says with each request, 0 for nothing."""
        self._trace = trace
        self._policy = policy
        self._chunks = chunks
        self._writing = writing
        self._labels = labels
        self._now_s = 0.0
        self._ram_hits = self._disk_hits = 0

    def run(self, progress: Progress) -> TierResult:
        """Replay it all."""
        return asyncio.run(self._run(progress))

    async def _run(self, progress: Progress) -> TierResult:
        keys = Keys(self._trace.unique)
        async with running(self._policy, self._chunks, self._writing, self._clock) as core:
            session = core.cache.open_session("trace", SPACE, tethered=False)
            for request, now_s in enumerate(self._trace.times_s.tolist()):
                self._now_s = now_s
                chunks = self._trace.needs(request)
                if self._trace.partly[chunks[-1]]:
                    chunks.pop()
                if chunks:
                    hints = Hints(request + 1, Label(self._labels[request]))
                    await self._request(core, session, hints, keys.of(chunks))
                progress(request + 1)
            return self._result(core.placement.counters)

    def _clock(self) -> float:
        return self._now_s

    async def _request(
        self, core: Core, session: Session, hints: Hints, keys: list[ChunkKey]
    ) -> None:
        cache, number = core.cache, hints.request
        _, in_ram = cache.lookup(session, keys, hints)
        await asyncio.sleep(0)  # what is on disk starts to come
        lease = cache.open_read(session, number)
        landing, _ = cache.load(session, lease, keys, None, hints=hints)
        came = 0
        async for landed in landing:
            came += len(landed.chunks)
        cache.release(session, number)
        self._ram_hits += min(in_ram, came)
        self._disk_hits += max(came - in_ram, 0)
        if came < len(keys):
            parent = keys[came - 1] if came else session.branch.digest
            answers = cache.reserve(session, number, keys[came:], parent, hints)
            granted = [n for n, each in enumerate(answers) if each.outcome is ReserveOutcome.WRITE]
            cache.commit(session, number, granted)
        if not await core.write_behind.flush(_SETTLED_S):
            raise TimeoutError(f"request {number - 1}: what it stored was not written")

    def _result(self, counters: Counters) -> TierResult:
        share = 100 / self._trace.references
        count = counters.as_dict()
        return TierResult(
            self._policy,
            self._writing.when.value,
            self._chunks[TierId.CPU],
            self._chunks[TierId.DISK],
            share * self._ram_hits,
            share * self._disk_hits,
            share * counters.disk_written_chunks,
            {
                cause.value: share * count[f"disk_written_bytes_{cause.value}"] / CHUNK_BYTES
                for cause in _CAUSES
            },
            {why: share * count[f"refused_{why}"] for why in _REFUSALS},
        )
