"""Chunks that RAM's policy would not keep and the disk's would."""

from pathlib import Path

import pytest

from kvtier.service.answers import ReserveOutcome
from kvtier.service.demotion import When, Writing
from kvtier.tiers.base import Coming
from kvtier.tiers.policies.lru import Lru
from kvtier.tiers.tree import Replica, TierId
from tests.core import Harness, harness
from tests.fakes import MemoryStore

WRITE, NOT_WORTH = ReserveOutcome.WRITE, ReserveOutcome.NOT_WORTH
SETTLED_S = 60.0


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> list[TierId]:
    """Tiers whose policy lets nothing in that something would have to go for."""
    refusing: list[TierId] = []

    def admits(policy: Lru[Replica], coming: Coming, over: Replica) -> bool:
        return over.tier not in refusing

    monkeypatch.setattr(Lru, "admits", admits)
    return refusing


async def on_disk(h: Harness) -> int:
    assert await h.write_behind.flush(SETTLED_S)
    return h.placement.index.chunks[TierId.DISK]


async def test_they_reach_the_disk_through_a_part_of_ram(
    tmp_path: Path, picky: list[TierId]
) -> None:
    async with harness(tmp_path, slots=32) as h:
        session = h.session()
        kept = h.chain_of(session, 32)
        h.put(session, kept)
        await on_disk(h)
        picky.append(TierId.CPU)
        for seed in range(1, 4):
            outcomes = h.put(session, h.chain_of(session, 6, seed=seed))
            assert outcomes[0] is (WRITE if seed == 1 else NOT_WORTH)
            if seed == 1:
                assert outcomes == [WRITE] * 4 + [NOT_WORTH] * 2, "an eighth of RAM"
        assert await on_disk(h) == 36
        assert h.cache.lookup(session, kept.keys)[1] == 28, "the rest of RAM stays"


@pytest.mark.parametrize("when", [When.DEMOTE, When.WRITE_THROUGH])
async def test_they_are_written_at_once_and_make_way_for_the_next(
    tmp_path: Path, picky: list[TierId], when: When
) -> None:
    async with harness(tmp_path, slots=32, writing=Writing(when)) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 32))
        await on_disk(h)
        picky.append(TierId.CPU)
        for seed in range(1, 6):
            prompt = h.chain_of(session, 6, seed=seed)
            assert h.put(session, prompt) == [WRITE] * 4 + [NOT_WORTH] * 2
            await on_disk(h)
            nodes = [session.branch.nodes[key] for key in prompt.keys[:4]]
            assert all(node.ready(TierId.DISK) for node in nodes)


async def test_they_land_again_once_those_before_have_gone(
    tmp_path: Path, picky: list[TierId]
) -> None:
    async with harness(tmp_path, slots=32) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 32))
        picky.append(TierId.CPU)
        for seed in range(1, 6):
            assert h.put(session, h.chain_of(session, 4, seed=seed)) == [WRITE] * 4
            await on_disk(h)
            h.only_on_disk()
            picky.clear()
            h.put(session, h.chain_of(session, 32, seed=100 + seed))
            picky.append(TierId.CPU)
            await on_disk(h)


@pytest.mark.parametrize("when", list(When))
async def test_they_land_again_once_the_disk_writes_again(
    tmp_path: Path, picky: list[TierId], when: When
) -> None:
    async with harness(tmp_path, slots=32, writing=Writing(when)) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 32))
        await on_disk(h)
        picky.append(TierId.CPU)
        prompts = [h.chain_of(session, 4, seed=seed) for seed in range(1, 4)]
        for prompt in prompts:
            h.store.refuse_writes = prompt is prompts[0]
            for _ in range(2):  # stored again, which the second touch wants
                h.put(session, prompt)
            await on_disk(h)
        nodes = [session.branch.nodes[key] for key in prompts[-1]]
        assert all(node.ready(TierId.DISK) for node in nodes)


async def test_nothing_lands_that_the_disk_does_not_keep(
    tmp_path: Path, picky: list[TierId]
) -> None:
    async with harness(tmp_path, slots=8, store=MemoryStore(capacity_bytes=8 * 4096)) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 8))
        assert await on_disk(h) == 8
        picky += [TierId.CPU, TierId.DISK]
        assert h.put(session, h.chain_of(session, 2, seed=1)) == [NOT_WORTH] * 2
        picky.remove(TierId.DISK)
        assert h.put(session, h.chain_of(session, 2, seed=1)) == [WRITE, NOT_WORTH]


async def test_what_is_not_known_does_not_land_where_the_second_touch_writes(
    tmp_path: Path, picky: list[TierId]
) -> None:
    async with harness(tmp_path, slots=32, writing=Writing(When.SECOND_TOUCH)) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 32))
        picky.append(TierId.CPU)
        prompt = h.chain_of(session, 2, seed=1)
        assert h.put(session, prompt) == [NOT_WORTH] * 2
        assert h.put(session, prompt) == [WRITE] * 2, "it was offered before"
        assert await on_disk(h) == 2
        assert h.placement.counters.disk_written_bytes_second_touch == 2 * 4096


@pytest.mark.parametrize("chance", [0.3, 0.7])
async def test_where_reuse_writes_only_what_is_likely_lands(
    tmp_path: Path, picky: list[TierId], monkeypatch: pytest.MonkeyPatch, chance: float
) -> None:
    monkeypatch.setattr(Lru, "likely", lambda policy, coming: chance)
    monkeypatch.setattr(Lru, "reuse", lambda policy, entry, now_s: chance)
    async with harness(tmp_path, slots=32, writing=Writing(When.REUSE, 0.5)) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 32))
        written = await on_disk(h)
        picky.append(TierId.CPU)
        found = h.put(session, h.chain_of(session, 2, seed=1))
        assert found == ([WRITE] * 2 if chance > 0.5 else [NOT_WORTH] * 2)
        assert await on_disk(h) == written + 2 * (chance > 0.5)


async def test_what_landed_and_is_not_likely_any_more_makes_way(
    tmp_path: Path, picky: list[TierId], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lru, "likely", lambda policy, coming: 0.7)
    monkeypatch.setattr(Lru, "reuse", lambda policy, entry, now_s: 0.3)
    async with harness(tmp_path, slots=32, writing=Writing(When.REUSE, 0.5)) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 32))
        picky.append(TierId.CPU)
        for seed in range(1, 6):
            assert h.put(session, h.chain_of(session, 4, seed=seed)) == [WRITE] * 4
        assert await on_disk(h) == 0
