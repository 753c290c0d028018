"""Classes of chunks whose reuse is learned apart: by the kind of turn, size, touches and gap.

A *turn* is counted along a conversation: 0 is a prompt of which nothing was known, 1 one that
branches off what is known, and each request that continues the end of an earlier one is the next.
"""

from collections.abc import Sequence
from math import log2
from typing import Protocol

BINS = 50  # of age, three to a doubling: the last one begins after 23 hours
_OLDEST_S = 2.0 ** ((BINS - 1) / 3)

_TURN_KINDS = (0, 1, 2, 3, 4, 4)  # root, branch, 2, 3, 4 to 5; 6 and more come after
_KINDS = 6
_SIZES = 6  # of a request's new chunks, by doublings; the last is 32 and more
_TOUCHES = 4  # by doublings; the last is 8 and more
_GAPS = 5  # since the touch before, six bins each: a factor of four


def age_bin(age_s: float) -> int:
    """Which of the BINS an age is in: floor(3 log2(age + 1))."""
    return int(3 * log2(age_s + 1)) if age_s < _OLDEST_S - 1 else BINS - 1


def age_edges() -> list[float]:
    """Where the bins begin, in seconds, and where the last one ends."""
    return [2 ** (edge / 3) - 1 for edge in range(BINS + 1)]


def turn_kind(turn: int) -> int:
    return _TURN_KINDS[turn] if turn < len(_TURN_KINDS) else _KINDS - 1


class Classes(Protocol):
    """Numbers from 0 to `count`. Those below `seen_from` are of chunks asked for once."""

    @property
    def count(self) -> int: ...
    @property
    def seen_from(self) -> int: ...
    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """Groups of classes that are alike, the widest first, each parted by the next: for each
        class the number of its group."""
        ...

    def new(self, turn: int, chunks: int) -> int:
        """The class of a request's new chunks: `chunks` of them, at least one."""
        ...

    def seen(self, turn: int, touches: int, gap_s: float) -> int:
        """The class of chunks that were touched so often, the last time `gap_s` after the one
        before."""
        ...


class FineClasses:
    """Turn kind, and then of new chunks how many they are, of others touches and the last gap.
    They are parts of CoarseClasses."""

    seen_from = _KINDS * _SIZES
    count = seen_from + _KINDS * _TOUCHES * _GAPS

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        sizes = [_SIZES] * _KINDS + [_TOUCHES * _GAPS] * _KINDS
        coarse = [kind for kind, size in enumerate(sizes) for _ in range(size)]
        [seen] = CoarseClasses().groups
        return [seen[kind] for kind in coarse], coarse

    def new(self, turn: int, chunks: int) -> int:
        return turn_kind(turn) * _SIZES + min(chunks.bit_length(), _SIZES) - 1

    def seen(self, turn: int, touches: int, gap_s: float) -> int:
        often = min(touches.bit_length(), _TOUCHES) - 1
        gap = min(age_bin(gap_s) // 6, _GAPS - 1)
        return self.seen_from + (turn_kind(turn) * _TOUCHES + often) * _GAPS + gap


class CoarseClasses:
    """Turn kind, and whether they were asked for once or more often."""

    seen_from = _KINDS
    count = 2 * _KINDS

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        return ([0] * _KINDS + [1] * _KINDS,)

    def new(self, turn: int, chunks: int) -> int:
        return turn_kind(turn)

    def seen(self, turn: int, touches: int, gap_s: float) -> int:
        return self.seen_from + turn_kind(turn)
