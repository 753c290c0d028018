"""What decides a chunk's KV besides its tokens, in vLLM: adapters, images, salts, embeddings."""

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
        self._adapters: dict[tuple[str, int], str] = {}
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
        """The fingerprint of an adapter's files. One that cannot be read, as it was given as
        tensors, is not known again by any other engine."""
        path = lora.lora_path
        try:
            changed_ns = Path(path).stat().st_mtime_ns
            known = self._adapters.get((path, changed_ns))
            if known is None:
                known = self._adapters[path, changed_ns] = fingerprint.of_path(Path(path))
        except (InvalidRequest, OSError):
            return f"{self._unread}.{lora.lora_int_id}"
        return known
