"""One vLLM whose service is absent, dies, hangs, loses, lies: the answers stay those of vLLM alone.

The engine lives through all of it; each test brings a service to the engine's target and takes it
away again. After each failure the engine still answers, and reuses what a service that is well has.
"""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.engines.vllm_process import (
    Engine,
    Engines,
    Prompt,
    Reference,
    connected_to,
    emptied,
    storing,
)
from tests.sidecar import HANG_S, Sidecar, until
from tests.tiers.disk_chunks import _pages

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHUNK = 128
PAGE_BYTES = 4096
DEADLINE_MS = 3_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine expects the service's socket."""
    return tmp_path_factory.mktemp("service") / "s"


@pytest.fixture(scope="module")
def engine(engines: Engines, model: Path, place: Path) -> Iterator[Engine]:
    """It starts while no service is there."""
    settings = connected_to(f"unix://{place}", chunk_tokens=CHUNK, deadline_ms=DEADLINE_MS)
    with Engine(engines, model, num_gpu_blocks_override=80, **settings) as engine:
        yield engine


@pytest.fixture
def service(tmp_path: Path, place: Path) -> Callable[..., Sidecar]:
    """Makes the service that the engine expects, not yet running."""

    def make(*settings: str, disk: bool = True) -> Sidecar:
        sizes = ["cpu.capacity=128MiB", "disk.capacity=256MiB", f"server.listen=unix://{place}"]
        sidecar = Sidecar(tmp_path, *sizes, *settings, disk=disk)
        sidecar.socket, sidecar.target = place, f"unix://{place}"
        return sidecar

    return make


def ask(engine: Engine, reference: Reference, prompt: Prompt) -> int:
    """Ask an engine whose own cache is empty, and compare; returns how much was reused."""
    assert engine.ask("reset")
    engine.ask("spoil")
    answer = engine.one(prompt)
    reference.check([prompt], [answer])
    return answer.cached


# ── Absent, dead ──


def test_a_service_that_comes_and_goes(
    engine: Engine, service: Callable[..., Sidecar], reference: Reference
) -> None:
    prompt = reference.prompt(100, 300)
    assert not engine.ask("connected")
    assert ask(engine, reference, prompt) == 0
    with service():
        until(lambda: ask(engine, reference, prompt) == 256, "hits, once the service is there")
    assert ask(engine, reference, prompt) == 0


def test_killed_between_requests(
    engine: Engine, service: Callable[..., Sidecar], reference: Reference
) -> None:
    prompt = reference.prompt(101, 300)
    with service() as sidecar:
        engine.ask("wait_connected")
        with storing(sidecar, 2):
            ask(engine, reference, prompt)
        sidecar.kill()
        assert ask(engine, reference, prompt) == 0
        sidecar.start()
        engine.ask("wait_connected")
        assert ask(engine, reference, prompt) == 256


def test_killed_while_chunks_are_stored(
    engine: Engine, service: Callable[..., Sidecar], reference: Reference
) -> None:
    prompts = [reference.prompt(seed, 300) for seed in range(102, 105)]
    with service() as sidecar:
        emptied(engine)
        engine.tell_generate(prompts)
        sidecar.until(lambda stats: stats.counters["reserved_chunks"], "a chunk is being stored")
        sidecar.kill()
        reference.check(prompts, engine.generated())
        sidecar.start()
        engine.ask("wait_connected")
        for prompt in prompts:
            ask(engine, reference, prompt)
        sidecar.until_idle()
        assert [ask(engine, reference, prompt) for prompt in prompts] == [256] * 3


@pytest.mark.parametrize(
    ("moment", "reused"), [("signal_at_load", 0), ("signal_at_copy", 256)], ids=["load", "copy"]
)
def test_killed_while_chunks_are_loaded(
    engine: Engine,
    service: Callable[..., Sidecar],
    reference: Reference,
    moment: str,
    reused: int,
) -> None:
    """Stopped at that moment, and killed then. What is being copied already stays readable."""
    prompt = reference.prompt(105, 300)
    with service() as sidecar:
        emptied(engine)
        with storing(sidecar, 2):
            ask(engine, reference, prompt)
        emptied(engine)
        assert sidecar.process is not None
        with engine.wrong(moment, pid=sidecar.process.pid, number=signal.SIGSTOP):
            engine.tell_generate([prompt])
            until(lambda: stopped(sidecar), "the load has begun")
            sidecar.kill()
            answers = engine.generated()
        assert [answer.cached for answer in answers] == [reused]
        reference.check([prompt], answers)
        sidecar.start()
        emptied(engine)
        assert ask(engine, reference, prompt) == 256


def stopped(sidecar: Sidecar) -> bool:
    assert sidecar.process is not None
    status = Path(f"/proc/{sidecar.process.pid}/stat").read_text(encoding="utf-8")
    return status.rpartition(")")[2].split()[0] == "T"


# ── Standing still ──


def test_hung_before_it_is_asked(
    engine: Engine, service: Callable[..., Sidecar], reference: Reference
) -> None:
    prompt, other = reference.prompt(106, 300), reference.prompt(107, 150)
    with service() as sidecar:
        emptied(engine)
        with storing(sidecar, 2):
            ask(engine, reference, prompt)
        sidecar.signal(signal.SIGSTOP)
        assert [ask(engine, reference, each) for each in (prompt, other)] == [0, 0]
        sidecar.signal(signal.SIGCONT)
        engine.ask("wait_connected")
        assert ask(engine, reference, prompt) == 256
        sidecar.until(lambda stats: stats.leases == 0, "nothing is left over")


def test_hung_while_chunks_are_stored(
    engine: Engine, service: Callable[..., Sidecar], reference: Reference
) -> None:
    prompts = [reference.prompt(seed, 300) for seed in range(108, 110)]
    with service() as sidecar:
        emptied(engine)
        engine.tell_generate(prompts)
        sidecar.until(lambda stats: stats.counters["reserved_chunks"], "a chunk is being stored")
        sidecar.signal(signal.SIGSTOP)
        reference.check(prompts, engine.generated())
        sidecar.signal(signal.SIGCONT)
        engine.ask("wait_connected")
        sidecar.until(lambda stats: stats.leases == 0, "nothing is left over")
        for prompt in prompts:
            ask(engine, reference, prompt)
        sidecar.until_idle()
        assert [ask(engine, reference, prompt) for prompt in prompts] == [256] * 2


# ── Damaged, full ──


def test_damaged_chunks_on_disk_are_computed_anew(
    engine: Engine, service: Callable[..., Sidecar], reference: Reference
) -> None:
    prompt = reference.prompt(111, 300)
    with service() as sidecar:
        emptied(engine)
        with storing(sidecar, 2):
            ask(engine, reference, prompt)
        sidecar.kill()
        damage(sidecar.disk / "data.mdb")
        sidecar.start()
        emptied(engine)
        with storing(sidecar, 2):
            assert ask(engine, reference, prompt) == 0
        assert sidecar.stats().counters["corrupt_chunks"] > 0
        assert sidecar.terminate() == 0
        sidecar.start()
        emptied(engine)
        assert ask(engine, reference, prompt) == 256


def damage(file: Path) -> None:
    """Change a byte in each page of every chunk, and nothing in LMDB's own pages."""
    data = file.read_bytes()
    trees = _pages(data)
    with file.open("r+b") as target:
        page = 0
        while page < len(trees):
            header = data[page * PAGE_BYTES : page * PAGE_BYTES + 16]
            run = 1 if trees[page] else int.from_bytes(header[12:16], "little")
            for inner in range(page + 1, page + run):
                target.seek(inner * PAGE_BYTES)
                target.write(bytes([data[inner * PAGE_BYTES] ^ 1]))
            page += run


@pytest.mark.parametrize("settings", [["disk.capacity=16MiB"], []], ids=["and disk", "no disk"])
def test_no_room(
    engine: Engine, service: Callable[..., Sidecar], reference: Reference, settings: list[str]
) -> None:
    """The arena has two slots; in both prompts are more chunks than that."""
    prompts = [reference.prompt(112, 300), reference.prompt(113, 550)]
    with service("cpu.capacity=16MiB", *settings, disk=bool(settings)) as sidecar:
        emptied(engine)
        for prompt in prompts * 2:
            assert ask(engine, reference, prompt) <= 256
            sidecar.until(lambda stats: stats.leases == 0, "all is stored that can be")
        assert 0 < ask(engine, reference, prompts[1]) <= 256
        sidecar.until(lambda stats: stats.leases == 0, "nothing is left over")
        counters = sidecar.stats().counters
        assert counters["evicted_cpu"] + counters["refused_no_room"] > 0


# ── Another program ──


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(10_000)])
def test_another_program_on_the_socket(
    engine: Engine,
    service: Callable[..., Sidecar],
    reference: Reference,
    place: Path,
    answer: bytes,
) -> None:
    prompt = reference.prompt(114, 150)
    with stranger(place, answer) as visited:
        assert visited.wait(HANG_S)
        assert ask(engine, reference, prompt) == 0
    with service() as sidecar:
        emptied(engine)
        with storing(sidecar, 1):
            assert ask(engine, reference, prompt) == 0
        assert ask(engine, reference, prompt) == 128


@contextmanager
def stranger(place: Path, answer: bytes) -> Iterator[threading.Event]:
    """A program that says the same to everyone, and waits. The event tells of its first visitor."""
    visited = threading.Event()
    visitors: list[socket.socket] = []
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen()

        def welcome() -> None:
            with suppress(OSError):
                while True:
                    visitor, _ = listening.accept()
                    visitors.append(visitor)
                    visitor.sendall(answer)
                    visited.set()

        thread = threading.Thread(target=welcome)
        thread.start()
        yield visited
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(HANG_S)
    for visitor in visitors:
        visitor.close()
    place.unlink()
