"""Reads of what is not in the page cache, which go past it."""

import os
from pathlib import Path

import pytest

from kvtier.kernels.page_cache import Residency
from kvtier.tiers.base import Outcome
from kvtier.tiers.disk_file import DATA_FILE
from tests.tiers.disk_chunks import check, content, open_tier, stored


def forgotten(path: Path) -> bool:
    """Ask the system to forget a file; whether it forgot some of it."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        residency = Residency(fd)
        cold = not residency.cached(0, os.fstat(fd).st_size)
        residency.close()
        return cold
    finally:
        os.close(fd)


@pytest.mark.parametrize("codec", ["none", "byteplane"])
async def test_what_is_cold_is_read_as_it_was_written(tmp_path: Path, codec: str) -> None:
    tier = open_tier(tmp_path, codec=codec)
    await stored(tier, range(12))
    if not forgotten(tmp_path / DATA_FILE):
        pytest.skip("this file system keeps what it is asked to forget")
    assert set((await check(tier)).values()) == {Outcome.HIT}
    assert set((await check(tier)).values()) == {Outcome.HIT}
    await tier.close()


async def test_damage_on_the_medium_is_noticed_when_it_is_cold(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, codec="none")
    (record,) = await stored(tier, range(3, 4))
    path = tmp_path / DATA_FILE
    with path.open("r+b") as file:
        start = file.read().index(content(3)[:64])
        file.seek(start + 100)
        file.write(bytes([content(3)[100] ^ 1]))
    forgotten(path)
    into = memoryview(bytearray(len(content(3))))
    assert await tier.load(record, into) is Outcome.CORRUPT
    await tier.close()
