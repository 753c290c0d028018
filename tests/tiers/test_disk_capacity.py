"""The disk tier stays inside its capacity, and goes on when it or the disk is full."""

import contextlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.tiers.base import Outcome, Record, StoreJob
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk_format import StoredChunk, meta_key
from tests.contracts.store import job_of, pattern, read
from tests.tiers.disk_chunks import check, names, open_tier, reopened, stored

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("oldest_first", [True, False])
@pytest.mark.parametrize(
    ("capacity", "least", "most", "batch"),
    [
        (16 * MIB, 5_898_240, 5_898_240, 1),
        (64 * MIB, 5_898_240, 5_898_240, 2),
        (96 * MIB, 3_700_000, 4_100_000, 8),
        (64 * MIB, 1_000, 1_000_000, 20),
    ],
)
async def test_a_full_tier_goes_on_taking_chunks(
    tmp_path: Path, capacity: int, least: int, most: int, batch: int, oldest_first: bool
) -> None:
    """As a cache lives: always full, always replacing. Not one write may find no room."""
    rng = random.Random(capacity + most)
    blob = memoryview(rng.randbytes(most))
    tier = open_tier(tmp_path, capacity, "none")
    live: list[Record] = []
    written = 0
    while written < 12 * capacity:
        jobs = [job_of(0, b"") for _ in range(batch)]
        jobs = [StoreJob(job.meta, blob[: rng.randint(least, most)]) for job in jobs]
        worst = sum(tier.worst_bytes(job.source.nbytes) for job in jobs)
        while tier.used_bytes + worst > tier.capacity_bytes:
            tier.delete(live.pop(0 if oldest_first else rng.randrange(len(live))))
        records = await tier.store(jobs)
        assert None not in records
        live += [record for record in records if record]
        written += sum(job.source.nbytes for job in jobs)
    target = bytearray(most)
    for record in live:
        assert await tier.load(record, memoryview(target)[: nbytes_of(tmp_path, tier, record)]) is (
            Outcome.HIT
        )
    assert (tmp_path / "data.mdb").stat().st_size <= capacity
    assert tier.failed_writes == 0
    await tier.close()


def nbytes_of(directory: Path, tier: DiskTier, record: Record) -> int:
    with tier._file.env.begin(db=tier._file.meta) as txn:
        return StoredChunk.unpack(record.id, txn.get(meta_key(record.id)) or b"").header.nbytes


async def test_more_than_fits_is_not_written_and_the_rest_stays(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 16 * MIB, "none")
    first = [record for record in await tier.store([job_of(0, pattern(0))] * 30) if record]
    assert len(first) == 30
    assert await tier.store([job_of(1, pattern(1))] * 20) == [None] * 20
    assert tier.failed_writes == 20
    assert tier.used_bytes == sum(record.stored_bytes for record in first)
    tier.delete(first[0])
    [record] = await tier.store([job_of(2, pattern(2))])
    assert record is not None
    assert await read(tier, first[1], len(pattern(0))) == (Outcome.HIT, pattern(0))
    assert await read(tier, record, len(pattern(2))) == (Outcome.HIT, pattern(2))
    await tier.close()


async def test_a_smaller_capacity_keeps_what_fits_with_its_ancestors(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 64 * MIB)
    await stored(tier, range(100))
    [*_] = tier.records()
    tier = await reopened(tier, tmp_path, 8 * MIB)
    left = {int.from_bytes(record.key, "big") for record in tier.records()}
    assert 10 < len(left) < 100
    assert all(number == 0 or number - 1 in left for number in left)
    assert tier.used_bytes <= tier.capacity_bytes
    assert (tmp_path / "data.mdb").stat().st_size <= 8 * MIB
    assert set((await check(tier)).values()) == {Outcome.HIT}
    await stored(tier, range(200, 202))
    tier = await reopened(tier, tmp_path, 64 * MIB)
    assert len(tier.records()) == len(left) + 2
    assert names(tmp_path, "*") == ["LOCK", "data.mdb", "data.mdb-lock"]
    await tier.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_a_full_disk_is_a_skipped_offload(small_disk: Path) -> None:
    tier = open_tier(small_disk, 256 * MIB, "none")
    kept: list[Record] = []
    while None not in (records := await tier.store([job_of(len(kept), pattern(len(kept)))])):
        kept += [record for record in records if record]
    assert tier.failed_writes == 1
    assert len(kept) > 2
    for number, record in enumerate(kept):
        assert await read(tier, record, len(pattern(0))) == (Outcome.HIT, pattern(number))
    tier.delete(kept.pop(0))
    await tier.flush()
    assert None not in await tier.store([job_of(90, pattern(90))])
    await tier.close()
    fill(small_disk / "filler")
    tier = open_tier(small_disk, 256 * MIB, "none")
    assert len(tier.records()) == len(kept) + 1
    assert await read(tier, kept[0], len(pattern(1))) == (Outcome.HIT, pattern(1))
    await tier.close()
