"""What an engine says of a request, and the label that eviction policies learn by.

A label is a class of chunks of which the policies learn by themselves how soon they come again. So
there are few, and a hint that is wrong, or a lie, only makes its class worth what it turns out to
be. Of several hints the one that tells most makes the label, in the order that was measured on real
traces: the expected next use, the session's end, the stop reason, the priority. What each is worth,
and that the bounds between labels are well chosen, shows `kvtier bench trace --hints`.
"""

import math
from dataclasses import dataclass
from enum import Enum, IntEnum

from kvtier.metrics import Counters

LONGEST_NEXT_USE_S = 86_400.0
HIGHEST_PRIORITY = 2


class Label(IntEnum):
    """What the policies tell apart."""

    NONE = 0
    WITHIN_20_S = 1  # the next use
    WITHIN_200_S = 2
    WITHIN_2000_S = 3
    LATER_OR_NEVER = 4  # or the session is over
    TOOL_USE = 5
    END_OF_TURN = 6
    LOW_PRIORITY = 7  # what is to stay is pinned, so a high one has no class


# Ten times the one before: half of an agent's turns come back within the first, most of a chat's
# within the second. More of them gain little, and less where the engine is often wrong.
_NEXT_USE = (
    (20.0, Label.WITHIN_20_S),
    (200.0, Label.WITHIN_200_S),
    (2000.0, Label.WITHIN_2000_S),
    (LONGEST_NEXT_USE_S, Label.LATER_OR_NEVER),
)


class StopReason(Enum):
    """Those that say something of what comes next; the wire's numbers."""

    END_OF_TURN = 1
    TOOL_USE = 2


_STOPPED = {
    StopReason.END_OF_TURN.value: Label.END_OF_TURN,
    StopReason.TOOL_USE.value: Label.TOOL_USE,
}


@dataclass(frozen=True, slots=True)
class Told:
    """What an engine said, as it said it."""

    next_use_s: float
    session_end: bool
    stop_reason: int
    priority: int


@dataclass(frozen=True, slots=True)
class Hints:
    """What was told with a call, within bounds. `request` is the engine's number of the request
    that the call belongs to, 0 when not told."""

    request: int = 0
    label: Label = Label.NONE


NOTHING_TOLD = Hints()


def understood(request: int, told: Told, counters: Counters) -> Hints:
    """What was told with a call of a request. What is out of range is clamped, and counted."""
    next_use_s, next_clamped = clamped(told.next_use_s, 0.0, LONGEST_NEXT_USE_S)
    priority, priority_clamped = clamped(told.priority, -HIGHEST_PRIORITY, HIGHEST_PRIORITY)
    counters.clamped_hints += next_clamped + priority_clamped
    return Hints(request, _label(told, next_use_s, priority))


def clamped(value: float, least: float, most: float) -> tuple[float, bool]:
    """A value within bounds, the least for what is no number, and whether it was not within."""
    if math.isnan(value):
        return least, True
    bounded = min(max(value, least), most)
    return bounded, bounded != value


def _label(told: Told, next_use_s: float, priority: float) -> Label:
    if next_use_s:
        return next(label for most_s, label in _NEXT_USE if next_use_s <= most_s)
    if told.session_end:
        return Label.LATER_OR_NEVER
    stopped = _STOPPED.get(told.stop_reason)
    if stopped is not None:
        return stopped
    return Label.LOW_PRIORITY if priority < 0 else Label.NONE
