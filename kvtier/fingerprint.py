"""A weights fingerprint: a short text that differs when two models' weights differ.

KV computed with other weights is wrong KV, so the fingerprint is part of a space. It is made to be
cheap enough for every engine start (a few thousand small reads, whatever the size of the model),
and to depend on contents alone: no path, no file name, no time. Copies of a model agree.

What is read, of a model directory or one file:

* safetensors, every shard: its size, its whole header (names, shapes, dtypes, offsets), and one
  block of 4 KiB in each tensor, at an offset derived from the tensor's name. With more than 4,096
  tensors in all, an even selection of them.
* GGUF: its size, the first 16 MiB (which hold the metadata of all models known to us) and 1,024
  blocks of 4 KiB spread evenly over the rest.

What sampling can miss: an edit that leaves every header, every size and every sampled block as it
was, such as a few changed rows of an embedding table. Training, quantising, merging and pruning
change nearly every block and are always seen. Who edits single values in place gives the edited
model another name in `Space.model`.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvtier.errors import InvalidRequest

MAX_HEADER_BYTES = 100 << 20  # the limit that safetensors itself sets
MAX_SHARDS = 4096
BLOCK_BYTES = 4096
MAX_TENSORS_SAMPLED = 4096
GGUF_HEAD_BYTES = 16 << 20
GGUF_BLOCKS = 1024

_DOMAIN = b"kvtier.weights.v1"
_DIGITS = 40
_U64 = struct.Struct("<Q")
_SUFFIXES = (".safetensors", ".gguf")


def of_path(path: Path) -> str:
    """The fingerprint of a model directory (all its shards, in name order) or of one weights file.

    Returns "files-" and 40 hexadecimal digits. Raises InvalidRequest when there are no weights at
    `path`, or a header is damaged or larger than its file.
    """
    try:
        return _of_files(_weight_files(path))
    except OSError as error:
        raise InvalidRequest(f"weights: {path} cannot be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of one tensor in memory: `values` holds the raw bytes of some elements."""

    name: str
    dtype: str
    shape: Sequence[int]
    values: bytes


def of_samples(samples: Iterable[Sample]) -> str:
    """The fingerprint of weights in memory, of which the caller took samples, in any order.

    Returns "memory-" and 40 hexadecimal digits. It never equals that of the same model's files.
    """
    hasher = _new_hasher(b"memory")
    for sample in sorted(samples, key=lambda sample: sample.name):
        shape = ",".join(str(extent) for extent in sample.shape)
        for part in (sample.name, sample.dtype, shape):
            _add(hasher, part.encode())
        _add(hasher, sample.values)
    return f"memory-{hasher.hexdigest()[:_DIGITS]}"


def sample_positions(name: str, elements: int, count: int = 64) -> list[int]:
    """Which elements of a flat tensor to sample: both ends, and one in each equal stretch.

    The choice depends on the tensor's name alone, so every process makes the same one. Sorted,
    without repetitions; all elements when there are no more than `count`.
    """
    if elements <= count:
        return list(range(elements))
    digest = hashlib.shake_128(name.encode()).digest(8 * count)
    stretch = elements / count
    inner = (
        int(index * stretch) + _U64.unpack_from(digest, 8 * index)[0] % int(stretch)
        for index in range(count)
    )
    return sorted({0, elements - 1, *inner})


def _weight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix not in _SUFFIXES:
            raise InvalidRequest(f"weights: {path.name} is not one of {', '.join(_SUFFIXES)}")
        return [path]
    for suffix in _SUFFIXES:
        files = sorted(path.glob(f"*{suffix}"), key=lambda file: file.name)
        if len(files) > MAX_SHARDS:
            raise InvalidRequest(f"weights: {len(files)} files given, at most {MAX_SHARDS}")
        if files:
            return files
    raise InvalidRequest(f"weights: {path.name}/ holds no {' or '.join(_SUFFIXES)} file")


def _of_files(files: list[Path]) -> str:
    hasher = _new_hasher(b"files")
    shards = [_Shard.open(file) for file in files]
    every = -(-sum(len(shard.tensors) for shard in shards) // MAX_TENSORS_SAMPLED) or 1
    for file, shard in zip(files, shards, strict=True):
        _add(hasher, _U64.pack(shard.size))
        _add(hasher, shard.head)
        # Unbuffered: blocks are far apart, and read-ahead would read the whole file.
        with file.open("rb", buffering=0) as stream:
            for offset, length in shard.blocks(every):
                _add(hasher, _read_at(stream, offset, length))
    return f"files-{hasher.hexdigest()[:_DIGITS]}"


@dataclass(frozen=True, slots=True)
class _Shard:
    size: int
    head: bytes
    tensors: list[tuple[str, int, int]]  # name, first byte, length; empty for GGUF

    @classmethod
    def open(cls, file: Path) -> "_Shard":
        size = file.stat().st_size
        with file.open("rb", buffering=0) as stream:
            if file.suffix == ".gguf":
                return cls(size, _gguf_head(stream, size, file.name), [])
            head = _safetensors_head(stream, size, file.name)
            return cls(size, head, _tensor_spans(head, size, file.name))

    def blocks(self, every: int) -> Iterator[tuple[int, int]]:
        """Offset and length of each sampled block, in the file's order of tensors."""
        if not self.tensors:
            rest = self.size - len(self.head)
            for index in range(GGUF_BLOCKS if rest > 0 else 0):
                offset = len(self.head) + index * rest // GGUF_BLOCKS
                yield offset, min(BLOCK_BYTES, self.size - offset)
        for name, first, length in self.tensors[::every]:
            blocks = -(-length // BLOCK_BYTES)
            chosen = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % blocks
            offset = chosen * BLOCK_BYTES
            yield first + offset, min(BLOCK_BYTES, length - offset)


def _safetensors_head(stream: BinaryIO, size: int, name: str) -> bytes:
    """The JSON header's raw bytes; its claimed length is checked before it is read."""
    prefix = _read_at(stream, 0, _U64.size)
    length = _U64.unpack(prefix)[0] if len(prefix) == _U64.size else size
    if length > min(MAX_HEADER_BYTES, size - _U64.size):
        raise InvalidRequest(
            f"weights: {name} claims a header of {length} bytes in a file of {size} bytes "
            f"(at most {MAX_HEADER_BYTES} are read)"
        )
    return _read_at(stream, _U64.size, length)


def _tensor_spans(head: bytes, size: int, name: str) -> list[tuple[str, int, int]]:
    """Name, first byte in the file and length of every tensor that is not empty, by name."""
    start = _U64.size + len(head)
    spans = []
    try:
        document = json.loads(head)
        for tensor in sorted(document.keys() - {"__metadata__"}):
            first, end = document[tensor]["data_offsets"]
            if not 0 <= first <= end <= size - start:
                raise ValueError(f"{tensor} lies outside the file")
            if end > first:
                spans.append((tensor, start + first, end - first))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InvalidRequest(f"weights: {name} has a damaged header: {error}") from None
    return spans


def _gguf_head(stream: BinaryIO, size: int, name: str) -> bytes:
    """The first bytes of a GGUF file. They are hashed unparsed: nothing in them is believed."""
    head = _read_at(stream, 0, min(size, GGUF_HEAD_BYTES))
    if head[:4] != b"GGUF":
        raise InvalidRequest(f"weights: {name} does not begin as a GGUF file does")
    return head


def _read_at(stream: BinaryIO, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, fewer only at the end of the file."""
    stream.seek(offset)
    parts = []
    while length > 0 and (part := stream.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _new_hasher(kind: bytes) -> "hashlib._Hash":
    hasher = hashlib.sha256(_DOMAIN)
    _add(hasher, kind)
    return hasher


def _add(hasher: "hashlib._Hash", part: bytes) -> None:
    """Add a part with its length, so that no two sequences of parts share an encoding."""
    hasher.update(_U64.pack(len(part)))
    hasher.update(part)
