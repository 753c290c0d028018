"""A disk tier that is damaged, cut short or killed: never a wrong byte, never a lost service."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.tiers.base import Outcome
from tests.tiers.disk_chunks import CAPACITY, check, content, job, open_tier

ROOT = Path(__file__).resolve().parents[2]
# LMDB aborts on some damage. A supervisor starts the service again; this often must be enough.
MOST_RESTARTS = 8
HANG_S = 90


def child(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.tiers.disk_chunks", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def outlived(process: subprocess.Popen[str]) -> str:
    """What it printed. A process that hangs is killed, as a supervisor would."""
    try:
        return process.communicate(timeout=HANG_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


async def build(directory: Path) -> None:
    """A tier with chunks of every kind and with free pages between them."""
    tier = open_tier(directory)
    for start in range(0, 100, 10):
        await tier.store([job(number) for number in range(start, start + 10)])
    for record in tier.records()[::4]:
        tier.delete(record)
    await tier.close()


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: these tests commit thousands of times."""
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=base) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def original(memory: Path) -> Path:
    asyncio.run(build(memory / "original"))
    return memory / "original"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "trials"), [("anywhere", 40), ("trees", 60), ("truncate", 20)])
def test_damage_is_a_miss_or_a_restart_and_never_a_wrong_byte(
    original: Path, memory: Path, kind: str, trials: int
) -> None:
    seed, deaths = 0, 0
    work = memory / kind
    while seed < trials:
        process = child("damage", original, work, kind, seed, trials - seed)
        output = outlived(process)
        seed = int(output.split()[-1]) + 1
        if process.returncode == 0:
            break
        assert process.returncode < 0, f"trial {seed - 1} ended with {process.returncode}"
        deaths += 1
        assert survives(work), f"trial {seed - 1} keeps dying"
    assert deaths <= trials // 10


def survives(directory: Path) -> bool:
    """Does a service that is started again and again come up?"""
    for _ in range(MOST_RESTARTS):
        process = child("use", directory)
        outlived(process)
        if process.returncode == 0:
            return True
        assert process.returncode < 0
    return False


@pytest.mark.slow
async def test_kill_at_any_moment_loses_nothing_that_was_durable(tmp_path: Path) -> None:
    rng = random.Random(5)
    durable: set[int] = set()
    for _ in range(12):
        process = child("write", tmp_path / "disk")
        assert process.stdout is not None
        output = [process.stdout.readline() for _ in range(rng.randrange(1, 9))]
        # Somewhere in the next transaction, as far as its bytes have come.
        output.append(process.stdout.read(rng.randrange(1, 4)))
        process.send_signal(signal.SIGKILL)
        output.append(process.stdout.read())
        process.wait()
        process.stdout.close()
        words = "".join(output).split()
        tier = open_tier(tmp_path / "disk")
        outcomes = await check(tier)
        await tier.close()
        assert set(outcomes.values()) <= {Outcome.HIT}
        # A delete may or may not have become durable; a store that was answered has.
        stored = {int(word) for word in words if not word.startswith("-")}
        deleted = {int(word[1:]) for word in words if word.startswith("-")}
        assert (durable | stored) - deleted <= set(outcomes)
        durable = set(outcomes)


async def test_a_truncated_file_fails_reads_while_it_is_open(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    records = await tier.store([job(9)])
    os.truncate(tmp_path / "data.mdb", CAPACITY // 2)
    assert records[0] is not None
    target = bytearray(len(content(9)))
    assert await tier.load(records[0], memoryview(target)) is Outcome.FAILED
    os.truncate(tmp_path / "data.mdb", CAPACITY)
    await tier.close()
