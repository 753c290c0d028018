"""The kernels compiled for the CPU: the device's source, run one thread after the other.

It is how the kernels are tested, and used, where there is no GPU.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from kvtier.kernels.device import DeviceError
from kvtier.kernels.source import FOLDER, KERNELS, source

_COMPILERS = ("c++", "g++", "clang++")
# Words are read as other types than they were written; a * b + c must stay two roundings.
_FLAGS = (
    *("-std=c++17", "-O2", "-shared", "-fPIC"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
)
_MOST_MESSAGE_BYTES = 2000  # of a compiler's complaints


class HostKernels:
    """Kernels for the CPU, compiled when they are made first and then kept in `folder`.

    Needs a C++ compiler: `CXX`, or c++, g++ or clang++ on PATH. `folder` is by default
    `kvtier/kernels` in the user's cache folder. Raises DeviceError when there is no compiler, or
    when it fails. For any thread.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._library = ctypes.CDLL(str(_built(folder or _cache_folder())))
        self._run = self._library.kvtier_run
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        self._run.restype = None
        self._kernels = {
            name: ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value
            for name in KERNELS
        }

    def run(self, kernel: str, threads: int, job_address: int) -> None:
        """Run a kernel of `KERNELS` to its end, without the GIL, on at least `threads` threads.

        Raises DeviceError when there is none of that name.
        """
        address = self._kernels.get(kernel)
        if address is None:
            raise DeviceError(f"kernel: {kernel!r} is none of kvtier's: {', '.join(KERNELS)}")
        self._run(address, threads, job_address)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The specification asks to ignore a relative one.
    base = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return base / "kvtier" / "kernels"


def _compiler() -> list[str]:
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise DeviceError(
        f"kernels: no C++ compiler: neither {given[0] if given else ', '.join(_COMPILERS)} is on "
        "PATH; install one, or name it in CXX"
    )


def _built(folder: Path) -> Path:
    """The shared library, compiled unless it is there."""
    text = (FOLDER / "host_shim.h").read_text(encoding="utf-8") + source()
    compiler = _compiler()
    name = hashlib.sha256("\0".join([*compiler, *_FLAGS, text]).encode()).hexdigest()
    path = folder / f"{name}.so"
    if not path.exists():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = _compiled(compiler, text, Path(scratch))
                made.replace(path)  # whole or not at all, also when several compile at once
        except OSError as error:
            raise DeviceError(f"kernels: {folder} cannot hold them: {error}") from error
    return path


def _compiled(compiler: list[str], text: str, scratch: Path) -> Path:
    unit, made = scratch / "kernels.cpp", scratch / "kernels.so"
    unit.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [*compiler, *_FLAGS, "-o", str(made), str(unit)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise DeviceError(
            f"kernels: {shlex.join(compiler)} failed with status {done.returncode}: "
            f"{done.stderr[:_MOST_MESSAGE_BYTES]}"
        )
    return made
