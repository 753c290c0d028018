"""Curves of a service: off the way of answers, bounded, and one for each tenant."""

import random
from collections.abc import Callable
from functools import partial
from hashlib import sha256

import pytest

from kvtier.chunks import ChunkKey
from kvtier.tiers import curve_tenants
from kvtier.tiers.curve_family import sampled_family
from kvtier.tiers.curve_replay import Replay
from kvtier.tiers.curve_tenants import MOST_CHUNKS, MOST_TENANTS, Curves, Reading

MIB = 1 << 20


class Loop:
    """An event loop that runs what was deferred when it is told to."""

    def __init__(self) -> None:
        self.deferred: list[Callable[[], None]] = []

    def defer(self, call: Callable[[], None]) -> None:
        self.deferred.append(call)

    def turn(self) -> None:
        due, self.deferred = self.deferred, []
        for call in due:
            call()


def prompt(*words: object) -> list[ChunkKey]:
    keys, above = [], b""
    for word in words:
        above = sha256(above + repr(word).encode()).digest()
        keys.append(ChunkKey(above))
    return keys


def curves_on(loop: Loop, *, ram: int = 8 * MIB, disk: int = 64 * MIB) -> Curves:
    capacities = {"cpu": ram, "disk": ram + disk}
    return Curves(capacities, partial(sampled_family, "lru"), loop.defer)


def reading(curves: Curves, tenant: str | None, tier: str = "cpu") -> Reading:
    (found,) = [each for each in curves.read() if (each.tenant, each.tier) == (tenant, tier)]
    return found


def test_nothing_is_replayed_while_a_client_waits() -> None:
    loop = Loop()
    curves = curves_on(loop)
    for question in range(50):
        curves.asked("", MIB, prompt("system", question), float(question))
    assert reading(curves, None).requests == 0
    assert len(loop.deferred) == 1
    turns = 0
    while loop.deferred:
        loop.turn()
        turns += 1
    assert reading(curves, None).requests == 50
    assert turns > 5, "the work is not cut into pieces"


def test_work_starts_again_after_a_rest() -> None:
    loop = Loop()
    curves = curves_on(loop)
    for question in range(3):
        curves.asked("", MIB, prompt(question), 0.0)
        while loop.deferred:
            loop.turn()
    assert reading(curves, None).requests == 3


def test_a_mistake_of_a_policy_costs_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    curves = curves_on(loop)
    with monkeypatch.context() as broken:
        broken.setattr(Replay, "ask", lambda *request: 1 // 0)
        curves.asked("", MIB, prompt("broken"), 0.0)
        with pytest.raises(ZeroDivisionError):
            loop.turn()
    curves.asked("", MIB, prompt("right"), 1.0)
    while loop.deferred:
        loop.turn()
    assert reading(curves, None).requests == 2
    assert reading(curves, None).seen_bytes == MIB


def test_both_tiers_are_read_up_to_four_times_today() -> None:
    curves = curves_on(Loop(), ram=8 * MIB, disk=24 * MIB)
    ram, disk = reading(curves, None, "cpu"), reading(curves, None, "disk")
    assert (ram.capacity_bytes, disk.capacity_bytes) == (8 * MIB, 32 * MIB)
    for each in (ram, disk):
        shares = [point.capacity_bytes / each.capacity_bytes for point in each.points]
        assert shares == [1, 1.25, 1.5, 2, 4]


def test_more_ram_would_help_who_asks_for_more_than_there_is() -> None:
    """16 chunks in turn, and room for 8: LRU hits nothing below 16 and all but the first beyond."""
    curves = curves_on(Loop(), ram=8 * MIB)
    for question in range(160):
        curves.asked("", MIB, prompt(question % 16), float(question))
    curves.settle()
    ram = reading(curves, None)
    assert [point.hit_percent for point in ram.points] == [0, 0, 0, 90, 90]
    assert (ram.rate, ram.requests, ram.sampled_chunks) == (1, 160, 160)
    assert ram.seen_bytes == 16 * MIB


@pytest.mark.parametrize(("ram", "hits"), [(8, 99), (10, 198)])
def test_spaces_of_different_chunk_sizes_share_the_bytes(ram: int, hits: int) -> None:
    """6 MiB and 2 MiB that are asked for again and again, and 2 MiB that are always new: with 8 MiB
    those push the 6 out."""
    curves = curves_on(Loop(), ram=ram * MIB)
    for question in range(100):
        curves.asked("", 6 * MIB, prompt("large"), float(question))
        curves.asked("", 2 * MIB, prompt("small", question), float(question))
    curves.settle()
    assert reading(curves, None).points[0].hit_percent == pytest.approx(100 * hits / 300)


def test_a_single_tenant_has_the_curve_of_all() -> None:
    curves = curves_on(Loop())
    curves.asked("one", MIB, prompt(1), 0.0)
    curves.settle()
    assert {each.tenant for each in curves.read()} == {None}


def test_each_of_two_tenants_is_replayed_alone() -> None:
    curves = curves_on(Loop(), ram=8 * MIB)
    for question in range(400):
        curves.asked("loyal", MIB, prompt("same"), float(question))
        curves.asked("restless", MIB, prompt("new", question), float(question))
    curves.settle()
    loyal, restless = reading(curves, "loyal"), reading(curves, "restless")
    assert loyal.points[1].hit_percent > 99
    assert restless.points[1].hit_percent < 51  # "new" itself
    together = reading(curves, None).points[1].hit_percent
    assert restless.points[1].hit_percent < together < loyal.points[1].hit_percent


def test_tenants_beyond_the_limit_count_with_all_only() -> None:
    curves = curves_on(Loop())
    for tenant in range(MOST_TENANTS + 5):
        curves.asked(f"tenant {tenant}", MIB, prompt(tenant), 0.0)
    curves.settle()
    assert len({each.tenant for each in curves.read()}) == MOST_TENANTS + 1
    assert reading(curves, None).requests == MOST_TENANTS + 5


def test_a_queue_that_does_not_keep_up_is_emptied_and_the_rate_falls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curve_tenants, "_MOST_WAITING", 100)
    loop = Loop()
    curves = curves_on(loop)
    for question in range(60):
        curves.asked("", MIB, prompt("system", question), float(question))
    curves.settle()
    seen = reading(curves, None)
    assert seen.rate == 1 / 2
    assert seen.requests == 10


def test_a_large_cache_is_sampled_so_that_the_sample_stays_small() -> None:
    draw = random.Random(1)
    curves = Curves({"cpu": 16 << 30}, partial(sampled_family, "lru"), lambda call: None)
    for question in range(20_000):
        curves.asked("", MIB, prompt(draw.random(), 0, 0, 0, 0, 0, 0, 0), float(question))
        curves.settle()
    seen = reading(curves, None)
    assert seen.rate == MOST_CHUNKS / (64 << 10)
    assert seen.sampled_chunks == pytest.approx(20_000 * 8 * seen.rate, rel=0.1)
    assert seen.seen_bytes == pytest.approx(64 << 30, rel=0.01)
