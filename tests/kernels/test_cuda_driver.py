"""What a result file says of the GPU: the driver's release and the versions of CUDA."""

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.kernels import cubins, cuda
from kvtier.kernels.cuda import CudaDevice
from kvtier.kernels.cuda_driver import driver_release
from tests.kernels.fake_cuda import FakeCuda


class Nvml:
    """libnvidia-ml. Its calls return a status; 0 is success."""

    def __init__(self, *, starts: int = 0, answers: int = 0) -> None:
        self.started = 0
        self._starts, self._answers = starts, answers

    def nvmlInit_v2(self) -> int:  # noqa: N802
        self.started += not self._starts
        return self._starts

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.started -= 1
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, room: ctypes.c_uint) -> int:  # noqa: N802
        if not self._answers:
            ctypes.memmove(text, b"580.95.05\0", 10)
        assert ctypes.sizeof(text) == room.value == 80
        return self._answers


@pytest.mark.parametrize(
    ("nvml", "release"),
    [(Nvml(), "580.95.05"), (Nvml(starts=9), "unknown"), (Nvml(answers=7), "unknown")],
)
def test_the_release_is_nvmls(monkeypatch: pytest.MonkeyPatch, nvml: Nvml, release: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    assert driver_release() == release
    assert nvml.started == 0


def test_without_nvml_the_release_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert driver_release() == "unknown"


def test_a_gpu_says_its_model_and_all_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(cuda, "Driver", lambda index: fake)
    monkeypatch.setattr(cuda, "driver_release", lambda: "580.95.05")
    monkeypatch.setattr(cubins, "kernels_for", lambda nvrtc, capability: b"cubin")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=fake, __version__="14.2.0"))
    assert CudaDevice(3).describe() == {
        "model": "NVIDIA Imaginary",
        "driver": "580.95.05",
        "driver_cuda": "13.2",
        "runtime_cuda": "12.9",
        "cupy": "14.2.0",
    }
