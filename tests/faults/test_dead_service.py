"""The service is killed, stands still or stops: no wrong byte, no exception, and it comes back."""

import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvtier.client import Client, connect
from tests.client_process import ClientProcess
from tests.sidecar import HANG_S, Sidecar, content_of, load, offload, prompt_of, space_of, until

NBYTES = space_of().layout.nbytes


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    with Sidecar(tmp_path) as running:
        yield running


class Load:
    """Threads that store and load prompts over one client until they are told to stop. Whatever
    they see must be right; what they raise comes out of `stop`."""

    def __init__(self, client: Client, seeds: range, longest: int = 40) -> None:
        self.client = client
        self.longest = longest
        self._rounds = 0
        self._round = threading.Condition()
        self._ending = threading.Event()
        self._pool = ThreadPoolExecutor(2)
        self._ends = [
            self._pool.submit(self._use, seeds[number::2], random.Random(number))
            for number in range(2)
        ]

    def _use(self, seeds: range, chance: random.Random) -> None:
        while not self._ending.is_set():
            length = chance.randrange(1, self.longest)
            offload(self.client, self.client.prefix(prompt_of(chance.choice(seeds), length)))
            load(self.client, self.client.prefix(prompt_of(chance.choice(seeds), self.longest)))
            with self._round:
                self._rounds += 1
                self._round.notify_all()

    def wait(self, rounds: int) -> None:
        """Return once so many prompts more were dealt with."""
        with self._round:
            enough = self._rounds + rounds
            assert self._round.wait_for(lambda: self._rounds >= enough, HANG_S)

    def stop(self) -> None:
        self._ending.set()
        for end in self._ends:
            end.result(HANG_S)
        self._pool.shutdown()


@pytest.fixture(params=["shm", "inline"])
def working(request: pytest.FixtureRequest, sidecar: Sidecar) -> Iterator[Load]:
    """A client under load, whose every byte is checked."""
    with connect(sidecar.target, space_of(), deadline_s=5.0, path=request.param) as client:
        assert client.wait_ready(HANG_S)
        threads = Load(client, range(1, 60))
        yield threads
        threads.stop()


# ── Killed ──


@pytest.mark.slow
def test_killed_under_load_again_and_again(sidecar: Sidecar, working: Load) -> None:
    chance = random.Random(0)
    on_disk = 0
    for _ in range(4):
        working.wait(chance.randrange(5, 60))
        on_disk = sidecar.stats().tiers[1].chunks
        sidecar.kill()
        until(lambda: not working.client.connected, "the client has noticed")
        working.wait(3)  # the operations go on, as misses
        sidecar.start()
        assert sidecar.stats().tiers[1].chunks >= on_disk > 0
        assert working.client.wait_ready(HANG_S)
    working.stop()
    found = sum(load(working.client, working.client.prefix(prompt_of(n, 40))) for n in range(60))
    assert found >= on_disk
    offload(working.client, working.client.prefix(prompt_of(99, 40)))
    assert load(working.client, working.client.prefix(prompt_of(99, 40))) == 40


@pytest.mark.slow
@pytest.mark.parametrize("path", ["shm", "inline"])
def test_killed_while_large_chunks_move(tmp_path: Path, path: str) -> None:
    """Chunks that travel in several messages, and are copied by several threads."""
    large = space_of(layers=2100)  # 4.1 MiB
    sizes = ["cpu.capacity=64MiB", "disk.capacity=256MiB", "disk.compression=none"]
    with Sidecar(tmp_path, *sizes) as sidecar:
        threads = Load(sidecar.client(large, path=path, deadline_s=5.0), range(1, 9), longest=4)
        for _ in range(3):
            threads.wait(8)
            sidecar.kill()
            until(lambda: not threads.client.connected, "the client has noticed")
            sidecar.start()
            assert threads.client.wait_ready(HANG_S)
        threads.wait(8)
        threads.stop()
        assert sidecar.stats().counters["load_ram_hits"] > 0


def test_what_was_on_disk_is_back_to_the_last_chunk(sidecar: Sidecar) -> None:
    client = sidecar.client()
    prefixes = [client.prefix(prompt_of(seed, 100)) for seed in range(5)]
    for prefix in prefixes:
        offload(client, prefix)
    sidecar.until(lambda stats: stats.counters["disk_written_chunks"] == 500, "all is on disk")
    sidecar.kill()
    sidecar.start()
    assert client.wait_ready(HANG_S)
    assert [client.lookup(prefix) for prefix in prefixes] == [100] * 5
    assert [load(client, prefix) for prefix in prefixes] == [100] * 5


def test_killed_while_a_client_reads_and_writes_in_place(sidecar: Sidecar) -> None:
    """The memory that it sees stays as it is; what it wrote is lost and nothing more."""
    client = sidecar.client()
    held, fresh = client.prefix(prompt_of(1, 50)), client.prefix(prompt_of(2, 50))
    offload(client, held)
    sidecar.until_idle()
    with client.load(held) as loaded, client.offload(fresh) as wanted:
        chunks, slots = list(loaded), iter(wanted)
        next(slots)
        sidecar.kill()
        sidecar.start()
        assert client.wait_ready(HANG_S)
        assert len(offload(client, client.prefix(prompt_of(3, 200))).stored) == 200
        for chunk in chunks:
            assert bytes(chunk.data) == content_of(held[chunk.index], NBYTES)
        for slot in slots:
            slot.write(memoryview(content_of(fresh[slot.index], NBYTES)))
    assert wanted.outcome.stored == []
    assert load(client, fresh) == 0
    assert load(client, held) == 50
    assert offload(client, fresh).stored == list(range(50))


def test_what_a_killed_service_left_is_cleared_away(sidecar: Sidecar) -> None:
    client = sidecar.client()
    offload(client, client.prefix(prompt_of(1, 5)))
    foreign = sidecar.memory / "kvtier-of-another-program.arena.txt"
    foreign.touch()
    left = set(sidecar.memory.glob("kvtier-*.arena*")) - {foreign}
    assert len(left) == 2, "an arena and a tether"
    sidecar.kill()
    assert all(path.exists() for path in left)
    assert sidecar.socket.is_socket()
    sidecar.start()
    assert client.wait_ready(HANG_S)
    assert not any(path.exists() for path in left)
    assert len(list(sidecar.memory.iterdir())) == 3
    assert foreign.exists()


@pytest.mark.slow
def test_client_and_service_killed_together(sidecar: Sidecar) -> None:
    with ClientProcess(sidecar.target) as victim:
        victim.tell("store_for_ever", seed=1, chunks=20)
        done = [victim.answer() for _ in range(20)]
        written = sidecar.stats().tiers[1].chunks
        sidecar.kill()
        victim.kill()
    sidecar.start()
    with ClientProcess(sidecar.target) as reader:
        assert sum(reader.ask("load", seed=seed, chunks=20) for seed in done) >= min(
            written, 20 * len(done)
        )
        assert reader.ask("check")


# ── Standing still ──


def test_a_hung_service_opens_the_circuit_which_closes_by_itself(sidecar: Sidecar) -> None:
    client = sidecar.client(deadline_s=0.2)
    prefix = client.prefix(prompt_of(1, 20))
    offload(client, prefix)
    sidecar.signal(signal.SIGSTOP)
    assert [client.lookup(prefix), load(client, prefix), client.prefetch(prefix)] == [0, 0, 0]
    assert not client.connected
    assert load(client, prefix) == 0
    assert set(offload(client, client.prefix(prompt_of(2, 5))).refused) == set(range(5))
    sidecar.signal(signal.SIGCONT)
    assert client.wait_ready(HANG_S)
    until(lambda: load(client, prefix) == 20, "the prompt loads")
    sidecar.until(lambda stats: (stats.sessions, stats.leases) == (1, 0), "nothing is left over")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["shm", "inline"])
@pytest.mark.parametrize("operation", ["load", "offload"])
def test_an_operation_that_timed_out_leaves_no_lease(
    sidecar: Sidecar, path: str, operation: str
) -> None:
    """The service gets the request, its end and what gives the lease back all at once, in any
    order. Two failures do not end the session: only the lease itself may."""
    client = sidecar.client(path=path, deadline_s=0.05)
    held = client.prefix(prompt_of(1, 20))
    until(lambda: not offload(client, held).refused, "a prompt is stored")
    doings: dict[str, Callable[[int], object]] = {
        "load": lambda seed: load(client, held),
        "offload": lambda seed: offload(client, client.prefix(prompt_of(seed, 20))),
    }
    for seed in range(2, 12):
        until(lambda: client.connected and client.lookup(held) == 20, "the service answers")
        sidecar.signal(signal.SIGSTOP)
        doings[operation](seed)
        assert client.connected
        sidecar.signal(signal.SIGCONT)
        sidecar.until(lambda stats: stats.leases == 0, "the lease is over")
    until(lambda: load(client, held) == 20, "the prompt loads")


# ── Stopped ──


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_writes_all_to_disk_and_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    # Nothing goes to disk before the stop.
    slow = ["disk.commit_interval_ms=60000", "disk.commit_bytes=1GiB"]
    with Sidecar(tmp_path, *slow) as sidecar:
        client = sidecar.client()
        prefixes = [client.prefix(prompt_of(seed, 300)) for seed in range(5)]
        for prefix in prefixes:
            offload(client, prefix)
        assert sidecar.stats().tiers[1].chunks == 0
        sidecar.signal(number)
        assert sidecar.wait() == 0
        assert not sidecar.socket.exists()
        assert not sidecar.socket.with_name("s.lock").exists()
        assert list(sidecar.memory.iterdir()) == []
        sidecar.start()
        assert client.wait_ready(HANG_S)
        assert [load(client, prefix) for prefix in prefixes] == [300] * 5


@pytest.mark.slow
def test_a_stop_under_load(sidecar: Sidecar, working: Load) -> None:
    working.wait(20)
    assert sidecar.terminate() == 0
    assert list(sidecar.memory.iterdir()) == []
    working.wait(3)
    sidecar.start()
    assert working.client.wait_ready(HANG_S)
    working.wait(20)


def test_a_stop_with_leases_open_and_a_client_cut_off(sidecar: Sidecar) -> None:
    client = sidecar.client()
    prefix = client.prefix(prompt_of(1, 50))
    offload(client, prefix)
    with ClientProcess(sidecar.target) as reader, client.load(prefix) as loaded:
        chunks = list(loaded)
        reader.ask("reserve", seed=1, chunks=10)
        reader.ask("disconnect")
        assert sidecar.terminate() == 0
        assert list(sidecar.memory.iterdir()) == []
        for chunk in chunks:
            assert bytes(chunk.data) == content_of(prefix[chunk.index], NBYTES)


@pytest.mark.slow
def test_a_stop_loses_nothing_that_waits_to_be_read(tmp_path: Path) -> None:
    """What is about to be promoted when the service stops stays on disk."""
    with Sidecar(tmp_path, "disk.read_threads=1") as sidecar:
        client = sidecar.client()
        prefix = client.prefix(prompt_of(1, 1000))
        offload(client, prefix)
        for _ in range(3):
            assert sidecar.terminate() == 0
            sidecar.start()
            assert sidecar.stats().tiers[1].chunks == 1000
            assert client.wait_ready(HANG_S)
            client.prefetch(prefix)
        assert load(client, prefix) == 1000


# ── A second one ──


def refused(sidecar: Sidecar, *settings: str) -> str:
    """The one line with which a second service of these settings refuses to start."""
    ended = sidecar.run_to_end(*settings)
    assert ended.returncode == 2, ended.stderr
    [line] = [each for each in ended.stderr.splitlines() if each.startswith("kvtier: ")]
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    return line


@pytest.mark.slow
def test_a_second_service_refuses_what_the_first_one_has(sidecar: Sidecar, tmp_path: Path) -> None:
    client = sidecar.client()
    prefix = client.prefix(prompt_of(1, 20))
    offload(client, prefix)
    elsewhere = f"server.listen=unix://{tmp_path / 'other'}"
    assert "server.listen" in refused(sidecar)
    assert "server.listen" in refused(sidecar, f"disk.directory={tmp_path / 'd'}")
    assert "disk.directory" in refused(sidecar, elsewhere)
    assert not (tmp_path / "other.lock").exists()
    assert len(list(sidecar.memory.iterdir())) == 2
    assert client.connected
    assert load(client, prefix) == 20


@pytest.mark.slow
def test_a_start_that_cannot_be_says_why_and_leaves_nothing(
    sidecar: Sidecar, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    alone = [f"disk.directory={tmp_path / 'another'}", f"server.listen=unix://{tmp_path / 'o'}"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for setting in (
            f"server.listen=unix://{file}",
            f"server.listen=unix://{file}/s",
            f"server.listen=unix://{tmp_path / ('l' * 120)}",
            f"server.listen=127.0.0.1:{port}",
            f"cpu.directory={tmp_path / 'nowhere'}",
            f"cpu.directory={file}",
            "cpu.capacity=64TiB",
            f"disk.directory={file}",
            "disk.capacity=1MiB",
        ):
            before = set(sidecar.memory.iterdir())
            assert setting.partition("=")[0] in refused(sidecar, *alone, setting), setting
            assert set(sidecar.memory.iterdir()) == before
    assert file.read_text() == "precious"
