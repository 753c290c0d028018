"""What is written to disk, when, and why."""

from pathlib import Path

import pytest

from kvtier.service.answers import ReserveOutcome
from kvtier.service.demotion import Demotion, When, Writing
from kvtier.service.history import Why
from kvtier.service.sessions import Session
from kvtier.spaces import Layout, Space
from kvtier.tiers.tree import TierId
from tests.core import CHUNK_TOKENS, Harness, harness, space

SETTLED_S = 60.0


async def written(h: Harness) -> int:
    """Chunks on disk once everything that was ordered is written."""
    assert await h.write_behind.flush(SETTLED_S)
    return h.placement.index.chunks[TierId.DISK]


def on_disk(h: Harness, session: Session, prompt: list[bytes]) -> list[bool]:
    nodes = session.branch.nodes
    return [key in nodes and nodes[key].ready(TierId.DISK) is not None for key in prompt]  # type: ignore[index]


async def test_write_through_writes_what_is_committed(tmp_path: Path) -> None:
    async with harness(tmp_path, writing=Writing(When.WRITE_THROUGH)) as h:
        session = h.session()
        h.put(session, h.chain_of(session, 3))
        assert await written(h) == 3
        assert h.placement.counters.disk_written_bytes_commit == 3 * 4096


async def test_demote_writes_what_ram_is_about_to_give_up(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=16, writing=Writing(When.DEMOTE)) as h:
        session = h.session()
        prompts = [h.chain_of(session, 4, seed=seed) for seed in range(8)]
        h.put(session, prompts[0])
        assert await written(h) == 0, "there is room in RAM"
        for prompt in prompts[1:]:
            h.put(session, prompt)
            await written(h)
        assert h.placement.counters.disk_written_bytes_demotion > 0
        for prompt in prompts:
            assert h.cache.lookup(session, prompt.keys)[0] == 4, "nothing was lost on the way"
        young = on_disk(h, session, list(prompts[-1].keys))
        assert not all(young), "the youngest is in RAM alone"


async def test_what_the_disk_is_still_to_have_goes_last(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=4, writing=Writing(When.DEMOTE)) as h:
        session = h.session()
        saved, unsaved = h.chain_of(session, 2, seed=1), h.chain_of(session, 2, seed=2)
        h.put(session, unsaved)
        h.put(session, saved)
        await written(h)
        h.store.gate.clear()  # from now on the disk writes nothing
        victims = set(h.placement.index.victims(session.branch.tenant, TierId.CPU, 1000.0))
        assert victims
        h.put(session, h.chain_of(session, 2, seed=3))
        held = [h.cache.lookup(session, prompt.keys)[0] for prompt in (saved, unsaved)]
        assert held == [2, 2]
        h.store.gate.set()


async def test_what_a_quota_costs_is_written_first(tmp_path: Path) -> None:
    quota = {TierId.GPU: 100, TierId.CPU: 25, TierId.DISK: 100}
    async with harness(tmp_path, 64, writing=Writing(When.DEMOTE), quota_percent=quota) as h:
        session = h.session()
        prompts = [h.chain_of(session, 4, seed=seed) for seed in range(12)]
        for prompt in prompts:
            h.put(session, prompt)
            await written(h)
        assert h.placement.index.chunks[TierId.CPU] == 16
        assert [h.cache.lookup(session, prompt.keys)[0] for prompt in prompts] == [4] * 12


async def test_what_the_one_who_stores_would_lose_is_written_ahead(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=64, writing=Writing(When.DEMOTE)) as h:
        quiet, loud = h.session(space(tenant="quiet")), h.session(space(tenant="loud"))
        for seed in range(16):  # more than is written ahead
            h.put(quiet, h.chain_of(quiet, 1, seed=seed))
        prompts = [h.chain_of(loud, 4, seed=seed) for seed in range(11)]
        for prompt in prompts:
            h.put(loud, prompt)
            await written(h)
        assert on_disk(h, loud, list(prompts[0].keys)) == [True] * 4
        quiet_ones = quiet.branch.nodes
        assert not any(node.in_disk for node in quiet_ones), "nobody takes their room"


async def test_a_slab_that_moves_to_another_layout_costs_nothing_unwritten(tmp_path: Path) -> None:
    wide = Space("wide", Layout("int8", 6, 2, 64, tokens=CHUNK_TOKENS, planes=2))
    async with harness(tmp_path, slots=256, writing=Writing(When.DEMOTE)) as h:
        narrow, other = h.session(), h.session(wide)
        start = list(range(16))  # what all prompts share is in one of the slabs
        for seed in range(62):
            h.put(narrow, h.prefix(narrow, start + [1000 * (seed + 1) + n for n in range(16)]))
            await written(h)
        held = sum(node.held for node in narrow.branch.nodes)
        prompt = h.chain_of(other, 4)
        answers = h.cache.reserve(other, 9999, prompt.keys, prompt.parent)
        assert all(answer.slot for answer in answers)
        h.cache.abort(other, 9999)
        assert sum(node.held for node in narrow.branch.nodes) == held


async def test_a_slab_is_not_emptied_in_vain(tmp_path: Path) -> None:
    """A client still reads a chunk of it that was removed: its slot cannot be had."""
    async with harness(tmp_path, slots=64) as h:
        session = h.session()
        read, kept = h.chain_of(session, 1, seed=1), h.chain_of(session, 1, seed=2)
        h.put(session, read)
        h.put(session, kept)
        assert await written(h) == 2
        _, _, lease = await h.get(session, read)
        [slab] = h.placement._residents
        h.placement.lose(session.branch.nodes[read.keys[0]], Why.REMOVED)
        assert not h.placement._empty_slab(slab, TierId.CPU, unsaved=True)
        assert h.cache.lookup(session, kept.keys) == (1, 1)
        session.leases.end(lease)
        assert h.placement._empty_slab(slab, TierId.CPU, unsaved=True)


async def test_second_touch_writes_what_is_asked_for_again(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=8, writing=Writing(When.SECOND_TOUCH)) as h:
        session = h.session()
        once, twice = h.chain_of(session, 2, seed=1), h.chain_of(session, 3, seed=2)
        h.put(session, once)
        h.put(session, twice)
        assert await written(h) == 0
        _, _, lease = await h.get(session, twice[:2])
        session.leases.end(lease)
        assert await written(h) == 2
        assert h.placement.counters.disk_written_bytes_second_touch == 2 * 4096
        for seed in range(3, 6):
            h.put(session, h.chain_of(session, 4, seed=seed))
        assert h.cache.lookup(session, once.keys) == (0, 0)
        assert h.cache.lookup(session, twice.keys) == (2, 0)


async def test_what_is_stored_again_is_written_with_all_that_it_continues(tmp_path: Path) -> None:
    """Its leading chunk was never lost, and nobody has asked for it."""
    async with harness(tmp_path, slots=8, writing=Writing(When.SECOND_TOUCH)) as h:
        session = h.session()
        prompt = h.chain_of(session, 2)
        h.put(session, prompt)
        lost = session.branch.nodes[prompt.keys[1]].in_cpu
        assert lost is not None
        h.placement.evict(lost)
        assert await written(h) == 0
        assert h.put(session, prompt) == [ReserveOutcome.EXISTS, ReserveOutcome.WRITE]
        assert await written(h) == 2


class Foreseeing:
    """Stands before a policy and knows the future."""

    def __init__(self, reuse: float) -> None:
        self.chance = reuse

    def reuse(self, entry: object, now_s: float) -> float:
        return self.chance


@pytest.mark.parametrize(("chance", "expected"), [(0.29, 0), (0.31, 2)])
async def test_reuse_writes_what_is_likely_enough(
    tmp_path: Path, chance: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness(tmp_path, slots=8, writing=Writing(When.REUSE, 0.3)) as h:
        session = h.session()
        policy = session.branch.tenant.policies[TierId.CPU]
        monkeypatch.setattr(type(policy), "reuse", Foreseeing(chance).reuse)
        h.put(session, h.chain_of(session, 2))
        demotion = Demotion(h.placement, Writing(When.REUSE, 0.3), h.write_behind)
        demotion.stopping()
        assert await written(h) == expected
        assert h.placement.counters.disk_written_bytes_stop == expected * 4096


async def test_a_stop_writes_what_only_ram_has(tmp_path: Path) -> None:
    async with harness(tmp_path, writing=Writing(When.DEMOTE)) as h:
        session = h.session()
        prompt = h.chain_of(session, 5)
        h.put(session, prompt)
        Demotion(h.placement, Writing(When.DEMOTE), h.write_behind).stopping()
        assert await written(h) == 5
        h.only_on_disk()
        assert (await h.get(session, prompt))[0] == 5


async def test_a_promoted_chunk_keeps_its_disk_copy(tmp_path: Path) -> None:
    async with harness(tmp_path, writing=Writing(When.DEMOTE)) as h:
        session = h.session()
        prompt = h.chain_of(session, 2)
        h.put(session, prompt)
        Demotion(h.placement, Writing(When.DEMOTE), h.write_behind).stopping()
        await written(h)
        h.only_on_disk()
        await h.get(session, prompt)
        assert h.cache.lookup(session, prompt.keys) == (2, 2)
        assert on_disk(h, session, list(prompt.keys)) == [True, True]
        transactions = len(h.store.transactions)
        h.only_on_disk()
        await written(h)
        assert len(h.store.transactions) == transactions, "it is not written again"


async def test_most_of_ram_is_not_written_ahead(tmp_path: Path) -> None:
    async with harness(tmp_path, slots=256, writing=Writing(When.DEMOTE)) as h:
        session = h.session()
        for seed in range(31):
            h.put(session, h.chain_of(session, 8, seed=seed))
            await written(h)
        assert 0 < await written(h) <= 256 // 4
