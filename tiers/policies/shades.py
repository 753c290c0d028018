"""Ghosts: chunks that are gone, and whose return would be news.

Ghosts of one run of chunks are kept together, a *shade*: four bytes of each key. Only the first
ghost of a shade is indexed: what follows it is compared, one key after the other. Four bytes may be
those of another key too; then a run is taken for another, which shifts a statistic.
"""

from collections.abc import Callable, Sequence

from kvtier.chunks import ChunkKey
from kvtier.tiers.policies.buckets import Buckets
from kvtier.tiers.policies.segments import Link, Queue
from kvtier.tiers.policies.traits import Traits

_PRINT = 4  # bytes of a fingerprint


def fingerprint(key: ChunkKey) -> bytes:
    return key[:_PRINT]


class Shade(Link):
    """A run of ghosts. `prints` are their fingerprints, the last one first; `ends` is what their
    segment had. There are many shades: it is their fields that are kept, and not their Traits."""

    __slots__ = ("_kind", "_since_s", "_touches", "_turn", "beside", "ends", "prints")

    def __init__(self, traits: Traits, prints: bytearray, ends: int) -> None:
        super().__init__()
        self.beside: Shade | None = None
        self.traits = traits
        self.prints = prints
        self.ends = ends

    @property
    def traits(self) -> Traits:
        return Traits(self._kind, self._since_s, self._touches, self._turn)

    @traits.setter
    def traits(self, traits: Traits) -> None:
        self._kind, self._since_s, self._touches, self._turn = traits

    @property
    def count(self) -> int:
        return len(self.prints) // _PRINT

    @property
    def first(self) -> bytes:
        return bytes(self.prints[-_PRINT:])


class Shades:
    """All ghosts of a policy, in the order in which their runs began to fade. Shades that begin
    with the same four bytes push one another out. `on_forgotten` is told of each that is dropped:
    what it was, and how many ghosts."""

    def __init__(self, on_forgotten: Callable[[Traits, int], None]) -> None:
        self._on_forgotten = on_forgotten
        self._by_first: Buckets[Shade] = Buckets()
        self._queue: Queue[Shade] = Queue()
        self.ghosts = 0

    def match(self, keys: Sequence[ChunkKey]) -> list[tuple[Shade, int]]:
        """The ghosts that these keys begin with: how many of which shades."""
        found: dict[Shade, int] = {}
        place = 0
        while place < len(keys):
            shade = self._by_first.get(fingerprint(keys[place]))
            if shade is None or shade in found:
                break
            matching = found[shade] = _matching(shade, keys, place)
            place += matching
        return list(found.items())

    def fade(self, key: ChunkKey, below: Shade | None, traits: Traits, ends: int) -> Shade:
        """Make a ghost of a chunk. `below` is the shade that was under it, if that is of the same
        traits. Returns the shade that the ghost is the first of."""
        if below is not None and below.prints and below.traits == traits:
            self._by_first.remove(below)
            below.prints += fingerprint(key)
            self._index(below)
            self.ghosts += 1
            return below
        return self._enter(Shade(traits, bytearray(fingerprint(key)), ends))

    def refuse(self, keys: Sequence[ChunkKey], traits: Traits, ends: int) -> Shade:
        """Make ghosts of chunks that never came; there is at least one."""
        prints = bytearray(b"".join([fingerprint(key) for key in reversed(keys)]))
        return self._enter(Shade(traits, prints, ends))

    def part(self, shade: Shade, ghosts: int, traits: Traits) -> Shade:
        """Give the leading ghosts of a shade other traits, as the newest of all."""
        if ghosts < shade.count:
            leading = slice(-ghosts * _PRINT, None)
            prints = shade.prints[leading]
            self._by_first.remove(shade)
            del shade.prints[leading]
            self._index(shade)
            self.ghosts -= ghosts
            return self._enter(Shade(traits, prints, 0))
        self._queue.remove(shade)
        self._queue.append(shade)
        shade.traits = traits
        return shade

    def join(self, upper: Shade, lower: Shade) -> Shade:
        """Make one shade of two of the same traits, the second below the first, unless that was
        pushed out."""
        if not upper.prints:
            return lower
        self._remove(lower)
        self.ghosts += lower.count
        upper.prints[:0] = lower.prints
        upper.ends = lower.ends
        lower.prints.clear()
        return upper

    def take(self, key: ChunkKey) -> Shade | None:
        """A chunk comes: it is no ghost any more, if it was the first of a shade. Returns that
        shade, which may be empty now."""
        shade = self._by_first.get(fingerprint(key))
        if shade is None:
            return None
        if shade.count == 1:
            self._remove(shade)
            shade.prints.clear()
            return shade
        self._by_first.remove(shade)
        del shade.prints[-_PRINT:]
        self._index(shade)
        self.ghosts -= 1
        return shade

    def forget_oldest(self) -> None:
        """Drop the shade that began to fade first."""
        shade = self._queue.oldest
        assert shade is not None, "there is no ghost to forget"
        self._by_first.remove(shade)
        self._forget(shade)

    def _enter(self, shade: Shade) -> Shade:
        self._index(shade)
        self._queue.append(shade)
        self.ghosts += shade.count
        return shade

    def _index(self, shade: Shade) -> None:
        older = self._by_first.put(shade)
        if older is not None:
            self._forget(older)

    def _forget(self, shade: Shade) -> None:
        """Drop a shade that is not indexed any more."""
        ghosts = shade.count
        self._queue.remove(shade)
        self.ghosts -= ghosts
        shade.prints.clear()
        self._on_forgotten(shade.traits, ghosts)

    def _remove(self, shade: Shade) -> None:
        self._by_first.remove(shade)
        self._queue.remove(shade)
        self.ghosts -= shade.count


def _matching(shade: Shade, keys: Sequence[ChunkKey], place: int) -> int:
    """How many of a shade's ghosts, from the first on, are keys from a place on."""
    prints = shade.prints
    last = min(shade.count, len(keys) - place)
    for matching in range(last):
        end = len(prints) - matching * _PRINT
        if prints[end - _PRINT : end] != fingerprint(keys[place + matching]):
            return matching
    return last
