"""Ghosts: chunks that are gone, and whose return would be news.

Ghosts of one run of chunks are kept together, a *shade*: four bytes of each key, in an array. Only
the first ghost of a shade is indexed: what follows it is compared, one key after the other. Four
bytes may be those of another key too; then a run is taken for another, which shifts a statistic.
"""

from array import array
from collections.abc import Sequence
from typing import Generic, TypeVar

from kvtier.chunks import ChunkKey
from kvtier.tiers.policies.segments import Link, Queue

_BYTES = 4

TraitsT = TypeVar("TraitsT")


def fingerprint(key: ChunkKey) -> int:
    return int.from_bytes(key[:_BYTES], "little")


class Shade(Link, Generic[TraitsT]):
    """A run of ghosts. `prints` are their fingerprints, the last one first."""

    __slots__ = ("ends", "prints", "traits")

    def __init__(self, traits: TraitsT, prints: "array[int]", ends: int) -> None:
        super().__init__()
        self.traits = traits
        self.prints = prints
        self.ends = ends


class Shades(Generic[TraitsT]):
    """All ghosts of a policy, in the order in which their runs began to fade."""

    def __init__(self) -> None:
        self._by_first: dict[int, Shade[TraitsT]] = {}
        self._queue: Queue[Shade[TraitsT]] = Queue()
        self.ghosts = 0

    def match(self, keys: Sequence[ChunkKey]) -> list[tuple[Shade[TraitsT], int]]:
        """The ghosts that these keys begin with: how many of which shades."""
        found: dict[Shade[TraitsT], int] = {}
        place = 0
        while place < len(keys):
            shade = self._by_first.get(fingerprint(keys[place]))
            if shade is None or shade in found:
                break
            matching = found[shade] = _matching(shade, keys, place)
            place += matching
        return list(found.items())

    def fade(
        self, key: ChunkKey, below: Shade[TraitsT] | None, traits: TraitsT, ends: int
    ) -> Shade[TraitsT]:
        """Make a ghost of a chunk. `below` is the shade that was under it, if that is of the same
        traits. Returns the shade that the ghost is the first of."""
        if below is not None and below.prints and below.traits is traits:
            self._unindex(below)
            below.prints.append(fingerprint(key))
            self._index(below)
            self.ghosts += 1
            return below
        return self._enter(Shade(traits, array("I", (fingerprint(key),)), ends))

    def refuse(self, keys: Sequence[ChunkKey], traits: TraitsT, ends: int) -> Shade[TraitsT]:
        """Make ghosts of chunks that never came; there is at least one."""
        return self._enter(Shade(traits, array("I", map(fingerprint, reversed(keys))), ends))

    def part(self, shade: Shade[TraitsT], ghosts: int, traits: TraitsT) -> Shade[TraitsT]:
        """Give the leading ghosts of a shade other traits, as the newest of all."""
        if ghosts < len(shade.prints):
            prints = shade.prints[-ghosts:]
            self._unindex(shade)
            del shade.prints[-ghosts:]
            self._index(shade)
            self.ghosts -= ghosts
            return self._enter(Shade(traits, prints, 0))
        self._queue.remove(shade)
        self._queue.append(shade)
        shade.traits = traits
        return shade

    def join(self, upper: Shade[TraitsT], lower: Shade[TraitsT]) -> Shade[TraitsT]:
        """Make one shade of two of the same traits, the second below the first."""
        self._remove(lower)
        self._unindex(upper)
        self.ghosts += len(lower.prints)
        upper.prints, upper.ends = lower.prints + upper.prints, lower.ends
        del lower.prints[:]
        self._index(upper)
        return upper

    def take(self, key: ChunkKey) -> Shade[TraitsT] | None:
        """A chunk comes: it is no ghost any more, if it was the first of a shade. Returns that
        shade, which may be empty now."""
        shade = self._by_first.get(fingerprint(key))
        if shade is None:
            return None
        if len(shade.prints) == 1:
            self._remove(shade)
            del shade.prints[:]
            return shade
        self._unindex(shade)
        shade.prints.pop()
        self._index(shade)
        self.ghosts -= 1
        return shade

    def forget_oldest(self) -> tuple[TraitsT, int]:
        """Drop the shade that began to fade first: what it was, and how many ghosts."""
        shade = self._queue.oldest
        assert shade is not None, "there is no ghost to forget"
        ghosts = len(shade.prints)
        self._remove(shade)
        del shade.prints[:]
        return shade.traits, ghosts

    def _enter(self, shade: Shade[TraitsT]) -> Shade[TraitsT]:
        self._index(shade)
        self._queue.append(shade)
        self.ghosts += len(shade.prints)
        return shade

    def _remove(self, shade: Shade[TraitsT]) -> None:
        self._unindex(shade)
        self._queue.remove(shade)
        self.ghosts -= len(shade.prints)

    def _index(self, shade: Shade[TraitsT]) -> None:
        self._by_first[shade.prints[-1]] = shade

    def _unindex(self, shade: Shade[TraitsT]) -> None:
        first = shade.prints[-1]
        if self._by_first.get(first) is shade:
            del self._by_first[first]


def _matching(shade: Shade[TraitsT], keys: Sequence[ChunkKey], place: int) -> int:
    matching = 0
    following = keys[place : place + len(shade.prints)]
    for known, key in zip(reversed(shade.prints), following, strict=False):
        if known != fingerprint(key):
            break
        matching += 1
    return matching
