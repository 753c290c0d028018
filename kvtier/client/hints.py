"""What an engine may tell of a request, so that the service learns what to keep."""

from dataclasses import dataclass
from enum import Enum

from kvtier.chunks import Prefix
from kvtier.proto import cache_pb2 as pb

_INT32_MAX = 2**31 - 1


class StopReason(Enum):
    """Why a request's answer ended."""

    UNSPECIFIED = pb.STOP_REASON_UNSPECIFIED
    END_OF_TURN = pb.STOP_REASON_END_OF_TURN
    TOOL_USE = pb.STOP_REASON_TOOL_USE
    LENGTH = pb.STOP_REASON_LENGTH
    ABORTED = pb.STOP_REASON_ABORTED


@dataclass(frozen=True, slots=True)
class Hints:
    """What is known of a prefix beyond its keys. The service learns from it and obeys nothing; what
    is out of range it clamps.

    `expected_next_use_s`: in how many seconds the prefix will be asked for again, at most a day; 0
    where that is not known. `session_end`: its conversation is over. `priority`: from -2 to 2.
    """

    expected_next_use_s: float = 0.0
    session_end: bool = False
    stop_reason: StopReason = StopReason.UNSPECIFIED
    priority: int = 0


def to_hints(prefix: Prefix, hints: Hints | None) -> pb.Hints:
    """The request that a prefix belongs to, and what is known of it, as the wire carries them."""
    message = pb.Hints(request=prefix.request)
    if hints is not None:
        message.expected_next_use_s = hints.expected_next_use_s
        message.session_end = hints.session_end
        message.stop_reason = hints.stop_reason.value
        message.priority = max(-_INT32_MAX, min(hints.priority, _INT32_MAX))  # what it can carry
    return message
