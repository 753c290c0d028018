"""What decides a chunk's KV besides its tokens, in vLLM: adapters, images, salts, embeddings."""

import hashlib
import os
from collections.abc import Callable
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

    def __init__(self, extra_keys: ExtraKeys, chunk_tokens: int) -> None:
        self._extra_keys = extra_keys
        self._chunk_tokens = chunk_tokens
        self._adapters: dict[int, str] = {}
        self._replaced = 0
        self._unread = os.urandom(16).hex()

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
        return digest_of(found, adapter, salt.hex())

    def _adapter(self, lora: Any) -> str:
        """What tells an adapter from others: its files as they were when it was first used, for
        that is what the engine has in memory. One that cannot be read, as it was given as tensors,
        or that replaces another in place, is known to this engine only."""
        if getattr(lora, "load_inplace", False):
            self._replaced += 1
            self._adapters[lora.lora_int_id] = f"{self._unread}.{self._replaced}"
        known = self._adapters.get(lora.lora_int_id)
        if known is None:
            known = self._adapters[lora.lora_int_id] = self._read(Path(lora.lora_path))
        return known

    def _read(self, path: Path) -> str:
        try:
            config = (path / "adapter_config.json").read_bytes()
            return f"{fingerprint.of_path(path)}.{hashlib.sha256(config).hexdigest()}"
        except (InvalidRequest, OSError):
            self._replaced += 1
            return f"{self._unread}.{self._replaced}"
