"""Where a device, or a chunk's place on it, cannot be had: the way without one."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvtier.client import Client  # noqa: E402
from kvtier.connectors.vllm import device_copies as module  # noqa: E402
from kvtier.connectors.vllm.copies import HostCopies  # noqa: E402
from kvtier.connectors.vllm.device_copies import DeviceCopies, open_copies  # noqa: E402
from kvtier.connectors.vllm.lookups import Secured  # noqa: E402
from kvtier.connectors.vllm.paged import Pages  # noqa: E402
from kvtier.connectors.vllm.parts import Part  # noqa: E402
from kvtier.connectors.vllm.working import Working  # noqa: E402
from kvtier.kernels.compiled import HostKernels  # noqa: E402
from kvtier.kernels.device import Device, DeviceError, Stream, Urgency  # noqa: E402
from kvtier.kernels.host import Chaos, HostDevice  # noqa: E402
from tests.connectors.vllm.conftest import OpenCache  # noqa: E402
from tests.connectors.vllm.device_world import DEEP, LAYERS, CountedKernels  # noqa: E402
from tests.connectors.vllm.making import BLOCK  # noqa: E402
from tests.connectors.vllm.workplace import (  # noqa: E402
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
from tests.sidecar import HANG_S  # noqa: E402


def test_what_the_device_does_not_reach_goes_the_other_way(open_cache: OpenCache) -> None:
    """As after a session that goes on without its device."""
    device = HostDevice(Chaos(3))
    stream = device.stream(Urgency.LOADS)
    client: Client = open_cache(DEEP[0])
    places, workers = [], []
    for seed in (1, 2):
        places.append(place_of(DEEP, seed))
        stored = stored_of(DEEP, places[-1], {DEEP[0].digest: client})
        copies = DeviceCopies(device, lambda: stream, [each.pages for each in stored])
        workers.append(Working(stored, copies, HANG_S, BLOCK))
        workers[-1]._parts = ()  # the client is shared
    one, other = workers
    one.offload(step_with(offload(1, 10, DEEP, SOURCE)))
    finish(one, 1)
    secured = Secured(0)
    secured.secure(client, DEEP[0].digest, run(DEEP[0], 10, 0, SOURCE).prefix, HANG_S)
    other.prepare("r10", secured)
    late = torch.rand(3, *places[1].caches[LAYERS[0]].shape)  # what the engine is about to write
    for name, content in zip(LAYERS, late, strict=True):
        pair = [
            device.adopt(each.data_ptr(), each.nbytes).span(0, each.nbytes)
            for each in (places[1].caches[name], content)
        ]
        device.copy(stream, [(pair[0], pair[1])])
    other.load(step(1, load(10, DEEP, TARGET)))
    stream.synchronize()
    assert other.bad_blocks() == set()
    assert same(places[1].tokens(DEEP[0], TARGET), places[0].tokens(DEEP[0], SOURCE))
    for worker in workers:
        worker.close()
    device.close()


def pages_of(of: Sequence[Part] = DEEP, where: str = "cpu") -> list[Any]:
    place = place_of(of, 1)
    found: list[Any] = [Pages(part, place.caches, [64] * 3) for part in of]
    for pages in found:
        pages.device = torch.device(where)
    return found


def test_blocks_on_a_cpu_need_no_device() -> None:
    copies, device = open_copies(pages_of())
    assert isinstance(copies, HostCopies)
    assert device is None


class Fallback:
    """What goes by way of torch."""

    def close(self) -> None:
        pass


def engine_stream(device: Device, where: Any) -> Stream:
    assert where.type == "cuda"
    return device.stream(Urgency.LOADS)


def dead() -> Device:
    kernels = CountedKernels(HostKernels())
    kernels.fail = True
    return HostDevice(kernels=kernels)


def absent() -> Device:
    raise DeviceError("cuda:3: no driver")


@pytest.mark.parametrize(
    ("opened", "says"),
    [
        (absent, "no driver"),
        (dead, "a kernel is on fire"),
        (lambda: HostDevice(memory_bytes=1), "allocate"),
    ],
    ids=["absent", "without kernels", "full"],
)
def test_a_device_that_cannot_be_had_is_said_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, opened: Any, says: str
) -> None:
    asked: list[str] = []
    made: list[Any] = []

    def open_device(name: str) -> Device:
        asked.append(name)
        made.append(opened())
        return made[-1]  # type: ignore[no-any-return]

    fallback = Fallback()
    monkeypatch.setattr(module, "open_device", open_device)
    monkeypatch.setattr(module, "copies_for", lambda where: fallback)
    monkeypatch.setattr(module, "_current", engine_stream)
    with caplog.at_level(logging.WARNING):
        assert open_copies(pages_of(where="cuda:3")) == (fallback, None)
    assert asked == ["cuda:3"]
    (record,) = caplog.records
    assert says in record.getMessage()
    for device in made:
        with pytest.raises(DeviceError, match="closed"):
            device.allocate(1)


def test_a_device_that_can_be_had_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_device", lambda name: HostDevice(memory_bytes=4096))
    monkeypatch.setattr(module, "copies_for", lambda where: Fallback())
    monkeypatch.setattr(module, "_current", engine_stream)
    pages = pages_of(where="cuda:0")
    copies, device = open_copies(pages)
    assert isinstance(copies, DeviceCopies)
    assert device is not None
    copies.close()
    with pytest.raises(DeviceError, match="closed"):
        copies.scatter(pages[0], [], None)
    device.allocate(4096)  # staging was given back
    device.close()


def test_rows_that_are_not_contiguous_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fallback = Fallback()
    monkeypatch.setattr(module, "open_device", lambda name: HostDevice())
    monkeypatch.setattr(module, "copies_for", lambda where: fallback)
    monkeypatch.setattr(module, "_current", engine_stream)
    caches = {name: torch.rand(64, 2, 4, BLOCK).transpose(2, 3) for name in LAYERS}
    pages: Any = Pages(DEEP[0], caches, [64])
    pages.device = torch.device("cuda:0")
    with caplog.at_level(logging.WARNING):
        assert open_copies([pages]) == (fallback, None)
    assert "rows of dim must be contiguous" in caplog.text
