"""What GIX takes chunks to be, and how turns of a conversation are counted.

A *turn* is counted along a conversation: 0 is a prompt of which nothing was known, 1 one that
branches off what is known, and each request that continues the end of an earlier one is the next.
"""

from typing import NamedTuple


class Traits(NamedTuple):
    """What chunks are taken to be: of which class, touched when last and how often, and in which
    turn."""

    kind: int
    since_s: float
    touches: int
    turn: int


def ending(traits: Traits) -> int:
    """What a run says of its end, when a request of that turn ends there."""
    return max(traits.turn, 1)
