"""Services that start and stop at the same moment on the same paths."""

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvtier.errors import AlreadyRunning
from kvtier.sections import Cpu
from kvtier.service.build import _create_arena
from kvtier.service.server import SocketLock
from tests.sidecar import HANG_S, Sidecar, offload, prompt_of

THREADS = 4


def at_once(work: Callable[[], int]) -> int:
    """Run the work in threads; returns the sum of what they return."""
    with ThreadPoolExecutor(THREADS) as pool:
        ends = [pool.submit(work) for _ in range(THREADS)]
        return sum(end.result(HANG_S) for end in ends)


def test_whoever_has_a_socket_has_its_lock_as_others_see_it(tmp_path: Path) -> None:
    """An owner removes the lock as it goes: who had opened it just before holds nothing."""
    socket = tmp_path / "s"

    def take_often() -> int:
        taken = 0
        for _ in range(300):
            try:
                lock = SocketLock.take(socket)
            except AlreadyRunning:
                continue
            assert os.path.samestat(lock.path.stat(), os.fstat(lock.fd))
            lock.release(socket)
            taken += 1
        return taken

    assert at_once(take_often) > THREADS
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_an_arena_just_made_is_not_taken_for_stale(memory: Path) -> None:
    def make_often() -> int:
        for _ in range(100):
            region = _create_arena(Cpu(directory=memory, capacity=1 << 16))
            assert region.path.exists()
            region.close(unlink=True)
        return 100

    assert at_once(make_often) == 100 * THREADS
    assert list(memory.iterdir()) == []


@pytest.mark.slow
def test_services_that_start_at_the_same_moment(tmp_path: Path) -> None:
    services = [Sidecar(tmp_path / f"{number}") for number in range(5)]
    for service in services[1:]:
        service.settings[1] = services[0].settings[1]  # one directory for all arenas
    with ThreadPoolExecutor(len(services)) as pool:
        list(pool.map(Sidecar.start, services))
    assert len(list(services[0].memory.glob("*.arena"))) == len(services)
    for service in services:
        client = service.client()
        assert len(offload(client, client.prefix(prompt_of(1, 5))).stored) == 5
        client.close()
        assert service.terminate() == 0
    assert list(services[0].memory.iterdir()) == []
    for service in services:
        service.__exit__(None)
