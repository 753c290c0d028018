"""NVIDIA's runtime compiler, as far as these tests need it; it needs no GPU and no driver."""

import ctypes
import ctypes.util
from contextlib import suppress
from importlib import metadata

PACKAGE = "nvidia-cuda-nvrtc"


class CompileError(Exception):
    """NVRTC refused or warned; the message is its log."""


class Nvrtc:
    """One libnvrtc. Raises OSError when there is none, in the package or on the loader's path."""

    def __init__(self) -> None:
        self._library = _load()
        self._library.nvrtcDestroyProgram.argtypes = (ctypes.POINTER(ctypes.c_void_p),)

    def version(self) -> tuple[int, int]:
        """Such as (13, 0)."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def cubin(self, source: str, architecture: str) -> bytes:
        """Machine code for an architecture such as "sm_90". Raises CompileError."""
        library, program = self._library, ctypes.c_void_p()
        status = library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
        )
        assert status == 0, f"nvrtcCreateProgram: {status}"
        try:
            options = (ctypes.c_char_p * 2)(b"--std=c++17", f"-arch={architecture}".encode())
            status = library.nvrtcCompileProgram(program, len(options), options)
            log = self._bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            if status or log.strip(b"\0\n"):
                raise CompileError(log.decode(errors="replace"))
            return self._bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, size_of: str, get: str) -> bytes:
        size = ctypes.c_size_t()
        assert getattr(self._library, size_of)(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert getattr(self._library, get)(program, buffer) == 0
        return buffer.raw


def _load() -> ctypes.CDLL:
    names = []
    with suppress(metadata.PackageNotFoundError):
        files = metadata.files(PACKAGE) or []
        names += [str(f.locate()) for f in files if f.name.startswith("libnvrtc.so")]
    found = ctypes.util.find_library("nvrtc")
    names += [found] if found else []
    for name in names:
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError(f"no libnvrtc: install the package {PACKAGE}, or CUDA")
