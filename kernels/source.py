"""The kernels' CUDA source, for whoever compiles it: NVRTC, nvcc, or a C++ compiler for the CPU.

It is one text without any header of CUDA's. Compile it as C++17, and without fast math: quantised
chunks are bit for bit what `quantised_reference.py` says only with IEEE arithmetic.
"""

import hashlib
import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "csrc"
_UNITS = ("paged.cu", "quantise.cu")
_INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"\n', re.MULTILINE)

KERNELS: tuple[str, ...] = (
    *(f"kvtier_{way}_{width}" for way in ("gather", "scatter") for width in (16, 8, 4, 2, 1)),
    *(
        f"kvtier_{way}_{scheme}_{dtype}"
        for way in ("quantise", "dequantise")
        for scheme in ("int8", "int4")
        for dtype in ("float32", "float16", "bfloat16")
    ),
)


@cache
def source() -> str:
    """All kernels, with the headers they include, each once."""
    included: set[str] = set()
    return "\n".join(_inlined(unit, included) for unit in _UNITS)


@cache
def digest() -> str:
    """SHA-256 of the source, in hexadecimal: what a compiled copy of it is known by."""
    return hashlib.sha256(source().encode()).hexdigest()


def _inlined(name: str, included: set[str]) -> str:
    if name in included:
        return ""
    included.add(name)
    text = (FOLDER / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
    return _INCLUDE.sub(lambda match: _inlined(match[1], included), text)
