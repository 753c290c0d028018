"""Workers on a device beside a real service: hits in RAM and VRAM, ahead of the engine and beside
it, and what fails.

The device is the simulated one, in both processes: its memory crosses them as a GPU's would.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvtier.client import connect  # noqa: E402
from kvtier.connectors.vllm.copies import Landed  # noqa: E402
from kvtier.connectors.vllm.device_copies import DeviceCopies  # noqa: E402
from kvtier.connectors.vllm.lookups import Secured  # noqa: E402
from kvtier.connectors.vllm.orders import StepReport  # noqa: E402
from kvtier.connectors.vllm.paged import Pages  # noqa: E402
from kvtier.connectors.vllm.parts import Part, Shard, parts_of  # noqa: E402
from kvtier.connectors.vllm.working import Working, asks_by_layer  # noqa: E402
from kvtier.kernels.compiled import HostKernels  # noqa: E402
from kvtier.kernels.device import Urgency  # noqa: E402
from kvtier.kernels.host import Chaos, HostDevice  # noqa: E402
from tests.connectors.vllm.device_world import ALWAYS, DEEP, LAYERS, CountedKernels  # noqa: E402
from tests.connectors.vllm.making import BLOCK, MODEL, layer  # noqa: E402
from tests.connectors.vllm.workplace import (  # noqa: E402
    CHUNK,
    SOURCE,
    TARGET,
    finish,
    load,
    offload,
    place_of,
    run,
    same,
    step,
    step_with,
    stored_of,
)
from tests.sidecar import HANG_S, Sidecar, until  # noqa: E402

GPU = ("gpu.device=host", "gpu.capacity=1MiB")
# A window in a group of its own, and full attention in two groups.
HYBRID = parts_of(
    [
        layer("model.layers.0.attn", 0),
        layer("model.layers.1.attn", 1, window=12),
        layer("model.layers.2.attn", 2),
    ],
    MODEL, Shard(), CHUNK,
)  # fmt: skip


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    with Sidecar(tmp_path, *GPU) as running:
        yield running


class Engine:
    """An engine's process: its device, its blocks and its worker."""

    def __init__(self, target: str, of: Sequence[Part], seed: int, chaos: int | None) -> None:
        self.kernels = CountedKernels(HostKernels())
        self.device = HostDevice(None if chaos is None else Chaos(chaos), self.kernels)
        self.stream = self.device.stream(Urgency.LOADS)
        self.place = place_of(of, seed)
        self.clients: dict[bytes, Any] = {
            part.digest: connect(target, part.space, deadline_s=HANG_S, device=self.device)
            for part in of
        }
        assert all(client.wait_ready(HANG_S) for client in self.clients.values())
        stored = stored_of(of, self.place, self.clients)
        self.copies = DeviceCopies(
            self.device,
            lambda: self.stream,
            [each.pages for each in stored],
            least_copy_bytes=ALWAYS,
            least_layer_bytes=ALWAYS,
        )
        self.worker = Working(stored, self.copies, HANG_S, BLOCK)

    def store(self, prompt: int, of: Sequence[Part]) -> None:
        self.worker.offload(step_with(offload(1, prompt, of, SOURCE)))
        finish(self.worker, 1)

    def secure(self, prompt: int, of: Sequence[Part] = DEEP) -> Secured:
        """Have a prompt secured for a load in line."""
        secured = Secured(0)
        for part in of:
            prefix = run(part, prompt, 0, SOURCE).prefix
            secured.secure(self.clients[part.digest], part.digest, prefix, HANG_S)
        self.worker.prepare(f"r{prompt}", secured)
        return secured

    def load_beside(self, prompt: int, of: Sequence[Part]) -> set[str]:
        """Load in the background; the requests that failed."""
        self.worker.load(step(1, load(prompt, of, TARGET, background=True)))
        ended: list[Any] = []

        def has_ended() -> bool:
            arrivals = self.worker.arrivals()
            ended.extend([arrivals] if arrivals.finished else [])
            return bool(ended)

        until(has_ended, "the load has ended")
        failed: set[str] = ended[0].failed
        return failed

    def close(self) -> None:
        self.worker.close()
        self.device.close()


@pytest.fixture(params=[None, 1], ids=["threads", "chaos"])
def engines(sidecar: Sidecar, request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[Engine] = []

    def of(parts: Sequence[Part], seed: int) -> Engine:
        made.append(Engine(sidecar.target, parts, seed, request.param))
        return made[-1]

    yield of
    for engine in made:
        engine.close()


def same_in(mine: Engine, theirs: Engine, of: Sequence[Part]) -> bool:
    return all(
        same(mine.place.tokens(part, TARGET), theirs.place.tokens(part, SOURCE)) for part in of
    )


def test_several_groups_are_loaded_beside_the_steps_from_ram_and_then_from_vram(
    sidecar: Sidecar, engines: Any
) -> None:
    one, other = engines(HYBRID, 1), engines(HYBRID, 2)
    one.store(3, HYBRID)
    assert one.worker.tally.take()["offloaded_chunks"] == 8
    assert other.load_beside(3, HYBRID) == set()
    assert same_in(other, one, HYBRID)
    until(lambda: sidecar.stats().counters["raised_chunks"] >= 8, "chunks are raised")
    again = engines(HYBRID, 4)
    hits = sidecar.stats().counters["load_vram_hits"]
    assert again.load_beside(3, HYBRID) == set()
    assert same_in(again, one, HYBRID)
    assert sidecar.stats().counters["load_vram_hits"] == hits + 8
    until(lambda: sidecar.stats().leases == 0, "the leases ended")


def test_what_came_from_vram_counts_only_if_the_service_still_held_it(
    sidecar: Sidecar, engines: Any
) -> None:
    one, other = engines(DEEP, 1), engines(DEEP, 2)
    one.store(4, DEEP)
    assert other.load_beside(4, DEEP) == set()
    until(lambda: sidecar.stats().counters["raised_chunks"] >= 4, "chunks are raised")
    scatter = other.copies.scatter

    def killed(pages: Pages, chunks: Sequence[Landed], after: object) -> None:
        assert not any(chunk.data for chunk in chunks)  # all in VRAM
        scatter(pages, chunks, after)
        sidecar.kill()

    other.copies.scatter = killed
    assert other.load_beside(4, DEEP) == {"r4"}


def test_a_secured_load_is_ahead_of_the_forward(sidecar: Sidecar, engines: Any) -> None:
    one, other = engines(DEEP, 1), engines(DEEP, 2)
    one.store(5, DEEP)
    secured = other.secure(5)
    other.worker.load(step(1, load(5, DEEP, TARGET), confirm=True))
    assert secured.chunks  # their memory is being read
    other.stream.synchronize()  # the forward; nobody has called before_layer
    assert same_in(other, one, DEEP)
    assert other.worker.bad_blocks() == set()
    assert not secured.chunks
    assert other.worker.report() == StepReport(confirmed={1})
    counted = other.worker.tally.take()
    assert counted["load_seconds"] > 0
    assert (counted["loaded_chunks"], counted.get("failed_loads", 0)) == (4, 0)
    until(lambda: sidecar.stats().leases == 0, "the lease ended")


def test_what_was_not_secured_is_loaded_when_the_load_returns(
    sidecar: Sidecar, engines: Any
) -> None:
    """Its lease has ended then. It takes nothing from VRAM, which could be lost."""
    one, other = engines(DEEP, 1), engines(DEEP, 2)
    one.store(11, DEEP)
    assert one.load_beside(11, DEEP) == set()
    until(lambda: sidecar.stats().counters["raised_chunks"] >= 4, "chunks are raised")
    hits = sidecar.stats().counters["load_vram_hits"]
    for name in LAYERS:
        other.worker.before_layer(name)
    other.worker.load(step(1, load(11, DEEP, TARGET)), by_layer=True)
    assert same_in(other, one, DEEP)
    assert sidecar.stats().counters["load_vram_hits"] == hits
    assert other.worker.bad_blocks() == set()


class Begun:
    """Notes how loads were begun."""

    def __init__(self, engine: Engine) -> None:
        self.by_layer: list[bool] = []
        self._begin = engine.copies.begin
        engine.copies.begin = self  # type: ignore[method-assign, assignment]

    def __call__(self, *arguments: Any, by_layer: bool) -> Any:
        self.by_layer.append(by_layer)
        return self._begin(*arguments, by_layer=by_layer)


def test_loads_come_by_layer_once_every_layer_has_asked(sidecar: Sidecar, engines: Any) -> None:
    one, other = engines(DEEP, 1), engines(DEEP, 2)
    one.store(6, DEEP)
    begun = Begun(other)

    def ordered(stop: int | None = None, *, by_layer: bool = True) -> None:
        other.secure(6)
        order = load(6, DEEP, TARGET, stop=stop)
        other.worker.load(step(1, order), by_layer=by_layer)

    for asked in LAYERS:
        ordered()
        other.worker.before_layer(asked)  # one of them never did until the last step
        assert other.worker.bad_blocks() == set()
    assert begun.by_layer == [False] * 3
    for name in LAYERS:
        other.place.caches[name].zero_()
    ordered()
    assert begun.by_layer.pop() is True
    for name in LAYERS:
        other.worker.before_layer(name)
        other.stream.synchronize()
        mine, theirs = other.place.caches[name], one.place.caches[name]
        assert torch.equal(mine[TARGET], theirs[SOURCE])
    assert other.worker.bad_blocks() == set()
    ordered(stop=len(TARGET) * BLOCK - 1)  # the forward writes the last token of a loaded block
    ordered(by_layer=False)
    assert begun.by_layer == [False] * 5
    assert other.worker.bad_blocks() == set()


def test_two_parts_are_loaded_by_layer(sidecar: Sidecar, engines: Any) -> None:
    both = [DEEP[0], HYBRID[1]]  # of the same group
    one, other = engines(both, 1), engines(both, 2)
    one.store(7, both)
    names = [name for part in both for name, _ in part.layers]
    for name in names:
        other.worker.before_layer(name)
    other.secure(7, both)
    other.worker.load(step(1, load(7, both, TARGET)), by_layer=True)
    for name in names:
        other.worker.before_layer(name)
    other.stream.synchronize()
    assert same_in(other, one, both)
    assert other.worker.bad_blocks() == set()


def test_a_load_that_fails_ahead_of_the_forward_is_told_with_its_step(
    sidecar: Sidecar, engines: Any
) -> None:
    one, other = engines(DEEP, 1), engines(DEEP, 2)
    one.store(8, DEEP)
    secured = other.secure(8)
    other.kernels.fail = True
    other.worker.load(step(2, load(8, DEEP, TARGET, start=BLOCK), confirm=True))
    assert other.worker.bad_blocks() == set(TARGET[1:])
    assert other.worker.report() == StepReport(confirmed={2}, failed={"r8"})
    assert not secured.chunks
    assert other.worker.tally.take()["failed_loads"] == 1
    assert other.load_beside(8, DEEP) == {"r8"}
    other.worker.offload(step_with(offload(1, 9, DEEP, SOURCE)))
    finish(other.worker, 1)
    assert not other.worker.tally.take().get("offloaded_chunks")
    assert other.clients[DEEP[0].digest].lookup(run(DEEP[0], 9, 0, SOURCE).prefix) == 0
    until(lambda: sidecar.stats().leases == 0, "the leases ended")


@pytest.mark.parametrize(
    ("mode", "metadata", "asks"),
    [
        ("NONE", {}, True),
        ("PIECEWISE", {}, True),
        ("FULL", {}, False),
        ("NONE", None, False),  # before vLLM has decided, and where there is no forward
        ("SOMETHING_NEW", {}, False),
    ],
)
def test_a_forward_asks_by_layer_unless_it_is_one_graph(
    mode: str, metadata: Any, asks: bool
) -> None:
    context = SimpleNamespace(
        cudagraph_runtime_mode=SimpleNamespace(name=mode), attn_metadata=metadata
    )
    assert asks_by_layer(context) is asks
    assert not asks_by_layer(None)
