"""What is read ahead, whatever happens: no load waits for it, and nothing of it is left behind."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.chunks import Prefix
from kvtier.service.sessions import Session
from tests.core import Harness, harness
from tests.fakes import MemoryStore
from tests.loops import turn
from tests.service.test_prefetch import assert_nothing_is_kept, on_disk, settle

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["lookup", "prefetch", "cancel", "load", "put", "end", "turn", "gate"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(1, 6),
    ),
    max_size=25,
)


class Play:
    """Three sessions over three prompts on disk, with a store that stands still at times."""

    def __init__(self, h: Harness, prefixes: Sequence[Prefix]) -> None:
        self.h = h
        self.prefixes = prefixes
        self.sessions = [h.session() for _ in range(3)]
        self.loads: list[asyncio.Task[object]] = []
        self.fresh = 100

    async def step(self, name: str, who: int, which: int, length: int) -> None:
        await getattr(self, name)(who, self.prefixes[which][:length])
        self.check()

    async def lookup(self, who: int, prefix: Prefix) -> None:
        self.h.cache.lookup(self.sessions[who], prefix.keys)

    async def prefetch(self, who: int, prefix: Prefix) -> None:
        there, coming = await self.h.cache.prefetch(self.sessions[who], prefix.keys)
        assert there + coming <= len(prefix)

    async def cancel(self, who: int, prefix: Prefix) -> None:
        self.h.cache.cancel_prefetch(self.sessions[who], prefix.keys)

    async def load(self, who: int, prefix: Prefix) -> None:
        self.loads.append(asyncio.create_task(self._load(self.sessions[who], prefix)))

    async def put(self, who: int, prefix: Prefix) -> None:
        self.fresh += 1
        session = self.sessions[who]
        self.h.put(session, self.h.chain_of(session, len(prefix), seed=self.fresh))

    async def end(self, who: int, prefix: Prefix) -> None:
        self.h.cache.end_session(self.sessions[who])
        self.sessions[who] = self.h.session()

    async def turn(self, who: int, prefix: Prefix) -> None:
        await turn()

    async def gate(self, who: int, prefix: Prefix) -> None:
        gate = self.h.store.gate
        gate.clear() if gate.is_set() else gate.set()

    async def _load(self, session: Session, prefix: Prefix) -> None:
        came, _, lease = await self.h.get(session, prefix)  # compares the bytes
        assert came <= len(prefix)
        if not lease.ended:
            self.h.cache.release(session, lease.id)

    def check(self) -> None:
        """What is under way is what is claimed, and within its bounds."""
        ahead = self.h.cache._ahead
        claimed = sum(map(len, ahead._claims.values()))
        assert ahead._under_way_bytes == claimed * 4096
        assert ahead._under_way_bytes <= 2 * ahead._most_bytes
        assert all(len(claims) * 4096 <= ahead._most_bytes for claims in ahead._claims.values())


@settings(max_examples=60)
@given(steps=STEPS)
def test_no_slot_pin_or_claim_is_left_behind(
    steps: list[tuple[str, int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def play() -> None:
        async with harness(tmp_path_factory.mktemp("ahead"), slots=16) as h:
            asking = h.session()
            prefixes = await on_disk(h, asking, 6, 6, 6)
            played = Play(h, prefixes)
            for step in steps:
                await played.step(*step)
            h.store.gate.set()
            await asyncio.gather(*played.loads)
            await settle(h)
            for session in played.sessions:
                h.cache.end_session(session)
            assert await h.write_behind.flush(10)
            assert_nothing_is_kept(h)
            counters = h.placement.counters
            told = counters.prefetch_used_chunks + counters.prefetch_cancelled_chunks
            assert told <= counters.prefetched_chunks

    asyncio.run(play())


@settings(max_examples=60)
@given(
    guesses=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    named=st.integers(1, 6),
    wanted=st.integers(1, 6),
)
def test_a_guess_never_begins_while_a_load_waits(
    guesses: list[int], named: int, wanted: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Once a load is asked for, the store reads all its chunks, and then the guesses that had not
    begun; also where some of its chunks were guesses themselves."""

    async def play() -> None:
        store = MemoryStore()
        directory = tmp_path_factory.mktemp("order")
        async with harness(directory, store=store, read_ahead_percent=50) as h:
            guessing, loading = h.session(), h.session()
            *guessed, target = await on_disk(h, guessing, *guesses, wanted)
            store.gate.clear()
            for prefix in (*guessed, target[:named]):
                await h.cache.prefetch(guessing, prefix.keys)
            await store.loading.acquire()
            await turn()
            assert store.loads == [guessed[0][0]], "one lane is kept for loads"
            load = asyncio.create_task(h.get(loading, target))
            await store.loading.acquire()
            store.gate.set()
            assert (await load)[0] == wanted
            assert store.loads[1 : 1 + wanted] == [*target]
            await settle(h)
            assert len(store.loads) == sum(guesses) + wanted

    asyncio.run(play())
