"""Large copies, which two threads share."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvtier.kernels.copying import SHARED_COPY_BYTES as LARGE
from kvtier.kernels.copying import Copier, _Task

PAGE = 4096


@pytest.fixture
def copier() -> Iterator[Copier]:
    made = Copier()
    made._helps = True  # also where there is one processor
    yield made
    made.close()


@pytest.mark.parametrize("nbytes", [LARGE - 1, LARGE, LARGE + 1, LARGE + PAGE + 7, 3 * LARGE])
def test_every_byte_arrives(copier: Copier, nbytes: int) -> None:
    source = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    target = np.zeros(nbytes + 2, np.uint8)
    copier.copy(target[1:-1].data, source.data)
    assert np.array_equal(target[1:-1], source)
    assert target[0] == target[-1] == 0


def test_many_threads_copy_at_once(copier: Copier) -> None:
    def one(seed: int) -> bool:
        source = np.random.default_rng(seed).integers(0, 256, LARGE + seed, np.uint8)
        target = np.zeros_like(source)
        copier.copy(target.data, source.data)
        return np.array_equal(target, source)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(32)))


@pytest.mark.parametrize("nbytes", [1, LARGE - 1, LARGE + 1])
def test_a_source_of_another_size_is_refused(copier: Copier, nbytes: int) -> None:
    target = bytearray(LARGE)
    with pytest.raises(ValueError, match="shape"):
        copier.copy(memoryview(target), memoryview(b"\x01" * nbytes))
    assert not any(target)


def test_a_read_only_target_is_refused(copier: Copier) -> None:
    with pytest.raises(ValueError, match="read-only"):
        copier.copy(memoryview(bytes(LARGE)), memoryview(bytes(LARGE)))


def test_work_that_nobody_takes_is_done_by_its_giver(
    copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "_offer", lambda task: None)
    test_every_byte_arrives(copier, LARGE)


def test_both_halves_of_shared_work_are_done_before_it_returns(copier: Copier) -> None:
    done: list[str] = []
    copier.share(lambda: done.append("work"), lambda: done.append("rest"))
    assert sorted(done) == ["rest", "work"]
    copier.close()
    copier.share(lambda: done.append("more"), lambda: done.append("last"))
    assert done[2:] == ["more", "last"]


@pytest.mark.parametrize("half", [0, 1])
def test_what_a_half_raises_is_raised_once_the_other_is_done(copier: Copier, half: int) -> None:
    done: list[str] = []

    def fails() -> None:
        raise OSError("a half failed")

    def works() -> None:
        done.append("works")

    halves = (fails, works) if half == 0 else (works, fails)
    with pytest.raises(OSError, match="a half failed"):
        copier.share(*halves)
    assert done == ["works"]


def test_a_closed_copier_still_copies(copier: Copier) -> None:
    test_every_byte_arrives(copier, LARGE)
    copier.close()
    test_every_byte_arrives(copier, LARGE)


def test_an_error_of_the_other_thread_is_raised_here() -> None:
    def fail() -> None:
        raise MemoryError("no luck")

    task = _Task(fail)
    task.run()
    with pytest.raises(MemoryError, match="no luck"):
        task.finish()


@pytest.mark.slow
def test_a_forked_child_copies_too() -> None:
    program = """
import os
from kvtier.kernels.copying import Copier
copier = Copier()
copier._helps = True
source = bytes(range(256)) * (8 << 12)
def once():
    target = bytearray(len(source))
    copier.copy(memoryview(target), memoryview(source))
    return target == source
assert once()
child = os.fork()
if child == 0:
    os._exit(0 if once() and once() else 1)
assert os.waitpid(child, 0)[1] == 0
assert once()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)
