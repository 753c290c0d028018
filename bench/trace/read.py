"""Traces from files, which are not believed before they are checked.

`.npz`     arrays `t` float64[R], `off` int[R + 1], `blk` int, `parent` int[N], `partial` uint8[N]:
           request r came at t[r] seconds and needs the chunks blk[off[r]:off[r + 1]]; where there
           is `hint` int8[R], it says why r's turn ended: 1 in a tool call, 2 of itself, 0 unknown
`.jsonl`   Mooncake's: a line for each request, {"timestamp": ms, "input_length": tokens,
           "output_length": tokens, "hash_ids": [...]}, in chunks of 512 tokens
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.bench.trace.requests import Ints, Trace
from kvtier.errors import InvalidRequest

_MOST_BYTES = 4 << 30  # of a file, and of each array in it
_MOST_LINE_BYTES = 16 << 20
_MOST_MS = 1e15
_MOONCAKE_TOKENS = 512
_ARRAYS = {"t": "f", "off": "iu", "blk": "iu", "parent": "iu", "partial": "biu"}
_STOPS = "hint"


def read_trace(path: Path) -> Trace:
    """The trace in a file. Raises InvalidRequest, which names the request or the line, when it is
    not one."""
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise InvalidRequest(f"{path}: {size} bytes; a trace has at most {_MOST_BYTES}")
        trace = _read_npz(path) if path.suffix == ".npz" else _read_jsonl(path)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror or error}") from None
    if not trace.references:
        raise InvalidRequest(f"{path}: there is no request in it")
    return trace


# ── npz ───────────────────────────────────────────────────────────────────────────────────────────


def _read_npz(path: Path) -> Trace:
    arrays = _arrays(path)
    times_s, starts, chunks = (arrays[name] for name in ("t", "off", "blk"))
    parent, partly = arrays["parent"], arrays["partial"]
    if len(starts) != len(times_s) + 1:
        raise InvalidRequest(f"{path}: off: {len(starts)} numbers for {len(times_s)} requests")
    if len(partly) != len(parent):
        raise InvalidRequest(f"{path}: partial: {len(partly)} flags for {len(parent)} chunks")
    _check_starts(path, starts, len(chunks))
    _check_times(path, times_s)
    _check_chunks(path, starts, chunks, len(parent))
    stops = arrays.get(_STOPS)
    if stops is not None:
        _check_stops(path, stops, len(times_s))
    trace = Trace(path.stem, times_s, starts, chunks, partly != 0, stops)
    wrong = trace.misplaced(parent)
    if wrong is not None:
        raise InvalidRequest(f"{path}: request {wrong}: blk: a chunk is not below its parent")
    return trace


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name: _array(archive, name, kinds) for name, kinds in _ARRAYS.items()}
            if f"{_STOPS}.npy" in archive.namelist():
                arrays[_STOPS] = _array(archive, _STOPS, "iu")
            return arrays
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise InvalidRequest(f"{path}: not an npz file of arrays: {error}") from None
    except KeyError as error:
        raise InvalidRequest(f"{path}: {error.args[0]}; it needs {', '.join(_ARRAYS)}") from None


def _array(archive: zipfile.ZipFile, name: str, kinds: str) -> npt.NDArray[Any]:
    """One array of one dimension, no larger than its file says and than it may be."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name}: version {version} of the format, not (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        nbytes = archive.getinfo(f"{name}.npy").file_size
        if len(shape) != 1 or dtype.kind not in kinds or dtype.hasobject:
            raise ValueError(f"{name}: an array {shape} of {dtype}")
        if not shape[0] * dtype.itemsize <= min(nbytes, _MOST_BYTES):
            raise ValueError(f"{name}: {shape[0]} items are more than the file has")
        array = np.frombuffer(file.read(shape[0] * dtype.itemsize), dtype)
    if len(array) != shape[0]:
        raise ValueError(f"{name}: it ends after {len(array)} of {shape[0]} items")
    return array.astype(np.float64 if kinds == "f" else np.int64)


def _check_starts(path: Path, starts: Ints, references: int) -> None:
    if starts[0] != 0 or starts[-1] != references:
        raise InvalidRequest(f"{path}: off: it must go from 0 to {references}, the length of blk")
    empty = np.flatnonzero(np.diff(starts) <= 0)
    if len(empty):
        raise InvalidRequest(f"{path}: request {empty[0]}: off: it needs no chunk")


def _check_times(path: Path, times_s: npt.NDArray[np.float64]) -> None:
    wrong = np.flatnonzero(~np.isfinite(times_s))
    if len(wrong):
        raise InvalidRequest(f"{path}: request {wrong[0]}: t: {times_s[wrong[0]]} is no time")
    back = np.flatnonzero(np.diff(times_s) < 0)
    if len(back):
        late = int(back[0]) + 1
        raise InvalidRequest(
            f"{path}: request {late}: t: {times_s[late]} is before the request above it, at "
            f"{times_s[late - 1]}; sort the requests by time"
        )


def _check_chunks(path: Path, starts: Ints, chunks: Ints, unique: int) -> None:
    wrong = np.flatnonzero((chunks < 0) | (chunks >= unique))
    if len(wrong):
        request = int(np.searchsorted(starts, wrong[0], side="right")) - 1
        raise InvalidRequest(
            f"{path}: request {request}: blk: {chunks[wrong[0]]} is not a chunk; there are {unique}"
        )


def _check_stops(path: Path, stops: Ints, requests: int) -> None:
    if len(stops) != requests:
        raise InvalidRequest(f"{path}: {_STOPS}: {len(stops)} numbers for {requests} requests")
    wrong = np.flatnonzero((stops < 0) | (stops > 2))
    if len(wrong):
        raise InvalidRequest(
            f"{path}: request {wrong[0]}: {_STOPS}: {stops[wrong[0]]} is not 0, 1 or 2"
        )


# ── JSONL ─────────────────────────────────────────────────────────────────────────────────────────


def _read_jsonl(path: Path) -> Trace:
    times_s: list[float] = []
    starts = [0]
    chunks: list[int] = []
    numbers: dict[int, int] = {}  # by Mooncake's id
    partly: list[bool] = []
    lines: list[int] = []
    for line, where, request in _lines(path):
        time_ms, tokens, ids = _fields(request, where)
        if times_s and time_ms / 1000 < times_s[-1]:
            raise InvalidRequest(f"{where}: timestamp: {time_ms:g} is before the line above it")
        times_s.append(time_ms / 1000)
        chunks.extend(numbers.setdefault(chunk, len(numbers)) for chunk in ids)
        partly.extend([False] * (len(numbers) - len(partly)))
        partly[chunks[-1]] = tokens < len(ids) * _MOONCAKE_TOKENS
        starts.append(len(chunks))
        lines.append(line)
    trace = Trace(
        path.stem,
        np.array(times_s),
        np.array(starts, np.int64),
        np.array(chunks, np.int64),
        np.array(partly, np.bool_),
    )
    wrong = trace.misplaced(trace.first_parents()) if chunks else None
    if wrong is not None:
        raise InvalidRequest(
            f"{path} line {lines[wrong]}: hash_ids: a chunk follows another one than it did before"
        )
    return trace


def _lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with path.open("rb") as file:
        line = 0
        while text := file.readline(_MOST_LINE_BYTES + 1):
            line += 1
            where = f"{path} line {line}"
            if len(text) > _MOST_LINE_BYTES:
                raise InvalidRequest(f"{where}: longer than {_MOST_LINE_BYTES} bytes")
            if text.isspace():
                continue
            try:
                request = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"{where}: not JSON: {error}") from None
            if not isinstance(request, dict):
                raise InvalidRequest(f"{where}: not an object")
            yield line, where, request


def _fields(request: dict[str, Any], where: str) -> tuple[float, int, list[int]]:
    """Milliseconds, tokens of the prompt, chunks."""
    tokens, ids = request.get("input_length"), request.get("hash_ids")
    if not isinstance(ids, list) or not ids or not all(type(chunk) is int for chunk in ids):
        raise InvalidRequest(f"{where}: hash_ids: {_shown(ids)} is not a list of integers")
    if type(tokens) is not int or not 0 < tokens <= len(ids) * _MOONCAKE_TOKENS:
        raise InvalidRequest(
            f"{where}: input_length: {_shown(tokens)} is not a number of tokens for {len(ids)} "
            f"chunks of {_MOONCAKE_TOKENS}"
        )
    return _time_ms(request.get("timestamp"), where), tokens, ids


def _time_ms(value: Any, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 <= value < _MOST_MS):
        raise InvalidRequest(f"{where}: timestamp: {_shown(value)} is not milliseconds")
    return float(value)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]
