"""The kernels on a GPU: compiled by NVRTC, kept on disk, loaded and launched.

CuPy comes from the caller, so nothing of CUDA is imported here.
"""

import ctypes
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtier.kernels.device import DeviceError
from kvtier.kernels.source import KERNELS, source

# Contraction would round a * b + c once. CuPy's RawModule is not used: it appends -ftz=true to the
# options, which drops the subnormal numbers that the quantisers keep.
_OPTIONS = ("-std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
_THREADS_PER_BLOCK = 256
# A copy of at most this much pageable memory returns before it is done, without waiting for the
# stream (Programming Guide, "Concurrent Execution between Host and Device"), and once the source
# was read (Runtime API, "API synchronization behavior").
_STAGED_BYTES = 64 << 10
INSTALL = "install cupy-cuda13x[ctk] or cupy-cuda12x[ctk]"
_MOST_MESSAGE_CHARACTERS = 2000  # of a compiler's complaints
_DIGEST_BYTES = 32

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Jobs:
    """Where the jobs of one stream are put, one after the other: the stream itself orders them."""

    address: int = 0
    nbytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class GpuKernels:
    """The kernels loaded on the GPU of that number, which must be current for every call.

    `cuda` is `cupy.cuda`, or has its modules; what they raise is passed on. Compiling may take
    seconds (see `kernels_for`). For any thread.
    """

    def __init__(self, cuda: Any, index: int) -> None:
        capability = int(cuda.Device(index).compute_capability)
        self._driver, self._runtime = cuda.driver, cuda.runtime
        self._module = self._driver.moduleLoadData(kernels_for(cuda.nvrtc, capability))
        find = self._driver.moduleGetFunction
        self._functions = {name: find(self._module, name) for name in KERNELS}
        self._jobs: dict[int, _Jobs] = {}
        self._job_memory: list[int] = []
        self._lock = threading.Lock()  # of the two above

    def launch(self, stream: int, kernel: str, threads: int, job: bytes) -> None:
        """As `Device.launch`, on the stream of that handle."""
        if kernel not in self._functions:
            raise DeviceError(f"kernel: {kernel!r} is none of kvtier's: {', '.join(KERNELS)}")
        blocks = -(-threads // _THREADS_PER_BLOCK)
        jobs = self._jobs_of(stream, len(job))
        with jobs.lock:
            self._upload(jobs.address, job, stream)
            word = ctypes.c_uint64(jobs.address)
            words = (ctypes.c_void_p * 1)(ctypes.addressof(word))
            self._driver.launchKernel(
                *(self._functions[kernel], blocks, 1, 1, _THREADS_PER_BLOCK, 1, 1, 0),
                *(stream, ctypes.addressof(words), 0),
            )

    def close(self) -> None:
        """Give back the memory of jobs, and the kernels. Nothing may be running any more."""
        for address in self._job_memory:
            self._runtime.free(address)
        self._driver.moduleUnload(self._module)

    def _jobs_of(self, stream: int, nbytes: int) -> _Jobs:
        with self._lock:
            jobs = self._jobs.setdefault(stream, _Jobs())
            if jobs.nbytes < nbytes:
                room = max(_STAGED_BYTES, 1 << (nbytes - 1).bit_length())
                address = self._runtime.malloc(room)
                # Queued work may still read what there was: it is freed at the end.
                self._job_memory.append(address)
                with jobs.lock:
                    jobs.address, jobs.nbytes = address, room
            return jobs

    def _upload(self, to: int, job: bytes, stream: int) -> None:
        start = ctypes.cast(ctypes.c_char_p(job), ctypes.c_void_p).value or 0
        kind = self._runtime.memcpyHostToDevice
        for offset in range(0, len(job), _STAGED_BYTES):
            nbytes = min(_STAGED_BYTES, len(job) - offset)
            self._runtime.memcpyAsync(to + offset, start + offset, nbytes, kind, stream)


def kernels_for(nvrtc: Any, capability: int, folder: Path | None = None) -> bytes:
    """The kernels for a GPU of that compute capability (90 is 9.0), as a module to load.

    PTX where NVRTC is older than the GPU. `nvrtc` is `cupy.cuda.nvrtc`, or has its functions. What
    was compiled is kept in `folder`, by default `cache_folder()`. Raises DeviceError when NVRTC is
    missing, too new for the GPU, or fails.
    """
    try:
        version, known = nvrtc.getVersion(), nvrtc.getSupportedArchs()
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceError(f"kernels: NVRTC is missing: {error}; {INSTALL}") from error
    supported = [each for each in known if each <= capability]
    if not supported:
        too_old = f"a GPU of compute capability {capability / 10} is older than {min(known) / 10}"
        raise DeviceError(f"kernels: {too_old}, the least of NVRTC {version}; use an older CUDA")
    exact = capability in supported
    architecture = f"-arch=sm_{capability}" if exact else f"-arch=compute_{max(supported)}"
    options = (*_OPTIONS, architecture)
    return kept(
        repr((version, options, source())),
        lambda: _compiled(nvrtc, options, machine_code=exact),
        folder or cache_folder(),
    )


def _compiled(nvrtc: Any, options: tuple[str, ...], machine_code: bool) -> bytes:
    program = nvrtc.createProgram(source(), "kvtier.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getCUBIN(program) if machine_code else nvrtc.getPTX(program))
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)[:_MOST_MESSAGE_CHARACTERS]
        raise DeviceError(f"kernels: NVRTC {nvrtc.getVersion()}: {error}: {log}") from error
    finally:
        nvrtc.destroyProgram(program)


def kept(made_from: str, make: Callable[[], bytes], folder: Path | None) -> bytes:
    """What `make` returns for all that it is made from, from a file where it was made before.

    A file that is torn, of another user or not about this is made anew. A folder that cannot be
    used only costs the time to make it; None is none.
    """
    if folder is None:
        return make()
    key = hashlib.sha256(made_from.encode()).digest()
    path = folder / f"{key.hex()}.cubin"
    content = _read(path, key)
    if content is None:
        content = make()
        try:
            _write(path, key, content)
        except OSError as error:
            _log.warning("kernels: %s cannot keep them: %s", folder, error)
    return content


def cache_folder() -> Path | None:
    """`kvtier/kernels` in the user's cache folder, by the XDG Base Directory Specification; None
    where the user has none."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # the specification asks to ignore it
        try:
            root = Path.home() / ".cache"
        except RuntimeError:  # neither HOME nor an entry for the user
            return None
    return root / "kvtier" / "kernels"


def _read(path: Path, key: bytes) -> bytes | None:
    """The file's content, when it is whole and ours."""
    with suppress(OSError), path.open("rb") as file:
        checksum, content = file.read(_DIGEST_BYTES), file.read()
        ours = os.fstat(file.fileno()).st_uid == os.geteuid()
        if ours and checksum == _checksum(key, content):
            return content
    return None


def _write(path: Path, key: bytes, content: bytes) -> None:
    """Put the file in its place, whole or not at all, also when several do. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(number, "wb") as file:
            file.write(_checksum(key, content) + content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def _checksum(key: bytes, content: bytes) -> bytes:
    """Of what was made, and of what it was made from: a file under another's name is refused."""
    return hashlib.sha256(key + content).digest()
