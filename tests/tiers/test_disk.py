"""The disk tier: what survives, what it refuses, and that it stays inside its capacity."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from kvtier.errors import AlreadyRunning, ConfigError
from kvtier.spaces import Layout, Space
from kvtier.tiers import disk_file
from kvtier.tiers.base import Outcome, Record, Store, StoreJob
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk_file import open_data_file
from kvtier.tiers.disk_format import PAGE_BYTES, StoredChunk, meta_key, pack_number
from tests.contracts.store import SMALL, SPACE, StoreContract, job_of, pattern, read
from tests.tiers.disk_chunks import CAPACITY, check, content, job, open_tier, space_of

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


class TestVerbatim(StoreContract):
    async def open(self, directory: Path) -> Store:
        return open_tier(directory, 64 * MIB, "none")


class TestCompressed(StoreContract):
    async def open(self, directory: Path) -> Store:
        return open_tier(directory, 64 * MIB, "byteplane")


async def stored(tier: DiskTier, numbers: range) -> list[Record]:
    records = await tier.store([job(number) for number in numbers])
    kept = [record for record in records if record is not None]
    assert len(kept) == len(numbers)
    return kept


async def reopened(tier: DiskTier, directory: Path, capacity: int = CAPACITY) -> DiskTier:
    await tier.close()
    return open_tier(directory, capacity)


async def outcome_of(tier: DiskTier, number: int) -> Outcome:
    outcomes = await check(tier)
    return outcomes.get(number, Outcome.MISS)


# ── What survives ──


@pytest.mark.parametrize("codec", ["none", "byteplane"])
async def test_everything_is_back_after_a_restart(tmp_path: Path, codec: str) -> None:
    tier = open_tier(tmp_path, CAPACITY, codec)
    records = await stored(tier, range(25))
    for record in records[::3]:
        tier.delete(record)
    await tier.close()
    tier = open_tier(tmp_path, CAPACITY, codec)
    left = [record for index, record in enumerate(records) if index % 3]
    assert tier.records() == left
    assert tier.used_bytes == sum(record.stored_bytes for record in left)
    assert set(tier.spaces()) == {space_of(number).digest for number in range(25)}
    assert set((await check(tier)).values()) == {Outcome.HIT}
    await tier.close()


async def test_either_codec_reads_what_the_other_wrote(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, CAPACITY, "byteplane")
    await stored(tier, range(10))
    await tier.close()
    tier = open_tier(tmp_path, CAPACITY, "none")
    await stored(tier, range(10, 20))
    assert list((await check(tier)).values()) == [Outcome.HIT] * 20
    await tier.close()


async def test_compression_saves_space_and_noise_is_kept_as_it_is(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    await stored(tier, range(9, 10))
    assert tier.logical_bytes == len(content(9))
    assert tier.stored_bytes < 0.75 * tier.logical_bytes
    noise = os.urandom(SPACE.layout.nbytes)
    [record] = await tier.store([job_of(0, noise)])
    assert record is not None
    assert await read(tier, record, len(noise)) == (Outcome.HIT, noise)
    assert record.stored_bytes < 1.02 * len(noise)
    await tier.close()


async def test_ids_go_on_after_a_restart(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    records = await stored(tier, range(3))
    for record in records:
        tier.delete(record)
    tier = await reopened(tier, tmp_path)
    [record] = await stored(tier, range(1))
    assert record.id > max(each.id for each in records)
    await tier.close()


async def test_a_hundred_thousand_chunks_are_found_again(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 1 << 30, "none")
    for start in range(0, 100_000, 20_000):
        numbers = range(start, start + 20_000)
        assert all(await tier.store([job_of(number, b"kv", SMALL) for number in numbers]))
    tier = await reopened(tier, tmp_path, 1 << 30)
    found = tier.records()
    assert [record.key for record in found] == [
        job_of(number, b"", SMALL).meta.key for number in range(100_000)
    ]
    assert tier.spaces() == {SMALL.digest: SMALL}
    assert tier.used_bytes == sum(record.stored_bytes for record in found)
    await tier.close()


async def test_a_cancelled_store_leaves_nothing_that_nobody_knows(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    storing = asyncio.create_task(tier.store([job(number) for number in range(20)]))
    await asyncio.sleep(0)
    storing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await storing
    assert tier.records() == []
    assert tier.used_bytes == 0
    tier = await reopened(tier, tmp_path)
    assert tier.records() == []
    await tier.close()


async def test_a_cancelled_load_writes_nothing_afterwards(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    records = await stored(tier, range(9, 100, 10))
    targets = [bytearray(len(content(9))) for _ in records]
    loads = [
        asyncio.create_task(tier.load(record, memoryview(target)))
        for record, target in zip(records, targets, strict=True)
    ]
    await asyncio.sleep(0)
    for load in loads:
        load.cancel()
    await asyncio.gather(*loads, return_exceptions=True)
    before = [bytes(target) for target in targets]
    await tier.close()
    assert [bytes(target) for target in targets] == before


async def test_a_closed_tier_refuses_politely(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    [record] = await stored(tier, range(1))
    await tier.close()
    assert await tier.load(record, memoryview(bytearray(1))) is Outcome.FAILED
    assert await tier.store([job(1)]) == [None]
    await tier.flush()


# ── Whose directory it is ──


async def test_a_second_service_is_refused(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    with pytest.raises(AlreadyRunning, match=f"{tmp_path} .* pid {os.getpid()}"):
        open_tier(tmp_path)
    tier = await reopened(tier, tmp_path)
    await tier.close()


async def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "deep" / "disk")
    await stored(tier, range(3))
    assert (tmp_path / "deep" / "disk").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "deep" / "disk").iterdir()} == {
        0o600
    }
    await tier.close()


async def test_another_format_version_is_refused_and_kept(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    await stored(tier, range(3))
    await tier.close()
    rewrite(tmp_path, "head", disk_file.VERSION_KEY, pack_number(7))
    before = (tmp_path / "data.mdb").read_bytes()
    for _ in range(8):
        with pytest.raises(ConfigError, match="version 7"):
            open_tier(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == before


def test_a_capacity_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"disk\.capacity"):
        open_tier(tmp_path, MIB)


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("mine")
    with pytest.raises(ConfigError, match=r"disk\.directory"):
        open_tier(tmp_path / "disk")


# ── Damage, aimed ──


def names(directory: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in directory.glob(pattern))


def rewrite(directory: Path, database: str, key: bytes, value: bytes) -> None:
    """Put a value into a closed tier's file."""
    with lmdb.open(str(directory / "data.mdb"), subdir=False, max_dbs=4, map_size=CAPACITY) as env:
        db = env.open_db(database.encode())
        with env.begin(write=True, db=db) as txn:
            txn.put(key, value)


def packed(directory: Path, chunk_id: int) -> bytes:
    file, _ = open_data_file(directory / "data.mdb", CAPACITY)
    with file.env.begin(db=file.meta) as txn:
        value = txn.get(meta_key(chunk_id))
    file.close()
    return bytes(value or b"")


async def one_chunk(directory: Path, number: int) -> Record:
    tier = open_tier(directory)
    [record] = await stored(tier, range(number, number + 1))
    await tier.close()
    return record


@pytest.mark.parametrize("number", [1, 9])
async def test_a_flipped_bit_of_the_bytes_is_corrupt(tmp_path: Path, number: int) -> None:
    record = await one_chunk(tmp_path, number)
    extent = StoredChunk.unpack(record.id, packed(tmp_path, record.id)).extents[-1]
    assert extent.page
    offset = extent.page * PAGE_BYTES + 16 + extent.nbytes - 1
    with (tmp_path / "data.mdb").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    tier = open_tier(tmp_path)
    assert await outcome_of(tier, number) is Outcome.CORRUPT
    assert tier.corrupt_reads == 1
    assert tier.records() == [record]  # deleting it is the caller's
    tier.delete(record)
    tier = await reopened(tier, tmp_path)
    assert tier.records() == []
    await tier.close()


@pytest.mark.parametrize("codec", ["none", "byteplane"])
@pytest.mark.parametrize("page", [0, 3, CAPACITY // PAGE_BYTES - 1, 1 << 60])
async def test_a_wrong_place_costs_a_detour_only(tmp_path: Path, codec: str, page: int) -> None:
    tier = open_tier(tmp_path, CAPACITY, codec)
    big = Space("model", Layout(dtype="bfloat16", layers=4, heads=9, head_dim=64, tokens=512))
    source = pattern(1, big)
    [record] = await tier.store([job_of(1, source, big)])
    await tier.close()
    assert record is not None
    chunk = StoredChunk.unpack(record.id, packed(tmp_path, record.id))
    assert all(extent.page for extent in chunk.extents)
    extents = tuple(extent._replace(page=page) for extent in chunk.extents)
    moved = StoredChunk(chunk.header, extents, chunk.blocks)
    rewrite(tmp_path, "meta", meta_key(record.id), moved.pack(record.id))
    tier = open_tier(tmp_path)
    assert await read(tier, record, len(source)) == (Outcome.HIT, source)
    await tier.close()


async def test_damaged_metadata_is_dropped_with_its_bytes(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    records = await stored(tier, range(12))
    await tier.close()
    rng = random.Random(1)
    for record in records[4:9]:
        value = bytearray(packed(tmp_path, record.id))
        value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
        rewrite(tmp_path, "meta", meta_key(record.id), bytes(value))
    rewrite(tmp_path, "meta", b"what is this", b"nonsense")
    tier = open_tier(tmp_path)
    assert tier.records() == records[:4] + records[9:]
    assert set((await check(tier)).values()) == {Outcome.HIT}
    await tier.close()
    file, found = open_data_file(tmp_path / "data.mdb", CAPACITY)
    with file.env.begin() as txn:
        assert txn.stat(db=file.data)["entries"] == found.extents
        assert txn.stat(db=file.meta)["entries"] == len(found.records)
    file.close()


async def test_a_record_under_another_id_is_not_believed(tmp_path: Path) -> None:
    record = await one_chunk(tmp_path, 9)
    rewrite(tmp_path, "meta", meta_key(record.id + 1), packed(tmp_path, record.id))
    tier = open_tier(tmp_path)
    assert [each.id for each in tier.records()] == [record.id]
    await tier.close()


async def test_a_target_of_another_size_is_never_filled(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    [record] = await stored(tier, range(9, 10))
    target = bytearray(len(content(9)) - 2)
    assert await tier.load(record, memoryview(target)) is Outcome.CORRUPT
    await tier.close()


@pytest.mark.parametrize("garbage", [b"not a database" * 4096, b"x", b"\0" * 100_000])
async def test_garbage_is_moved_aside(tmp_path: Path, garbage: bytes) -> None:
    for count in (1, 2):
        (tmp_path / "data.mdb").write_bytes(garbage)
        tier = open_tier(tmp_path)
        assert tier.records() == []
        await stored(tier, range(3))
        tier = await reopened(tier, tmp_path)
        assert len(tier.records()) == 3
        await tier.close()
        aside = names(tmp_path, "data.mdb.damaged-*")
        assert aside == [f"data.mdb.damaged-{count}"]
        assert (tmp_path / aside[0]).read_bytes()[:1] == garbage[:1]


DIE = """
import os, sys, pathlib
from kvtier.tiers.disk_directory import OwnedDirectory
with getattr(OwnedDirectory.take(pathlib.Path(sys.argv[1])), sys.argv[2])():
    os.abort()
"""


def die(directory: Path, moment: str) -> None:
    """Run a process that dies at that moment."""
    command = [sys.executable, "-c", DIE, str(directory), moment]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGABRT


@pytest.mark.parametrize(("deaths", "kept"), [(1, True), (2, True), (7, True), (8, False)])
async def test_a_sound_file_is_kept_until_too_many_have_died(
    tmp_path: Path, deaths: int, kept: bool
) -> None:
    record = await one_chunk(tmp_path, 1)
    for count in range(deaths):
        die(tmp_path, "writing" if count % 2 else "opening")
    tier = open_tier(tmp_path)
    assert tier.records() == [record] * kept
    assert len(names(tmp_path, "data.mdb.damaged-*")) == 1 - kept
    await tier.close()


async def test_damage_that_kills_is_looked_for_after_two_deaths(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    records = await stored(tier, range(50))
    await tier.close()
    spoil_the_tree_of_extents(tmp_path / "data.mdb")
    die(tmp_path, "writing")
    tier = open_tier(tmp_path)
    assert tier.records() == records
    await tier.close()
    die(tmp_path, "writing")
    die(tmp_path, "writing")
    tier = open_tier(tmp_path)
    assert tier.records() == []
    assert names(tmp_path, "data.mdb.damaged-*") == ["data.mdb.damaged-1"]
    await tier.close()


def spoil_the_tree_of_extents(path: Path) -> None:
    """Make a leaf of the `data` database point to itself."""
    file, _ = open_data_file(path, CAPACITY)
    with file.env.begin() as txn:
        root = txn.get(b"data")
    file.close()
    assert root is not None
    page = int.from_bytes(root[40:48], "little")
    assert page > 1
    with path.open("r+b") as data:
        data.seek(page * PAGE_BYTES + 10)
        data.write(bytes([0x01]))  # a branch, it says


async def test_a_process_that_writes_now_and_then_may_die_often(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    for count in range(1, 12):
        await stored(tier, range(1))
        await tier.close()
        die(tmp_path, "writing")
        tier = open_tier(tmp_path)
        assert len(tier.records()) == count
    await tier.close()


async def test_a_process_that_only_reads_may_die_as_often_as_it_likes(tmp_path: Path) -> None:
    record = await one_chunk(tmp_path, 1)
    for _ in range(10):
        tier = open_tier(tmp_path)
        assert tier.records() == [record]
        tier._release()  # nothing is said of a good end


# ── Capacity ──


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
