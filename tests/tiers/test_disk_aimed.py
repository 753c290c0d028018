"""Damage aimed at one thing each: what the disk tier makes of it."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.spaces import Layout, Space
from kvtier.tiers.base import Outcome
from kvtier.tiers.disk_file import open_data_file
from kvtier.tiers.disk_format import PAGE_BYTES, StoredChunk, meta_key
from tests.contracts.store import job_of, pattern, read
from tests.tiers.disk_chunks import (
    CAPACITY,
    check,
    content,
    names,
    one_chunk,
    open_tier,
    outcome_of,
    packed,
    reopened,
    rewrite,
    stored,
)

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


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
    """Let the root of the `data` database say that it is the other kind of page."""
    file, _ = open_data_file(path, CAPACITY)
    with file.env.begin() as txn:
        root = txn.get(b"data")
    file.close()
    assert root is not None
    page = int.from_bytes(root[40:48], "little")
    assert page > 1
    with path.open("r+b") as data:
        data.seek(page * PAGE_BYTES + 10)
        flags = data.read(1)[0]
        data.seek(page * PAGE_BYTES + 10)
        data.write(bytes([flags ^ 0x03]))


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
