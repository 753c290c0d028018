"""Kernels for a GPU, kept on disk. Needs no GPU; some tests need NVRTC, or CuPy."""

import logging
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.kernels.cubins import cache_folder, kept, kernels_for
from kvtier.kernels.device import DeviceError
from kvtier.kernels.source import KERNELS, source
from tests.kernels.nvrtc import Nvrtc

FRESH = b"made anew" * 20


class Made:
    """Makes something, and counts."""

    def __init__(self, content: bytes = FRESH) -> None:
        self.content = content
        self.count = 0

    def __call__(self) -> bytes:
        self.count += 1
        return self.content


def test_what_was_made_is_made_once(tmp_path: Path) -> None:
    folder, made = tmp_path / "some" / "folder", Made()
    assert [kept("this", made, folder) for _ in range(3)] == [FRESH] * 3
    assert made.count == 1
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_it_is_made_from_tells_it_from_others(tmp_path: Path) -> None:
    assert kept("this", Made(b"one"), tmp_path) == b"one"
    assert kept("that", Made(b"other"), tmp_path) == b"other"
    assert kept("this", Made(), tmp_path) == b"one"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_that_is_not_what_was_written_is_made_anew(
    tmp_path: Path, data: st.DataObject
) -> None:
    kept("this", Made(), tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if data.draw(st.booleans(), "torn"):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), "length")])
    else:
        changed = bytearray(whole)
        changed[data.draw(st.integers(0, len(whole) - 1), "byte")] ^= data.draw(st.integers(1, 255))
        path.write_bytes(changed)
    made = Made()
    assert [kept("this", made, tmp_path), kept("this", made, tmp_path)] == [FRESH] * 2
    assert made.count == 1
    assert path.read_bytes() == whole


def test_a_file_under_the_name_of_another_is_made_anew(tmp_path: Path) -> None:
    kept("this", Made(b"one"), tmp_path / "one")
    kept("that", Made(b"other"), tmp_path / "other")
    ((one,), (other,)) = ((tmp_path / each).iterdir() for each in ("one", "other"))
    other.replace(one)
    assert kept("this", Made(), tmp_path / "one") == FRESH


def test_a_folder_that_cannot_be_used_only_costs_the_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, made = tmp_path / "file", Made()
    file.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert [kept("this", made, file), kept("this", made, file)] == [FRESH] * 2
    assert made.count == 2
    assert "cannot keep them" in caplog.text
    assert kept("this", made, None) == FRESH


def test_what_cannot_be_put_in_its_place_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(Path, "replace", refuse)
    assert kept("this", Made(), tmp_path) == FRESH
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_made_is_not_kept(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise DeviceError("no compiler")

    with pytest.raises(DeviceError):
        kept("this", fail, tmp_path)
    assert kept("this", Made(), tmp_path) == FRESH


@pytest.mark.parametrize(
    ("given", "folder"), [("/cache", "/cache"), ("cache", "/me/.cache"), ("", "/me/.cache")]
)
def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, given: str, folder: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", "/me")
    assert cache_folder() == Path(folder) / "kvtier" / "kernels"


def test_a_user_without_a_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None


# ── The compiler ─────────────────────────────────────────────────────────────────────────────


class FakeNvrtc:
    """Answers as `cupy.cuda.nvrtc`; what it makes are its options."""

    NVRTCError = type("NVRTCError", (RuntimeError,), {})

    def __init__(self, version: tuple[int, int] = (13, 0)) -> None:
        self.version = version
        self.programs: list[str] = []
        self.compiled: list[tuple[str, ...]] = []
        self.fails = False

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return self.version

    def getSupportedArchs(self) -> list[int]:  # noqa: N802
        return [75, 80, 90]

    def createProgram(self, text: str, name: str, *headers: Any) -> str:  # noqa: N802
        self.programs.append(text)
        return text

    def compileProgram(self, program: str, options: tuple[str, ...]) -> None:  # noqa: N802
        if self.fails:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION")
        self.compiled.append(options)

    def getProgramLog(self, program: str) -> str:  # noqa: N802
        return "line 1: error"

    def getCUBIN(self, program: str) -> bytes:  # noqa: N802
        return b"cubin" + repr(self.compiled[-1]).encode()

    def getPTX(self, program: str) -> bytes:  # noqa: N802
        return b"ptx" + repr(self.compiled[-1]).encode()

    def destroyProgram(self, program: str) -> None:  # noqa: N802
        self.programs.remove(program)


@pytest.mark.parametrize(
    ("capability", "kind", "architecture"),
    [(80, b"cubin", "sm_80"), (90, b"cubin", "sm_90"), (120, b"ptx", "compute_90")],
)
def test_a_gpu_gets_its_machine_code_or_the_newest_ptx(
    tmp_path: Path, capability: int, kind: bytes, architecture: str
) -> None:
    nvrtc = FakeNvrtc()
    made = [kernels_for(nvrtc, capability, tmp_path) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0].startswith(kind)
    assert [options[-1] for options in nvrtc.compiled] == [f"-arch={architecture}"]
    assert nvrtc.programs == []


def test_another_gpu_or_compiler_gets_kernels_of_its_own(tmp_path: Path) -> None:
    first, updated = FakeNvrtc(), FakeNvrtc((13, 1))
    for nvrtc in (first, updated):
        for capability in (80, 90, 80, 90):
            kernels_for(nvrtc, capability, tmp_path)
        assert len(nvrtc.compiled) == 2


def test_a_gpu_that_nvrtc_does_not_know_any_more_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"capability 7.0 is older than 7.5"):
        kernels_for(FakeNvrtc(), 70, tmp_path)


def test_no_nvrtc_is_said_with_its_remedy(tmp_path: Path) -> None:
    def missing() -> None:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    with pytest.raises(DeviceError, match=r"NVRTC is missing: libnvrtc.*; install cupy-cuda13x"):
        kernels_for(SimpleNamespace(getVersion=missing), 90, tmp_path)


def test_what_the_compiler_complains_of_is_said(tmp_path: Path) -> None:
    nvrtc = FakeNvrtc()
    nvrtc.fails = True
    with pytest.raises(DeviceError, match="COMPILATION: line 1: error"):
        kernels_for(nvrtc, 90, tmp_path)
    assert nvrtc.programs == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_cubin_comes_back_bit_for_bit(tmp_path: Path) -> None:
    try:
        nvrtc = Nvrtc()
    except OSError as error:
        pytest.skip(str(error))
    made = kept("real", lambda: nvrtc.cubin(source(), "sm_90"), tmp_path)
    assert made.startswith(b"\x7fELF")
    assert kept("real", Made(), tmp_path) == made


@pytest.mark.slow
def test_the_kernels_compile_as_written_and_keep_subnormal_numbers(tmp_path: Path) -> None:
    nvrtc = pytest.importorskip("cupy").cuda.nvrtc
    try:
        newest = max(nvrtc.getSupportedArchs())
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    assert kernels_for(nvrtc, 90, tmp_path).startswith(b"\x7fELF")
    ptx = kernels_for(nvrtc, newest + 1, tmp_path)
    assert all(f".entry {name}(".encode() in ptx for name in KERNELS)
    assert b".ftz" not in ptx
    assert b"fma.rn" not in ptx
