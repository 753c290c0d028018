"""PyTorch's tensors as an engine's blocks: used where they are, tied to a stream of the engine's.

On the simulated device, whose memory is the CPU's.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.client import PagedEngine, connect
from kvtier.kernels.compiled import HostKernels
from kvtier.kernels.device import Urgency
from kvtier.kernels.host import Chaos, HostDevice
from kvtier.kernels.paged import PagedCache
from kvtier.proto import cache_pb2 as pb
from kvtier.spaces import Layout, Space
from tests.faults.fake_service import FakeService
from tests.sidecar import HANG_S

torch = pytest.importorskip("torch")

LAYERS, CHUNKS, BLOCKS, BLOCK_TOKENS = 2, 4, 20, 4
LAYOUT = Layout("bfloat16", layers=LAYERS, heads=2, head_dim=8, tokens=8)
SPACE = Space("m", LAYOUT)
PROMPT = range(CHUNKS * LAYOUT.tokens)
TABLES = [[7, 2], [19, 0], [4, 5], [11, 3]]


class Fake(FakeService):
    """Has no VRAM."""

    def opened(self, path: "pb.DataPath.ValueType") -> pb.SessionOpened:
        return super().opened(pb.DATA_PATH_SHM)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    with Fake(tmp_path, SPACE) as service:
        yield service


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def tensors(seed: int) -> list[tuple[Any, Any]]:
    """Keys and values of each layer, [block, token, head, dim], heads before tokens in memory."""
    torch.manual_seed(seed)
    shape = (BLOCKS, LAYOUT.heads, BLOCK_TOKENS, LAYOUT.head_dim)
    each = [torch.randn(shape).to(torch.bfloat16).transpose(1, 2) for _ in range(2 * LAYERS)]
    return [(each[2 * n], each[2 * n + 1]) for n in range(LAYERS)]


def as_they_are(tensor: Any) -> Any:
    return tensor


def by_dlpack(tensor: Any) -> Any:
    return SimpleNamespace(__dlpack__=tensor.__dlpack__, __dlpack_device__=tensor.__dlpack_device__)


@pytest.mark.parametrize("form", [as_they_are, by_dlpack])
@pytest.mark.parametrize("seed", range(3))
def test_tensors_are_filled_and_read_in_place(
    fake: Fake, kernels: HostKernels, form: Any, seed: int
) -> None:
    device = HostDevice(Chaos(seed), kernels)
    source, target = tensors(1), tensors(2)
    engines_own = device.stream(Urgency.LOADS)  # as PyTorch would have made it
    stream = device.stream_of(engines_own.handle)
    untouched = [block for block in range(BLOCKS) if not any(block in each for each in TABLES)]
    before = [tensor[untouched].clone() for planes in target for tensor in planes]
    with connect(fake.target, SPACE, deadline_s=HANG_S, device=device) as client:
        assert client.wait_ready(HANG_S)
        prefix = client.prefix(PROMPT)

        def engine_of(layers: list[tuple[Any, Any]]) -> PagedEngine:
            given = [tuple(form(tensor) for tensor in planes) for planes in layers]
            cache = PagedCache.of(given, "block,token,head,dim")
            return PagedEngine(client, device, cache, staging_bytes=1 << 16, least_copy_bytes=1)

        with engine_of(source) as engine:
            outcome = engine.offload(prefix, TABLES, after=stream.record())
            assert outcome.stored == list(range(CHUNKS))
        with (
            engine_of(target) as engine,
            engine.load(prefix, TABLES, after=stream.record(), by_layer=True) as load,
        ):
            for layer in range(LAYERS):
                stream.wait(load.ready(layer))
                stream.synchronize()
                for one, other in zip(source[layer], target[layer], strict=True):
                    for table in TABLES:
                        assert torch.equal(one[table], other[table])
            assert load.finish() == CHUNKS
    after = [tensor[untouched] for planes in target for tensor in planes]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    device.close()
