"""A kvtier client over a dict, for connector tests: the public interface, no service, no wire."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from kvtier import chunks
from kvtier.chunks import Prefix
from kvtier.errors import KvtierError
from kvtier.spaces import Space


@dataclass
class FakeChunk:
    index: int
    data: memoryview
    tokens: int = 0


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
        self.texts: dict[bytes, tuple[bytes, bytes, bytes]] = {}  # parent, extra, tokens
        self.ends_after: int | None = None  # a load's deadline passes after so many chunks
        self.raises_after: int | None = None  # ... or an error comes out of the client
        self.short_by = 0  # ... or chunks are too small
        self.requests: list[int] = []  # whose each load and offload was

    def prefix(
        self, token_ids: Sequence[int], extra: bytes = b"", *, same_request: Prefix | None = None
    ) -> Prefix:
        packed = chunks.pack_tokens(token_ids)
        keys = chunks.chain(self.space.digest, packed, self.space.layout.tokens, extra)
        request = same_request.request if same_request is not None else chunks.new_request()
        return replace(chunks.with_text(keys, packed, extra), request=request)

    def lookup(self, prefix: Prefix) -> int:
        held = [key in self.held for key in prefix]
        return held.index(False) if False in held else len(held)

    @contextmanager
    def load(self, prefix: Prefix, *, partial: bool) -> Iterator[Iterator[FakeChunk]]:
        self.requests.append(prefix.request)
        yield self._landing(prefix, partial=partial)

    def _landing(self, prefix: Prefix, *, partial: bool) -> Iterator[FakeChunk]:
        keys = prefix.keys[: self.lookup(prefix)]
        run: list[tuple[bytes, int]] = [(key, self.space.layout.tokens) for key in keys]
        if partial:
            run.extend(self._part_after(prefix, len(run)))
        for index, (key, tokens) in enumerate(run):
            if index == self.ends_after:
                return
            if index == self.raises_after:
                raise KvtierError("the fake service broke")
            data = self.held[key]
            yield FakeChunk(index, memoryview(data)[: len(data) - self.short_by], tokens)

    def _part_after(self, prefix: Prefix, index: int) -> list[tuple[bytes, int]]:
        """The held chunk that goes on as the prompt does for the most tokens, if any does."""
        rest = prefix[index:]
        assert rest.text is not None
        shares = []
        for key, (parent, extra, tokens) in self.texts.items():
            if parent == rest.parent and rest.text.extras and extra == rest.text.extras[0]:
                agreeing = _common_tokens(tokens, rest.text.tokens)
                shares.append((agreeing, key))
        best, key = max(shares, default=(0, b""))
        return [(key, best)] if best else []

    @contextmanager
    def offload(self, prefix: Prefix) -> Iterator[FakeOffload]:
        self.requests.append(prefix.request)
        if self.raises_after is not None:
            raise KvtierError("the fake service broke")
        wanted = [index for index, key in enumerate(prefix) if key not in self.held]
        buffers = {index: bytearray(self.space.layout.nbytes) for index in wanted}
        offload = FakeOffload([FakeChunk(i, memoryview(buffers[i])) for i in wanted])
        yield offload
        self.held.update({prefix[index]: bytes(buffer) for index, buffer in buffers.items()})
        for index in buffers:
            one = prefix[index : index + 1]
            assert one.text is not None
            width = 4 * prefix.chunk_tokens
            self.texts[prefix[index]] = (one.parent, one.text.extras[0], one.text.tokens[:width])
        existing = tuple(index for index in range(len(prefix)) if index not in buffers)
        offload.outcome = FakeOutcome(tuple(wanted), existing)


def _common_tokens(one: bytes, other: bytes) -> int:
    """How many leading tokens agree of two packed runs."""
    count = 0
    while one[4 * count : 4 * count + 4] == other[4 * count : 4 * count + 4] != b"":
        count += 1
    return count
