"""Chunks that are removed while everything else goes on: whatever comes in between, what was there
is gone in the end, and the books agree."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.chunks import Prefix
from kvtier.config import Config
from kvtier.service import removals
from kvtier.service.answers import KeyState, ReserveOutcome
from kvtier.service.demotion import When, Writing
from kvtier.service.explain import Explainer
from kvtier.service.pins import Terms
from kvtier.service.sessions import Session
from kvtier.tiers.tree import TierId
from tests.core import Harness, harness
from tests.loops import turn

WRITE = ReserveOutcome.WRITE
LENGTH, FAMILIES = 6, 3
STEPS = ["put", "put", "pin", "get", "release", "reconnect", "evict", "evict", "pass_turns"]


@pytest.fixture
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn after each step."""
    monkeypatch.setattr(removals, "_STEPS", 1)


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too old goes at once where it is one chunk."""
    monkeypatch.setattr(removals, "_FEW", 1)


async def all_but(chunks: int, h: Harness) -> None:
    """Return once RAM has no more than so many chunks."""
    while h.placement.index.chunks[TierId.CPU] > chunks:
        await turn()


@pytest.mark.usefixtures("step_by_step")
async def test_leaves_go_first_so_a_prefix_is_never_torn(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 10)
        h.put(session, prefix)
        going = asyncio.create_task(h.cache.evict(session, prefix[:1].keys, whole_space=False))
        seen = set()
        while not going.done():
            seen.add(h.cache.lookup(session, prefix.keys)[0])
            h.placement.index.check()
            await asyncio.sleep(0)
        assert seen == set(range(11)), "a chunk in each turn"
        assert await going == 10


@pytest.mark.usefixtures("step_by_step")
async def test_what_is_stored_below_what_goes_goes_as_well(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix, other = h.chain_of(session, 6), h.prefix(session, [*range(8), *range(90, 98)])
        h.put(session, prefix)
        going = asyncio.create_task(h.cache.evict(session, prefix[:1].keys, whole_space=False))
        await all_but(4, h)
        assert h.put(session, other)[2:] == [WRITE] * 2
        again = h.put(session, prefix)  # also what has gone already
        assert again[4:] == [WRITE] * 2
        assert await going == 6 + 2 + again.count(WRITE)
        assert h.placement.index.chunks[TierId.CPU] == 0


@pytest.mark.usefixtures("step_by_step")
async def test_what_is_stored_anew_after_its_root_went_stays(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        h.store.refuse_writes = True
        first, second = h.chain_of(session, 3, seed=1), h.chain_of(session, 3, seed=2)
        h.put(session, first)
        h.put(session, second)
        going = asyncio.create_task(h.cache.evict(session, [], whole_space=True))
        await all_but(3, h)
        gone = first if h.cache.lookup(session, first.keys)[0] == 0 else second
        h.put(session, gone)
        assert await going == 6
        assert h.cache.lookup(session, gone.keys) == (3, 3)


@pytest.mark.usefixtures("step_by_step")
async def test_what_is_reserved_below_what_goes_is_not_committed(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix[:3])
        lease_id, outcomes = h.reserve(session, prefix)
        assert outcomes[3] is WRITE
        assert await h.cache.evict(session, prefix[:1].keys, whole_space=False) == 3
        [outcome] = h.cache.commit(session, lease_id, [3])
        assert outcome.name == "PARENT_MISSING"
        assert h.placement.memory.arena.used_bytes == 0


@pytest.mark.usefixtures("step_by_step")
async def test_two_that_remove_the_same_count_each_chunk_once(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 9)
        h.put(session, prefix)
        one = h.cache.evict(session, [], whole_space=True)
        other = h.cache.evict(session, prefix.keys[::-1], whole_space=False)
        assert sum(await asyncio.gather(one, other)) == 9


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("ends", ["the call", "the session"])
async def test_what_was_begun_is_carried_out(tmp_path: Path, ends: str) -> None:
    """And a stop waits for it: else what a client removed would be written, and be back."""
    async with harness(tmp_path) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 9))
        going = asyncio.create_task(h.cache.evict(session, [], whole_space=True))
        await all_but(7, h)
        if ends == "the call":
            going.cancel()
        else:
            h.cache.end_session(session)
        await h.cache.removals.close()
        assert h.placement.index.chunks[TierId.CPU] == 0
        assert not session.branch.nodes


@pytest.mark.usefixtures("step_by_step")
async def test_explain_tells_what_was_named_from_what_continued_it(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        await h.cache.evict(session, prefix.keys[1:3], whole_space=False)
        explainer = Explainer(h.placement.index, h.placement.history, Config())
        told = explainer.explain(session.branch, prefix.keys[1:], b"", [])
        assert [each.state for each in told] == [KeyState.EVICTED] * 3
        assert ["continued" in each.detail for each in told] == [False, False, True]


# ── age ──


@pytest.mark.usefixtures("step_by_step", "few_at_once")
async def test_much_that_is_too_old_goes_in_a_moment(tmp_path: Path) -> None:
    async with harness(tmp_path, ttl_s=100.0) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 9)
        h.put(session, prefix)
        h.clock_s[0] += 101
        for _ in range(3):  # nobody finds it meanwhile, and it goes once
            assert h.cache.lookup(session, prefix.keys) == (0, 0)
            assert h.placement.index.chunks[TierId.CPU] > 0
            assert len(h.cache.removals._under_way) == 1
            await turn()
        await h.cache.removals.close()
        assert h.placement.counters.expired_chunks == 9
        assert h.placement.memory.arena.used_bytes == 0
        assert h.put(session, prefix) == [WRITE] * 9


@pytest.mark.usefixtures("few_at_once")
async def test_little_that_is_too_old_makes_place_at_once(tmp_path: Path) -> None:
    async with harness(tmp_path, ttl_s=100.0) as h:
        h.store.refuse_writes = True
        session = h.session()
        prefix = h.chain_of(session, 1)
        h.put(session, prefix)
        h.clock_s[0] += 101
        assert h.put(session, prefix) == [WRITE]


# ── anything at all ──


class Play:
    """Sessions of one space that store, read, pin and go while chunks of it are removed."""

    def __init__(self, h: Harness) -> None:
        self.h = h
        self.sessions = [h.session() for _ in range(2)]
        self.removing: list[asyncio.Task[int]] = []
        self.read: list[tuple[Session, Any]] = []

    def prefix(self, family: int, length: int = LENGTH) -> Prefix:
        tokens = [n if n < 8 else family * 1000 + n for n in range(4 * length)]
        return self.h.prefix(self.sessions[0], tokens)

    async def put(self, who: int, family: int, length: int) -> None:
        self.h.put(self.sessions[who], self.prefix(family, length))

    async def pin(self, who: int, family: int, length: int) -> None:
        self.h.cache.pin(self.sessions[who], self.prefix(family, length).keys, Terms(5.0, who > 0))

    async def get(self, who: int, family: int, length: int) -> None:
        session = self.sessions[who]
        _, _, lease = await self.h.get(session, self.prefix(family, length))
        if not lease.ended:
            self.read.append((session, lease))

    async def release(self, who: int, family: int, length: int) -> None:
        if self.read:
            session, lease = self.read.pop(family % len(self.read))
            self.h.cache.release(session, lease.id)

    async def reconnect(self, who: int, family: int, length: int) -> None:
        self.h.cache.end_session(self.sessions[who])
        self.read = [each for each in self.read if each[0] is not self.sessions[who]]
        self.sessions[who] = self.h.session()

    async def evict(self, who: int, family: int, length: int) -> None:
        keys = self.prefix(family)[length - 1 : length].keys if family else ()
        self.begin(self.h.cache.evict(self.sessions[who], keys, whole_space=not keys))

    async def pass_turns(self, who: int, family: int, length: int) -> None:
        for _ in range(length):
            await turn()

    def begin(self, removal: Awaitable[int]) -> None:
        self.removing.append(asyncio.ensure_future(removal))


steps = st.lists(
    st.tuples(
        st.sampled_from(STEPS),
        st.integers(0, 1),
        st.integers(0, FAMILIES - 1),
        st.integers(1, LENGTH),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps, to_disk=st.booleans(), policy=st.sampled_from(["gix", "lru"]))
def test_whatever_comes_in_between_nothing_is_left(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int, int, int]],
    to_disk: bool,
    policy: str,
) -> None:
    async def play() -> None:
        directory = tmp_path_factory.mktemp("removals")
        writing = Writing(When.WRITE_THROUGH if to_disk else When.SECOND_TOUCH)
        async with harness(directory, 12, policy=policy, writing=writing, pin_percent=90) as h:
            play = Play(h)
            for name, who, family, length in steps:
                await getattr(play, name)(who, family, length)
                h.placement.index.check()
                for session, lease in play.read:
                    assert not lease.ended
                    assert session in h.cache.sessions
            play.begin(h.cache.evict(play.sessions[0], [], whole_space=True))
            removed = await asyncio.gather(*play.removing)
            assert all(chunks >= 0 for chunks in removed)
            assert h.placement.index.chunks[TierId.CPU] == 0, "all that was there has gone"
            for session in play.sessions:
                h.cache.end_session(session)
            assert await h.write_behind.flush(60.0)
            assert h.placement.index.chunks == [0, 0, 0]
            assert h.placement.memory.arena.used_bytes == 0
            assert not h.store.chunks
            assert not h.cache.pins._on

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removals, "_STEPS", 1)
        asyncio.run(play())
