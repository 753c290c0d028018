"""Which chunks became visible to other engines, for those who watch the engine's KV events."""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvtier.connectors.vllm.orders import OffloadOrder

_MOST_OPEN = 1024  # orders whose outcome is awaited; the oldest are forgotten


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk that is stored with all its parts. `key` and `parent` are those of its first part."""

    key: bytes
    parent: bytes
    tokens: list[int]
    lora_name: str | None


@dataclass(slots=True)
class _Open:
    order: OffloadOrder
    tokens: Any
    chunk_tokens: int
    lora_name: str | None
    parts: "Counter[int]"  # by the chunk's place in the request


class StoredChunks:
    """Matches offers with their outcome. Off until `watched`."""

    def __init__(self) -> None:
        self.watched = False
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._ready: list[StoredChunk] = []

    def offered(
        self, order: OffloadOrder, tokens: Any, chunk_tokens: int, lora_name: str | None = None
    ) -> None:
        """An order goes out; `tokens` are its request's."""
        if not self.watched:
            return
        self._open[order.number] = _Open(order, tokens, chunk_tokens, lora_name, Counter())
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)

    def count(self, stored: Mapping[tuple[int, int, bytes], int]) -> None:
        """Workers report what they stored."""
        for number, chunk, _digest in stored:
            open_order = self._open.get(number)
            if open_order is None:
                continue
            open_order.parts[chunk] += 1
            if open_order.parts[chunk] == len(open_order.order.runs):
                self._ready.append(_described(open_order, chunk))

    def take(self) -> list[StoredChunk]:
        """The chunks stored since the last call."""
        ready, self._ready = self._ready, []
        return ready


def _described(open_order: _Open, chunk: int) -> StoredChunk:
    run = next(iter(open_order.order.runs.values()))
    place = chunk - run.first
    width = open_order.chunk_tokens
    return StoredChunk(
        key=run.prefix[place],
        parent=run.prefix[place - 1] if place else run.prefix.parent,
        tokens=list(open_order.tokens[chunk * width : (chunk + 1) * width]),
        lora_name=open_order.lora_name,
    )
