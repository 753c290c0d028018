"""Parts of chunks: what a prompt gets of a chunk that it leaves half-way, over a fake store."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.chunks import ChunkKey, chain, pack_tokens
from kvtier.kernels.host import HostDevice
from kvtier.sections import Limits
from kvtier.service.answers import LoadStop, ReserveOutcome
from kvtier.service.hints import Hints
from kvtier.service.overlaps import Offered
from kvtier.spaces import Space
from kvtier.tiers.base import Outcome
from tests.core import CHUNK_TOKENS, harness, space
from tests.fakes import MemoryStore
from tests.service.partial_steps import LEASES, STORED, ask, load, prompt_of, store
from tests.service.test_vram import raised


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 70, 80, 9], (1, 2)),  # inside the second chunk
        ([1, 2, 3, 40, 5, 6, 7, 8], (0, 3)),  # inside the first
        ([1, 2, 3], (0, 3)),  # shorter than a chunk
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], (2, 1)),  # all keys held; the rest begins the third
        ([1, 2, 3, 4, 50, 6, 7, 8], (1, 0)),  # on the border
        ([9, 2, 3, 4], (0, 0)),  # at once
        (STORED, (3, 0)),  # never
        ([*STORED, 13], (3, 0)),  # beyond what is stored
        ([], (0, 0)),
    ],
)
async def test_the_part_before_the_divergence_is_answered(
    tmp_path: Path, prompt: list[int], expected: tuple[int, int]
) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        store(h, session, STORED)
        assert await load(h, session, prompt) == expected
        assert h.cache.placement.counters.load_partial_tokens == expected[1]
        assert h.cache.placement.counters.load_ram_hits == expected[0], "the part is no hit"


async def test_who_does_not_ask_gets_nothing_new(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        store(h, session, STORED)
        prefix, _ = prompt_of(session, [1, 2, 3, 4, 5, 6, 70, 80])
        assert (await h.get(session, prefix))[:2] == (1, LoadStop.MISS)


async def test_a_run_that_does_not_begin_the_prompt(tmp_path: Path) -> None:
    """An engine that has the first chunk itself asks from the second on."""
    async with harness(tmp_path) as h:
        session = h.session()
        stored = store(h, session, STORED)
        rest = Offered(pack_tokens([5, 6, 70, 80]), [], stored[0])
        strange = chain(stored[0], rest.ids, CHUNK_TOKENS)
        assert await ask(h, session, strange.keys, rest) == (0, (stored[1], 2), LoadStop.MISS)
        nowhere = Offered(rest.ids, [], ChunkKey(b"?" * 32))
        assert await ask(h, session, strange.keys, nowhere) == (0, None, LoadStop.MISS)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), max_size=10), min_size=1, max_size=8), st.data())
def test_it_is_the_longest_that_there_is(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]], data: st.DataObject
) -> None:
    asked = data.draw(st.lists(st.integers(1, 3), max_size=10))

    async def check() -> None:
        async with harness(tmp_path_factory.mktemp("longest")) as h:
            session = h.session()
            for prompt in prompts:
                store(h, session, prompt)
            common = 0
            for prompt in prompts:
                full = prompt[: len(prompt) // CHUNK_TOKENS * CHUNK_TOKENS]
                pairs = zip(full, asked, strict=False)
                agree = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
                common = max(common, agree)
            whole, part = await load(h, session, asked)
            assert whole * CHUNK_TOKENS + part == common
            h.cache.overlaps.tree.check()

    asyncio.run(check())


async def test_a_prompt_without_a_whole_chunk_is_no_use_yet(tmp_path: Path) -> None:
    """An engine that asks for a part and then stores the prompt has used it once: by storing it."""
    async with harness(tmp_path) as h:
        session, hints = h.session(), Hints(request=7)
        store(h, session, STORED)
        asked: list[Sequence[ChunkKey]] = []
        placement = h.placement
        placement.asked = lambda branch, path, run, keys: asked.append(keys)  # type: ignore[method-assign]
        prefix, offered = prompt_of(session, [1, 2, 3, 40])
        lease = h.cache.open_read(session, next(LEASES))
        offered = Offered(offered.ids[:12], [], offered.parent)
        chunks, _ = h.cache.load(session, lease, [], None, hints=hints, offered=offered)
        assert len([landed async for landed in chunks]) == 1
        h.cache.reserve(session, next(LEASES), prefix.keys, prefix.parent, hints)
        assert asked == [prefix.keys]


# ── I2: only what decides the KV alike ──


async def test_another_extra_never_matches(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        store(h, session, STORED, b"adapter 1")
        diverging = [1, 2, 3, 4, 5, 6, 70, 80]
        assert await load(h, session, diverging, b"adapter 1") == (1, 2)
        assert await load(h, session, diverging, b"adapter 2") == (0, 0)
        assert await load(h, session, diverging) == (0, 0)
        store(h, session, [1, 2, 30, 40])
        assert await load(h, session, diverging) == (0, 2)
        assert await load(h, session, diverging, b"adapter 1") == (1, 2)


async def test_an_extra_of_the_diverging_chunk_alone(tmp_path: Path) -> None:
    """An image in the second chunk: the first is shared, the second by its image."""
    async with harness(tmp_path) as h:
        session = h.session()
        packed = pack_tokens([1, 2, 3, 4, 5, 6, 7, 8])
        prefix = chain(session.branch.digest, packed, CHUNK_TOKENS, [b"", b"image 1"])
        lease_id, _ = h.reserve(session, prefix)
        h.cache.learn(session, prefix.keys, Offered(packed, [b"", b"image 1"], prefix.parent))
        h.cache.commit(session, lease_id, [0, 1])
        asked = pack_tokens([1, 2, 3, 4, 5, 6, 70])
        for image, expected in ((b"image 1", (prefix[1], 2)), (b"image 2", None), (b"", None)):
            offered = Offered(asked, [b"", image], prefix.parent)
            found = await ask(h, session, prefix.keys[:1], offered)
            assert found == (1, expected, LoadStop.COMPLETE)


@pytest.mark.parametrize("other", [space("other"), space("m", tenant="other")], ids=str)
async def test_another_space_never_matches(tmp_path: Path, other: Space) -> None:
    async with harness(tmp_path) as h:
        mine, theirs = h.session(), h.session(other)
        stored = store(h, mine, STORED)
        assert await load(h, theirs, [1, 2, 30]) == (0, 0)
        for parent in (mine.branch.digest, stored[0]):  # as a liar would ask
            offered = Offered(pack_tokens([1, 2, 3, 4]), [], parent)
            assert await ask(h, theirs, [], offered) == (0, None, LoadStop.COMPLETE)
        assert await load(h, mine, [1, 2, 30]) == (0, 2)


@pytest.mark.parametrize("lie", ["tokens", "extra", "parent", "shifted"])
async def test_tokens_that_do_not_make_their_key_are_not_believed(tmp_path: Path, lie: str) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix, honest = prompt_of(session, STORED[:8])
        keys, false = list(prefix.keys), honest
        if lie == "tokens":
            false = Offered(pack_tokens([1, 2, 3, 9, 5, 6, 7, 9]), [], prefix.parent)
        elif lie == "extra":
            false = Offered(honest.ids, [b"x", b"x"], prefix.parent)
        elif lie == "shifted":
            false = Offered(honest.ids[4:] + honest.ids[:4], [], prefix.parent)
        else:  # the keys are right, but of another prompt's second chunk
            keys = keys[1:]
            false = Offered(honest.ids[4 * CHUNK_TOKENS :], [], prefix.parent)
        lease_id = next(LEASES)
        h.cache.reserve(session, lease_id, keys, ChunkKey(session.branch.digest))
        h.cache.learn(session, keys, false)
        h.cache.commit(session, lease_id, range(len(keys)))
        assert h.cache.placement.counters.unverified_tokens == len(keys)
        assert len(h.cache.overlaps.tree) == 0
        assert await load(h, session, [1, 2, 3, 90]) == (0, 0)
        assert await load(h, session, [5, 6, 7, 90]) == (0, 0)


# ── what is held, and no longer ──


async def test_only_what_is_committed_matches(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix, offered = prompt_of(session, STORED)
        lease_id, _ = h.reserve(session, prefix)
        h.cache.learn(session, prefix.keys, offered)
        assert await load(h, session, [1, 2, 30]) == (0, 0)
        h.cache.commit(session, lease_id, [0])
        assert await load(h, session, [1, 2, 30]) == (0, 2)
        assert await load(h, session, [1, 2, 3, 4, 5, 60]) == (1, 0)
        assert len(h.cache.overlaps.tree) == 1, "the others were discarded"


async def test_a_client_that_dies_leaves_no_tokens(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session, other = h.session(), h.session()
        prefix, offered = prompt_of(session, STORED)
        h.reserve(session, prefix)
        h.cache.learn(session, prefix.keys, offered)
        h.cache.end_session(session)
        assert len(h.cache.overlaps.tree) == 0
        assert await load(h, other, [1, 2, 30]) == (0, 0)


async def test_the_place_of_a_lost_parent_has_no_tokens(tmp_path: Path) -> None:
    """Its reservation was given up while a chunk after it is still being written, and there is no
    room for it again: whatever is told of it then must go with the place."""
    async with harness(tmp_path, slots=2, store=MemoryStore(capacity_bytes=0)) as h:
        first, second, third = h.session(), h.session(), h.session()
        prefix, offered = prompt_of(first, STORED[:8])
        parent_lease, _ = h.reserve(first, prefix[:1])
        child_lease, _ = h.reserve(second, prefix[1:])
        h.cache.abort(first, parent_lease)
        h.reserve(third, h.chain_of(third, 1, seed=9))  # takes the room
        _, outcomes = h.reserve(first, prefix[:1])
        assert outcomes == [ReserveOutcome.NO_ROOM]
        h.cache.learn(first, prefix.keys[:1], offered)
        h.cache.abort(second, child_lease)
        assert prefix[0] not in first.branch.nodes
        assert len(h.cache.overlaps.tree) == 0


@pytest.mark.parametrize("whole_space", [True, False])
async def test_what_is_evicted_is_forgotten(tmp_path: Path, whole_space: bool) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = store(h, session, STORED)
        doomed = [] if whole_space else [prefix[1]]
        await h.cache.evict(session, doomed, whole_space=whole_space)
        assert len(h.cache.overlaps.tree) == (0 if whole_space else 1)
        assert await load(h, session, [1, 2, 3, 4, 5, 60]) == ((0, 0) if whole_space else (1, 0))


async def test_pressure_leaves_no_tokens_of_what_it_took(tmp_path: Path) -> None:
    """RAM alone, and room for four chunks: the table has the tokens of what is held, no others."""
    async with harness(tmp_path, slots=4, store=MemoryStore(capacity_bytes=0)) as h:
        session = h.session()
        for seed in range(1, 30):
            store(h, session, [100 * seed + n for n in range(CHUNK_TOKENS)])
            tree = h.cache.overlaps.tree
            tree.check()
            nodes = session.branch.nodes
            assert len(tree) == sum(1 for node in nodes if node.held) <= 4
            assert await load(h, session, [100 * seed, 0]) == (0, 1)
        assert await load(h, session, [100, 0]) == (0, 0)


async def test_a_chunk_too_old_is_not_used(tmp_path: Path) -> None:
    async with harness(tmp_path, ttl_s=60.0) as h:
        session = h.session()
        store(h, session, STORED)
        h.clock_s[0] += 50.0
        assert await load(h, session, [1, 2, 30]) == (0, 2)
        h.clock_s[0] += 20.0
        assert await load(h, session, [1, 2, 30]) == (0, 0)


async def test_a_part_comes_from_disk(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        store(h, session, STORED)
        await h.write_behind.flush(10.0)
        h.only_on_disk()
        assert await load(h, session, [1, 2, 3, 4, 5, 6, 70]) == (1, 2)
        assert h.cache.placement.counters.load_disk_hits == 1
        assert h.cache.placement.counters.promoted_chunks == 2


async def test_a_part_that_is_corrupt_on_disk_does_not_come(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = store(h, session, STORED)
        await h.write_behind.flush(10.0)
        h.only_on_disk()
        h.store.outcomes[prefix[1]] = Outcome.CORRUPT
        asked, offered = prompt_of(session, [1, 2, 3, 4, 5, 6, 70])
        assert await ask(h, session, asked.keys, offered) == (1, None, LoadStop.CORRUPT)
        assert await load(h, session, [1, 2, 3, 4, 5, 6, 70]) == (1, 0)
        assert len(h.cache.overlaps.tree) == 1


async def test_of_equals_the_one_in_memory_is_used(tmp_path: Path) -> None:
    async with harness(tmp_path) as h:
        session = h.session()
        for last in (10, 20, 40, 50):
            store(h, session, [1, 2, 3, last])
        await h.write_behind.flush(10.0)
        h.only_on_disk()
        [present] = prompt_of(session, [1, 2, 3, 50])[0]
        assert await load(h, session, [1, 2, 3, 50]) == (1, 0)
        asked, offered = prompt_of(session, [1, 2, 3, 30])
        assert await ask(h, session, asked.keys, offered) == (0, (present, 3), LoadStop.MISS)


async def test_a_part_may_be_in_vram(tmp_path: Path) -> None:
    async with harness(tmp_path, device=HostDevice(memory_bytes=1 << 20)) as h:
        session = h.session(in_vram=True)
        store(h, session, STORED)
        assert await load(h, session, STORED) == (3, 0)
        await raised(h, 3)
        assert await load(h, session, [1, 2, 3, 4, 5, 6, 70]) == (1, 2)
        assert h.cache.placement.counters.load_vram_hits == 1
        assert h.cache.placement.counters.load_ram_hits == 3


# ── memory ──


async def test_tokens_come_back_when_they_are_offered_again(tmp_path: Path) -> None:
    """As after a restart: chunks are on disk, and nobody knows their tokens."""
    async with harness(tmp_path) as h:
        session = h.session()
        prefix = h.prefix(session, STORED)
        h.put(session, prefix)
        assert await load(h, session, [1, 2, 30]) == (0, 0)
        assert store(h, session, STORED) == prefix
        assert await load(h, session, [1, 2, 30]) == (0, 2)


async def test_what_was_used_least_recently_is_forgotten_first(tmp_path: Path) -> None:
    limits = Limits(token_bytes=2 * 500)
    async with harness(tmp_path, limits=limits) as h:
        session = h.session()
        store(h, session, [1, 2, 3, 4])
        store(h, session, [5, 6, 7, 8])
        assert await load(h, session, [1, 2]) == (0, 2)
        store(h, session, [9, 10, 11, 12])
        assert await load(h, session, [1, 2]) == (0, 2)
        assert await load(h, session, [5, 6]) == (0, 0)
        assert await load(h, session, [5, 6, 7, 8]) == (1, 0), "the chunk itself stays"


async def test_without_memory_for_tokens_there_are_no_parts(tmp_path: Path) -> None:
    async with harness(tmp_path, limits=Limits(token_bytes=0)) as h:
        session = h.session()
        store(h, session, STORED)
        assert h.cache.overlaps.max_token_bytes == 0
        assert await load(h, session, [1, 2, 30]) == (0, 0)


async def test_a_flood_stays_within_its_memory(tmp_path: Path) -> None:
    limits = Limits(token_bytes=20_000, session_lease_percent=100)
    async with harness(tmp_path, slots=1024, limits=limits) as h:
        session = h.session()
        for seed in range(60):
            prefix = h.chain_of(session, 16, seed)
            tokens = [seed * 100_000 + n for n in range(16 * CHUNK_TOKENS)]
            assert store(h, session, tokens) == prefix
            assert h.cache.overlaps.tree.used_bytes <= 20_000
        h.cache.overlaps.tree.check()
        assert len(h.cache.overlaps.tree) > 30
