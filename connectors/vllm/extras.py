"""What decides a chunk's KV besides its tokens, in vLLM: adapters, images, salts, embeddings."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier import fingerprint
from kvtier.connectors.vllm.keys import Extra, digest_of
from kvtier.errors import InvalidRequest

ExtraKeys = Callable[[Any, int, int, int], tuple[tuple[Any, ...] | None, int]]
"""vLLM's generate_block_hash_extra_keys(request, first token, end, first image)."""


class Extras:
    """Gives each request the extras of its chunks.

    What vLLM mixes into its own block hashes, and what its hashes leave out: the contents of an
    adapter's files.
    """

    def __init__(
        self, extra_keys: ExtraKeys, chunk_tokens: int, *, images_by_content: bool = True
    ) -> None:
        self._extra_keys = extra_keys
        self._chunk_tokens = chunk_tokens
        self._adapters: dict[int, _Adapter] = {}
        self._count = 0
        self._engine = os.urandom(16).hex()
        # Else vLLM numbers them, from the start with each start.
        self._images = "" if images_by_content else self._engine

    def of(self, request: Any, salt: bytes) -> Extra:
        """The extra of each chunk of a request, by its place; empty for plain prompts."""
        lora = request.lora_request
        adapter = self._adapter(lora) if lora is not None else ""
        special = salt or adapter or request.cache_salt or request.mm_features
        if not special and request.prompt_embeds is None:
            return lambda chunk: b""
        return lambda chunk: self._of_chunk(request, chunk, adapter, salt)

    def _of_chunk(self, request: Any, chunk: int, adapter: str, salt: bytes) -> bytes:
        first = chunk * self._chunk_tokens
        found, _ = self._extra_keys(request, first, first + self._chunk_tokens, 0)
        if found is None and not salt and not adapter:
            return b""
        images = self._images if request.mm_features else ""
        return digest_of(found, adapter, salt.hex(), images)

    def _adapter(self, lora: Any) -> str:
        """What tells an adapter from others: the contents of its files. What cannot be read, as it
        was given as tensors, what replaces another in place, and what has changed since it was
        first used (nobody can tell which of the two the engine has) is known to this engine only.
        """
        path, number = Path(lora.lora_path), lora.lora_int_id
        known = self._adapters.get(number)
        now = _signature(path)
        if known is None and not getattr(lora, "load_inplace", False):
            known = _Adapter(now, self._read(path))
        elif known is None or known.files != now or getattr(lora, "load_inplace", False):
            known = _Adapter(now, self._private())
        self._adapters[number] = known
        return known.name

    def _read(self, path: Path) -> str:
        try:
            config = (path / "adapter_config.json").read_bytes()
            return f"{fingerprint.of_path(path)}.{hashlib.sha256(config).hexdigest()}"
        except (InvalidRequest, OSError):
            return self._private()

    def _private(self) -> str:
        self._count += 1
        return f"{self._engine}.{self._count}"


_Files = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Adapter:
    files: _Files
    name: str


def _signature(path: Path) -> _Files:
    """What changes when any file of a folder is written: names, sizes and times."""
    try:
        with os.scandir(path) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return ()
    return tuple(
        sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)
    )
