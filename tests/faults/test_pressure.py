"""Too much of everything: room is made or refused, in words, and what is there stays right."""

import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvtier
from kvtier.client import Client
from tests.sidecar import HANG_S, Sidecar, content_of, load, offload, prompt_of, space_of

SPACE = space_of()
NBYTES = SPACE.layout.nbytes
SLOTS = (16 << 20) // NBYTES
NO_ROOM = "no room: everything else is leased"


@pytest.fixture
def client() -> Iterator[Client]:
    """A client with 4096 slots to itself, and no disk."""
    with kvtier.open(SPACE, cpu="16MiB", deadline_s=HANG_S) as opened:
        yield opened


def leases(client: Client) -> int:
    stats = client.stats()
    assert stats is not None
    return stats.leases


# ── More than there is room for ──


def test_a_burst_of_twice_the_capacity_leaves_the_newest_whole(client: Client) -> None:
    prompts = [client.prefix(prompt_of(seed, 128)) for seed in range(2 * SLOTS // 128)]
    for prefix in prompts:
        outcome = offload(client, prefix)
        assert outcome.stored == list(range(128))
        assert outcome.refused == {}
    newest = prompts[-SLOTS // 128 + 1 :]
    assert [load(client, prefix) for prefix in newest] == [128] * len(newest)
    assert sum(load(client, prefix) for prefix in prompts) <= SLOTS
    stats = client.stats()
    assert stats is not None
    assert stats.tiers[0].used_bytes <= stats.tiers[0].capacity_bytes


def test_a_prompt_of_twice_the_capacity_keeps_its_beginning(client: Client) -> None:
    prefix = client.prefix(prompt_of(1, 2 * SLOTS))
    outcome = offload(client, prefix)
    assert outcome.stored == list(range(SLOTS))
    assert set(outcome.refused) == set(range(SLOTS, 2 * SLOTS))
    assert outcome.refused[SLOTS] == NO_ROOM
    assert set(outcome.refused.values()) <= {NO_ROOM, "the chunk before it is not held"}
    assert load(client, prefix) == SLOTS
    assert len(offload(client, client.prefix(prompt_of(2, 10))).stored) == 10


def test_an_arena_full_of_readers_refuses_and_hangs_nobody(client: Client) -> None:
    held = client.prefix(prompt_of(1, SLOTS))
    offload(client, held)
    fresh = client.prefix(prompt_of(2, 10))
    with client.load(held) as loaded:
        assert len(list(loaded)) == SLOTS
        outcome = offload(client, fresh)
        assert outcome.stored == []
        assert outcome.refused[0] == NO_ROOM
        assert set(outcome.refused) == set(range(10))
        assert load(client, fresh) == 0
        assert load(client, held) == SLOTS
    assert offload(client, fresh).stored == list(range(10))
    assert load(client, fresh) == 10
    assert leases(client) == 0


def test_an_arena_full_of_writers_refuses_and_hangs_nobody(client: Client) -> None:
    mine, more = client.prefix(prompt_of(1, SLOTS)), client.prefix(prompt_of(2, 10))
    half = SLOTS // 2  # what one session may reserve
    with client.offload(mine) as wanted:
        slots = iter(wanted)
        next(slots)
        outcome = offload(client, more)
        assert outcome.stored == []
        assert outcome.refused[0] == "this session has reserved all it may"
        written = 1 + sum(1 for _ in zip(range(half - 1), slots, strict=False))
    assert written == half
    assert len(wanted.outcome.stored) + len(wanted.outcome.refused) == SLOTS
    assert offload(client, more).stored == list(range(10))
    assert leases(client) == 0


@pytest.mark.slow
def test_a_disk_hit_finds_no_room(tmp_path: Path) -> None:
    """The arena is full of leased slots, and the chunk is on disk only: fewer chunks, no wait."""
    with Sidecar(tmp_path) as sidecar:
        client = sidecar.client()
        on_disk = client.prefix(prompt_of(1, 100))
        offload(client, on_disk)
        sidecar.until_idle()
        assert sidecar.terminate() == 0
        sidecar.start()
        assert client.wait_ready(HANG_S)
        filling = client.prefix(prompt_of(2, SLOTS - 50))
        offload(client, filling)
        with client.load(filling) as loaded:
            assert len(list(loaded)) == SLOTS - 50
            assert load(client, on_disk) == 50
            assert client.lookup(on_disk) == 100
        assert load(client, on_disk) == 100


# ── Two at once ──


@pytest.mark.parametrize("path", ["shm", "inline"])
def test_of_two_that_store_the_same_one_writes_and_both_read(tmp_path: Path, path: str) -> None:
    with Sidecar(tmp_path, disk=False) as sidecar:
        clients = [sidecar.client(path=path), sidecar.client()]
        start = threading.Barrier(2)

        def store(client: Client) -> list[int]:
            start.wait(HANG_S)
            outcomes = [offload(client, client.prefix(prompt_of(n, 20))) for n in range(50)]
            assert all(
                reason in ("another client is writing it", "the chunk before it is not held")
                for outcome in outcomes
                for reason in outcome.refused.values()
            )
            return [len(outcome.stored) for outcome in outcomes]

        with ThreadPoolExecutor(2) as pool:
            stored = list(pool.map(store, clients))
        stats = sidecar.stats()
        assert sum(map(sum, stored)) == stats.counters["committed_chunks"] == stats.tiers[0].chunks
        for client in clients:
            assert [load(client, client.prefix(prompt_of(n, 20))) for n in range(50)] == [20] * 50


@pytest.mark.slow
def test_many_readers_of_what_one_promotion_brings(tmp_path: Path) -> None:
    with Sidecar(tmp_path) as sidecar:
        client = sidecar.client()
        prefix = client.prefix(prompt_of(1, 500))
        offload(client, prefix)
        assert sidecar.terminate() == 0
        sidecar.start()
        readers = [sidecar.client(path=path) for path in ("shm", "shm", "inline", "inline")]
        start = threading.Barrier(len(readers))

        def read(reader: Client) -> int:
            start.wait(HANG_S)
            return load(reader, prefix)

        with ThreadPoolExecutor(len(readers)) as pool:
            assert list(pool.map(read, readers)) == [500] * len(readers)
        stats = sidecar.until(lambda stats: stats.leases == 0, "no leases")
        assert stats.counters["promoted_chunks"] == 500


# ── The disk ──


@pytest.mark.slow
def test_the_disk_stays_inside_its_capacity(tmp_path: Path) -> None:
    capacity = 16 << 20
    with Sidecar(
        tmp_path,
        f"disk.capacity={capacity}",
        "disk.compression=none",
        "cpu.capacity=64MiB",
        "eviction.policy=lru",  # it finds the newest
    ) as sidecar:
        client = sidecar.client()
        for seed in range(40):
            offload(client, client.prefix(prompt_of(seed, 256)))
            sidecar.until_idle()
            files = sum(path.stat().st_size for path in sidecar.disk.iterdir())
            assert files <= capacity
        stats = sidecar.stats()
        assert stats.counters["evicted_disk"] > 0
        assert 0 < stats.tiers[1].used_bytes <= stats.tiers[1].capacity_bytes <= capacity
        assert sidecar.terminate() == 0
        sidecar.start()
        assert client.wait_ready(HANG_S)
        found = [load(client, client.prefix(prompt_of(seed, 256))) for seed in range(40)]
        assert found[-1] == 256
        assert sum(found) > 1000


@pytest.fixture
def small_medium(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_the_disk_tier_only(tmp_path: Path, small_medium: Path) -> None:
    """Its capacity says that there is room, the medium says that there is not."""
    disk = f"disk.directory={small_medium / 'disk'}"
    with Sidecar(tmp_path / "s", disk, "disk.compression=none") as sidecar:
        client = sidecar.client()
        prompts = [client.prefix(prompt_of(seed, 128)) for seed in range(24)]
        for prefix in prompts:
            assert offload(client, prefix).stored == list(range(128))
            assert load(client, prefix) == 128
        stats = sidecar.until_idle()
        assert stats.counters["disk_written_chunks"] > 0
        assert stats.counters["disk_skipped_chunks"] > 0
        assert [load(client, prefix) for prefix in prompts] == [128] * 24
        sidecar.kill()  # nothing more could be written
        sidecar.start()
        assert client.wait_ready(HANG_S)
        assert sum(load(client, prefix) for prefix in prompts) > 0


def test_a_medium_that_fills_up_from_outside(tmp_path: Path, small_medium: Path) -> None:
    disk = f"disk.directory={small_medium / 'disk'}"
    with Sidecar(tmp_path / "s", disk, "disk.compression=none") as sidecar:
        client = sidecar.client()
        first, second, third = (client.prefix(prompt_of(seed, 100)) for seed in range(3))
        offload(client, first)
        sidecar.until_idle()
        hog = small_medium / "hog"
        with hog.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(small_medium).f_bavail * 4096)
        offload(client, second)
        sidecar.until(lambda s: s.counters["disk_skipped_chunks"] > 0, "a write has failed")
        assert load(client, second) == 100
        hog.unlink()
        offload(client, third)
        sidecar.until(lambda s: s.counters["disk_written_chunks"] >= 200, "writes work again")
        with client.load(third) as loaded:
            assert [bytes(c.data) == content_of(third[c.index], NBYTES) for c in loaded] == [
                True
            ] * 100
