"""Chunks whose bytes follow from their number, and a child process that works on a disk tier.

    python -m tests.tiers.disk_chunks write DIRECTORY      store and delete until killed
    python -m tests.tiers.disk_chunks damage DIRECTORY WORK KIND FIRST COUNT
    python -m tests.tiers.disk_chunks use DIRECTORY        open, check every chunk, write, close

`write` prints what is durable. `damage` prints the number of each trial as it begins. A wrong byte
ends the process with exit status 3.
"""

import asyncio
import functools
import itertools
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np

from kvtier.chunks import ChunkKey
from kvtier.kernels.codecs import codec_by_name
from kvtier.spaces import Layout, Space
from kvtier.tiers.base import ChunkMeta, Outcome, Record, StoreJob
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk_file import open_data_file
from kvtier.tiers.disk_format import meta_key

WRONG_BYTES = 3
CAPACITY = 24 << 20
# Chunks of 1 KiB (within a page of LMDB's tree), 48 KiB and 1.1 MiB (several extents).
SPACES = tuple(
    Space("model", Layout(dtype="bfloat16", layers=1, heads=heads, head_dim=head_dim, tokens=4))
    for heads, head_dim in ((1, 64), (8, 384), (36, 2048))
)


def space_of(number: int) -> Space:
    """Small chunks are common, large ones are not."""
    return SPACES[2 if number % 10 == 9 else number % 2]


@functools.cache
def content(number: int) -> bytes:
    """The bytes of a chunk: bf16 gaussians, so that they compress as real ones do."""
    count = space_of(number).layout.nbytes // 2
    values = np.random.default_rng(number).standard_normal(count, np.float32)
    return values.view(np.uint8).reshape(-1, 4)[:, 2:].tobytes()


def key_of(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(32, "big"))


def job(number: int) -> StoreJob:
    parent = key_of(number - 1) if number else ChunkKey(space_of(number).digest)
    meta = ChunkMeta(key_of(number), parent, space_of(number), 1_000.0 + number)
    return StoreJob(meta, memoryview(content(number)))


def open_tier(directory: Path, capacity: int = CAPACITY, codec: str = "byteplane") -> DiskTier:
    return DiskTier.open(directory, capacity, codec_by_name(codec), 2)


async def check(tier: DiskTier) -> dict[int, Outcome]:
    """Load every chunk; what came of each by its number. Exits on a wrong byte."""
    outcomes = {}
    for record in tier.records():
        number = int.from_bytes(record.key, "big")
        expected = content(number)
        target = bytearray(len(expected))
        outcomes[number] = await tier.load(record, memoryview(target))
        if outcomes[number] is Outcome.HIT and target != expected:
            sys.exit(WRONG_BYTES)
    return outcomes


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


async def write(directory: Path) -> None:
    """Store and delete in batches for ever; prints each batch once it is durable."""
    tier = open_tier(directory)
    rng = random.Random(os.getpid())
    taken = {int.from_bytes(record.key, "big") for record in tier.records()}
    fresh = (number for number in itertools.count() if number not in taken)
    while True:
        jobs = [job(number) for number in itertools.islice(fresh, rng.randrange(1, 12))]
        for record in rng.sample(tier.records(), len(tier.records()) // 4):
            sys.stdout.write(f"-{int.from_bytes(record.key, 'big')} ")
            tier.delete(record)
        sys.stdout.flush()
        records = [record for record in await tier.store(jobs) if record]
        sys.stdout.write(" ".join(str(int.from_bytes(each.key, "big")) for each in records))
        sys.stdout.write("\n")
        sys.stdout.flush()


async def use(directory: Path) -> None:
    """Everything a service does with a tier, the checks of bytes included."""
    tier = open_tier(directory)
    outcomes = await check(tier)
    for record in tier.records():
        if outcomes[int.from_bytes(record.key, "big")] is not Outcome.HIT or record.id % 5 == 0:
            tier.delete(record)
    await tier.store([job(number) for number in range(10_000, 10_020)])
    await tier.flush()
    await tier.store([job(number) for number in range(20_000, 20_020)])
    await check(tier)
    await tier.close()
    tier = open_tier(directory)
    await check(tier)
    await tier.close()


def damage(original: Path, work: Path, kind: str, first: int, count: int) -> None:
    """Damage a copy of a tier in `count` ways, one after the other, and use it each time."""
    for seed in range(first, first + count):
        sys.stdout.write(f"{seed}\n")
        sys.stdout.flush()
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(original, work)
        DAMAGES[kind](work / "data.mdb", random.Random(seed))
        asyncio.run(use(work))


def _flip_anywhere(path: Path, rng: random.Random) -> None:
    _flip(path, rng, lambda pages: rng.randrange(len(pages) * 4096))


def _flip_trees(path: Path, rng: random.Random) -> None:
    """Aim at what is not a chunk's bytes: LMDB's own pages."""
    _flip(
        path,
        rng,
        lambda pages: (
            rng.choice([number for number, tree in enumerate(pages) if tree]) * 4096
            + rng.randrange(rng.choice([64, 4096]))
        ),
    )


def _flip(path: Path, rng: random.Random, place: Callable[[list[bool]], int]) -> None:
    pages = _pages(path.read_bytes())
    with path.open("r+b") as file:
        for _ in range(rng.choice([1, 1, 3, 20])):
            offset = place(pages)
            file.seek(offset)
            byte = file.read(1)[0] ^ (1 << rng.randrange(8))
            file.seek(offset)
            file.write(bytes([byte]))


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(len(_pages(path.read_bytes())) * 4096))


def _pages(data: bytes) -> list[bool]:
    """For each page up to the last in use: is it LMDB's own?"""
    trees: list[bool] = []
    used = len(data.rstrip(b"\0"))
    while len(trees) * 4096 < used:
        start = len(trees) * 4096
        chunk_bytes = data[start + 10] & 0x04
        trees += [not chunk_bytes] * (
            max(1, int.from_bytes(data[start + 12 : start + 16], "little")) if chunk_bytes else 1
        )
    return trees


DAMAGES = {"anywhere": _flip_anywhere, "trees": _flip_trees, "truncate": _truncate}


def main(arguments: list[str]) -> None:
    logging.disable(logging.CRITICAL)
    match arguments:
        case ["write", directory]:
            asyncio.run(write(Path(directory)))
        case ["use", directory]:
            asyncio.run(use(Path(directory)))
        case ["damage", original, work, kind, first, count]:
            damage(Path(original), Path(work), kind, int(first), int(count))


if __name__ == "__main__":
    main(sys.argv[1:])
