"""vLLM engines for the tests: one without a connector, and two that share a service."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.bench.demo.model import ModelUnavailable, obtain
from tests.engines.vllm_process import Engine, Engines, Reference, connected_to, emptied
from tests.sidecar import ROOT, Sidecar

VARIABLE = "TEST_VLLM_PYTHON"


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    python = Path(os.environ.get(VARIABLE) or ROOT / ".venv-vllm" / "bin" / "python")
    if not python.is_file():
        pytest.skip(f"no vLLM: {VARIABLE} names no interpreter, and `make vllm-env` made none")
    engines = Engines(python)
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def model() -> Path:
    try:
        return obtain(ROOT / "out" / "models", lambda step: None)
    except ModelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def reference(engines: Engines, model: Path) -> Iterator[Reference]:
    document = (ROOT / "bench" / "demo" / "document.txt").read_text(encoding="utf-8")
    with Engine(engines, model) as engine:
        yield Reference(engine, engine.ask("encode", text=document))


@pytest.fixture(scope="session")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """The service of `first` and `second`."""
    sizes = ["cpu.capacity=1GiB", "disk.capacity=3GiB"]
    with Sidecar(tmp_path_factory.mktemp("sidecar"), *sizes) as running:
        yield running


@pytest.fixture(scope="session")
def first_engine(engines: Engines, model: Path, sidecar: Sidecar) -> Iterator[Engine]:
    with Engine(
        engines, model, num_gpu_blocks_override=80, **connected_to(sidecar.target)
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def second_engine(engines: Engines, model: Path, sidecar: Sidecar) -> Iterator[Engine]:
    with Engine(
        engines, model, num_gpu_blocks_override=80, **connected_to(sidecar.target)
    ) as engine:
        yield engine


@pytest.fixture
def first(first_engine: Engine) -> Engine:
    """An engine whose own cache is empty."""
    return emptied(first_engine)


@pytest.fixture
def second(second_engine: Engine) -> Engine:
    """Another one, on the same service."""
    return emptied(second_engine)
