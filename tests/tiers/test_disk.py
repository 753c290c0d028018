"""The disk tier: what survives, what it refuses, and that it stays inside its capacity."""

import asyncio
import os
from pathlib import Path

import pytest

from kvtier.errors import AlreadyRunning, ConfigError
from kvtier.tiers import disk_file
from kvtier.tiers.base import Outcome, Store
from kvtier.tiers.disk_format import pack_number
from tests.contracts.store import SMALL, SPACE, StoreContract, job_of, read
from tests.tiers.disk_chunks import (
    CAPACITY,
    check,
    content,
    job,
    open_tier,
    reopened,
    rewrite,
    space_of,
    stored,
)

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


class TestVerbatim(StoreContract):
    async def open(self, directory: Path) -> Store:
        return open_tier(directory, 64 * MIB, "none")


class TestCompressed(StoreContract):
    async def open(self, directory: Path) -> Store:
        return open_tier(directory, 64 * MIB, "byteplane")


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
