"""A kvtier client over a dict, for connector tests: the public interface, no service, no wire."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvtier import chunks
from kvtier.chunks import Prefix
from kvtier.errors import KvtierError
from kvtier.spaces import Space


@dataclass
class FakeChunk:
    index: int
    data: memoryview


@dataclass
class FakeOutcome:
    stored: tuple[int, ...] = ()
    existing: tuple[int, ...] = ()
    refused: dict[int, str] = field(default_factory=dict)


class FakeOffload:
    def __init__(self, slots: list[FakeChunk]) -> None:
        self._slots = slots
        self.outcome = FakeOutcome()

    def __iter__(self) -> Iterator[FakeChunk]:
        return iter(self._slots)


class FakeClient:
    """`held` maps keys to chunks' bytes. The knobs make the ways in which a service can fail."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.held: dict[bytes, bytes] = {}
        self.ends_after: int | None = None  # a load's deadline passes after so many chunks
        self.raises_after: int | None = None  # ... or an error comes out of the client
        self.short_by = 0  # ... or chunks are too small

    def prefix(self, token_ids: Sequence[int], extra: bytes = b"") -> Prefix:
        packed = chunks.pack_tokens(token_ids)
        return chunks.chain(self.space.digest, packed, self.space.layout.tokens, extra)

    def lookup(self, prefix: Prefix) -> int:
        held = [key in self.held for key in prefix]
        return held.index(False) if False in held else len(held)

    @contextmanager
    def load(self, prefix: Prefix) -> Iterator[Iterator[FakeChunk]]:
        yield self._landing(prefix)

    def _landing(self, prefix: Prefix) -> Iterator[FakeChunk]:
        for index in range(self.lookup(prefix)):
            if index == self.ends_after:
                return
            if index == self.raises_after:
                raise KvtierError("the fake service broke")
            data = self.held[prefix[index]]
            yield FakeChunk(index, memoryview(data)[: len(data) - self.short_by])

    @contextmanager
    def offload(self, prefix: Prefix) -> Iterator[FakeOffload]:
        if self.raises_after is not None:
            raise KvtierError("the fake service broke")
        wanted = [index for index, key in enumerate(prefix) if key not in self.held]
        buffers = {index: bytearray(self.space.layout.nbytes) for index in wanted}
        offload = FakeOffload([FakeChunk(i, memoryview(buffers[i])) for i in wanted])
        yield offload
        self.held.update({prefix[index]: bytes(buffer) for index, buffer in buffers.items()})
        existing = tuple(index for index in range(len(prefix)) if index not in buffers)
        offload.outcome = FakeOutcome(tuple(wanted), existing)
