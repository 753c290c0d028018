"""What one request brings to a tier is one arrival to its policy, as far as it is one prefix."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvtier.chunks import Prefix
from kvtier.kernels.host import HostDevice
from kvtier.service.answers import LoadStop
from kvtier.service.batch import Batch
from kvtier.service.sessions import Session
from kvtier.tiers.tree import Node, TierId
from tests.core import harness
from tests.loops import turn
from tests.service.test_prefetch import on_disk, settle


def nodes_of(session: Session, prefix: Prefix) -> list[Node]:
    return [session.branch.nodes[key] for key in prefix]


@pytest.fixture
def arrivals_at(monkeypatch: pytest.MonkeyPatch) -> "Callable[[Session, TierId], list[int]]":
    """Notes of how many chunks each arrival to a tier's policy is, from now on."""

    def watch(session: Session, tier: TierId) -> list[int]:
        policy = session.branch.tenant.policies[tier]
        arrival = policy.arrival
        noted: list[int] = []

        def noting(above: Any, keys: Sequence[Any], *rest: Any) -> Any:
            noted.append(len(keys))
            return arrival(above, keys, *rest)

        monkeypatch.setattr(policy, "arrival", noting)
        return noted

    return watch


Watch = Callable[[Session, TierId], list[int]]


async def test_a_load_is_one_arrival(tmp_path: Path, arrivals_at: Watch) -> None:
    async with harness(tmp_path, policy="gix") as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 9)
        noted = arrivals_at(session, TierId.CPU)
        came, stop, _ = await h.get(session, prefix)
        assert (came, stop) == (9, LoadStop.COMPLETE)
        assert noted == [9]


async def test_a_prefetch_is_one_arrival(tmp_path: Path, arrivals_at: Watch) -> None:
    async with harness(tmp_path, policy="gix") as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 9)
        noted = arrivals_at(session, TierId.CPU)
        assert await h.cache.prefetch(session, prefix.keys) == (0, 9)
        await settle(h)
        assert noted == [9]
        assert h.cache.lookup(session, prefix.keys) == (9, 9)


async def test_what_is_raised_is_one_arrival(tmp_path: Path, arrivals_at: Watch) -> None:
    async with harness(tmp_path, device=HostDevice(memory_bytes=1 << 20)) as h:
        session = h.session(in_vram=True)
        prefix = h.chain_of(session, 4)
        h.put(session, prefix)
        noted = arrivals_at(session, TierId.GPU)
        _, _, lease = await h.get(session, prefix)
        h.cache.release(session, lease.id)
        assert noted == [4]
        while not h.raisings_idle():
            await turn()


async def test_what_the_tier_has_parts_arrivals(tmp_path: Path, arrivals_at: Watch) -> None:
    """As does what is no continuation of the chunk before it."""
    async with harness(tmp_path, policy="gix") as h:
        session = h.session()
        one, other = await on_disk(h, session, 6, 2)
        _, _, lease = await h.get(session, one[:2])
        h.cache.release(session, lease.id)
        noted = arrivals_at(session, TierId.CPU)
        nodes = [*nodes_of(session, one), *nodes_of(session, other)]
        batch = Batch(h.placement, TierId.CPU, nodes)
        comings = [batch.coming(index) for index in range(2, 8)]
        assert noted == [4, 2]
        assert [coming.place for coming in comings] == [0, 1, 2, 3, 0, 1]
        assert len({id(coming.arrival) for coming in comings}) == 2


@pytest.mark.parametrize("policy", ["gix", "gix-lite", "lru", "arc", "s3fifo"])
async def test_a_run_with_gaps_is_loaded_whole(tmp_path: Path, policy: str) -> None:
    """Some chunks of it are in RAM, and one more lands before it is begun."""
    async with harness(tmp_path, policy=policy) as h:
        session = h.session()
        (prefix,) = await on_disk(h, session, 9)
        for first, last in ((0, 2), (4, 5), (7, 8)):
            _, _, lease = await h.get(session, prefix[first:last])
            h.cache.release(session, lease.id)
        came, stop, lease = await h.get(session, prefix)
        assert (came, stop) == (9, LoadStop.COMPLETE)
        h.cache.release(session, lease.id)
        h.only_on_disk()
        assert h.placement.memory.arena.used_bytes == 0
