"""The kernels' source: CUDA for every architecture that is served, and C++ for the CPU."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.kernels.compiled import HostKernels
from kvtier.kernels.device import DeviceError, Place, Region
from kvtier.kernels.paged import PagedCache, extent, gather
from kvtier.kernels.source import KERNELS, digest, source
from kvtier.spaces import Layout
from tests.kernels.nvrtc import CompileError, Nvrtc

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    try:
        return Nvrtc()
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_every_kernel(nvrtc: Nvrtc, architecture: str) -> None:
    cubin = nvrtc.cubin(source(), architecture)
    assert cubin.startswith(b"\x7fELF")
    # A kernel's code is a section of its name; a name may also be the beginning of another one.
    sections = set(re.findall(rb"\.text\.(\w+)\0", cubin))
    assert sections == {name.encode() for name in KERNELS}


def test_nvrtc_refuses_what_is_no_cuda(nvrtc: Nvrtc) -> None:
    with pytest.raises(CompileError, match="no_such_type"):
        nvrtc.cubin(source() + "\n__device__ no_such_type x;", "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_it_without_a_warning_or_a_spill(tmp_path: Path, architecture: str) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    unit = tmp_path / "kernels.cu"
    unit.write_text(source(), encoding="utf-8")
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch={architecture}", "-Werror", "all-warnings"]
    command += ["-Xptxas", "-v", "-o", str(tmp_path / "kernels.cubin"), str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills == [("0", "0")] * len(KERNELS)


def test_the_source_stands_alone() -> None:
    assert "#include" not in source()
    assert source().count("struct Extent {") == 1
    assert re.fullmatch("[0-9a-f]{64}", digest())


def test_threads_never_wait_for_each_other() -> None:
    assert not re.search(r"__shared__|__sync|__shfl|atomic", source())


def test_compiled_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HostKernels(tmp_path)
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    HostKernels(tmp_path)
    assert [(path, path.stat().st_mtime_ns) for path in tmp_path.iterdir()] == [(kept, written)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    HostKernels()
    assert [path.name for path in (tmp_path / "cache/kvtier/kernels").iterdir()] == [kept.name]


def test_without_a_compiler_there_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"no C\+\+ compiler: neither c\+\+, g\+\+, clang\+\+"):
        HostKernels(tmp_path)
    monkeypatch.setenv("CXX", "missing-compiler -m64")
    with pytest.raises(DeviceError, match="neither missing-compiler is on PATH"):
        HostKernels(tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(DeviceError, match="status 3: it is broken"):
        HostKernels(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match="cannot hold them"):
        HostKernels(tmp_path / "file" / "folder")


def test_an_unknown_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="'kvtier_gather_3' is none"):
        HostKernels(tmp_path).run("kvtier_gather_3", 1, 0)


@given(count=st.integers(1, 2**31 - 1), index=st.integers(0, 2**31 - 1))
def test_multiplying_and_shifting_divides(count: int, index: int) -> None:
    extent_of, multiplier, shift = extent(count)
    assert extent_of == count
    assert multiplier < 2**32
    for n in (index, index // count * count, max(index // count * count - 1, 0)):
        assert n * multiplier >> shift == n // count


def test_any_number_of_threads_does_all_the_work(tmp_path: Path) -> None:
    kernels = HostKernels(tmp_path)
    layout = Layout("uint8", layers=6, heads=2, head_dim=7, tokens=9)
    array = np.random.default_rng(3).integers(0, 256, (6, 2, 4, 3, 2, 7), np.uint8)
    cache = PagedCache.of([array], "layer,plane,block,token,head,dim")
    # Blocks 2, 0 and 3 after each other, in the order of the chunk's axes.
    wanted = array[:, :, [2, 0, 3]].reshape(6, 2, 9, 2, 7).transpose(0, 1, 3, 2, 4)
    for threads in (1, 257, 100_000):
        chunk = np.zeros(layout.shape, np.uint8)
        span = Region(Place.DEVICE, chunk.ctypes.data, chunk.nbytes).span(0, chunk.nbytes)
        job = replace(gather(cache, layout, [span], [[2, 0, 3]]), threads=threads)
        words = np.frombuffer(job.job, np.int64).copy()
        kernels.run(job.kernel, job.threads, words.ctypes.data)
        assert np.array_equal(chunk, wanted)
