"""Beside a real service: an engine whose device fails or that dies costs nobody else anything, and
without the setting there is nothing of a GPU at all."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvtier.kernels.device import DeviceFault, Span, Stream
from kvtier.kernels.host_streams import HostStream
from tests.sidecar import HANG_S, ROOT, Sidecar, prompt_of, until
from tests.test_paged_end_to_end import CHUNKS, GPU, Engine, raised


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    with Sidecar(tmp_path, *GPU) as running:
        yield running


def at_once(stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
    raise DeviceFault("fallen off the bus")


def later(stream: Stream, pairs: Sequence[tuple[Span, Span]]) -> None:
    def fail() -> None:
        raise DeviceFault("fallen off the bus")

    assert isinstance(stream, HostStream)
    stream.queue(fail)


@pytest.mark.parametrize("copy", [at_once, later])
def test_a_fault_in_one_engine_is_its_own(
    sidecar: Sidecar, copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    well, faulty = (Engine(sidecar, seed, None, True) for seed in range(2))
    prefix, another = (well.client.prefix(prompt_of(seed, CHUNKS)) for seed in (1, 2))
    stored = well.chunks
    assert well.offload(prefix) == CHUNKS
    assert faulty.load(prefix, by_layer=False) == CHUNKS
    monkeypatch.setattr(faulty.device, "copy", copy)
    assert faulty.offload(another) == 0
    monkeypatch.undo()  # the engine does not trust it any more
    assert faulty.load(prefix, by_layer=True) == 0
    assert faulty.offload(another) == 0
    assert well.offload(another) == CHUNKS  # nothing of it is reserved for ever
    raised(sidecar)
    assert well.load(prefix, by_layer=True) == CHUNKS
    assert well.chunks == stored
    faulty.close()
    until(lambda: sidecar.stats().sessions == 1, "its session ended")
    until(lambda: sidecar.stats().leases == 0, "its leases ended")
    assert well.load(another, by_layer=False) == CHUNKS
    assert well.chunks == stored
    well.close()


DYING = """
import sys
from types import SimpleNamespace
from tests.sidecar import prompt_of
from tests.test_paged_end_to_end import CHUNKS, Engine

engine = Engine(SimpleNamespace(target=sys.argv[1]), 7, None, True)
prefix = engine.client.prefix(prompt_of(1, CHUNKS))
load = engine.paged.load(prefix, engine.tables, after=engine.stream.record())
with engine.client.offload(engine.client.prefix(prompt_of(3, 1))) as offload:
    for slot in offload:
        print("holds", load.chunks, flush=True)
        sys.stdin.read()
"""


def test_an_engine_that_is_killed_lets_go_of_vram_and_of_what_it_wrote(sidecar: Sidecar) -> None:
    engine = Engine(sidecar, 1, None, True)
    prefix, half = (engine.client.prefix(prompt_of(seed, CHUNKS)) for seed in (1, 3))
    stored = engine.chunks
    assert engine.offload(prefix) == CHUNKS
    assert engine.load(prefix, by_layer=False) == CHUNKS
    raised(sidecar)
    with subprocess.Popen(
        [sys.executable, "-c", DYING, sidecar.target],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as dying:
        assert dying.stdout is not None
        assert dying.stdout.readline() == f"holds {CHUNKS}\n"
        assert sidecar.stats().leases == 2
        os.kill(dying.pid, signal.SIGKILL)
    until(lambda: sidecar.stats().leases == 0, "its leases ended")
    assert engine.client.lookup(half) == 0
    assert engine.load(prefix, by_layer=True) == CHUNKS
    assert engine.chunks == stored
    assert engine.offload(half) == CHUNKS
    engine.close()


BARE = """
import asyncio, sys, threading
from kvtier.config import load
from kvtier.service.build import build

async def run(directory):
    settings = [f"cpu.directory={directory}", f"disk.directory={directory}/disk",
                "cpu.capacity=16MiB", "disk.capacity=64MiB"]
    core = build(load(None, {}, settings), lambda *progress: None)
    core.start()
    names = [thread.name for thread in threading.enumerate()]
    assert core.vram is None and core.cache.placement.vram is None
    assert not [name for name in names if "-up-" in name or "-down-" in name], names
    await core.stop()

asyncio.run(run(sys.argv[1]))
wrong = {"cupy", "torch", "kvtier.kernels.cuda", "kvtier.kernels.cuda_driver",
         "kvtier.kernels.cubins", "kvtier.kernels.host", "kvtier.kernels.compiled"}
assert not wrong & sys.modules.keys(), wrong & sys.modules.keys()
assert "libcuda" not in open("/proc/self/maps").read()
"""


def test_without_the_setting_nothing_of_a_gpu_is_built_or_imported(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], check=True, timeout=HANG_S)
