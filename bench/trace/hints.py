"""What engines could have said of a trace's requests, made of the trace's own future.

A request's prefix comes back when a later request needs its last whole chunk, and with it all
before that one. What is told of it is what the protocol's hints can say:

none           nothing
return         that the session is over, where the prefix does not come back; wrong one time in ten
next_use       in how many seconds it comes back, or that the session is over
next_use~F     the same with the seconds wrong by a factor: lognormal, F at one standard deviation
stop_reason    why the turn ended, where the trace knows it
lie            a next use by lot, which has nothing to do with the trace

What is drawn by lot is the same in each run.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from kvtier.bench.trace.requests import Trace
from kvtier.errors import InvalidRequest
from kvtier.metrics import Counters
from kvtier.service.hints import LONGEST_NEXT_USE_S, StopReason, Told, understood

Seconds = npt.NDArray[np.float64]
Telling = Callable[[Trace], list[Told]]
"""What is told with each request of a trace."""

NONE = "none"
_WRONG = 0.1  # of what `return` tells
_SOONEST_S = 0.001  # on the wire a next use in no time is none that is told
_MOST_FACTOR = 1000.0
_SEED = 1
_STOPS = {0: 0, 1: StopReason.TOOL_USE.value, 2: StopReason.END_OF_TURN.value}


def parse_hints(text: str) -> Telling:
    """What to tell, by its name. Raises InvalidRequest when there is no such name."""
    name, wrong, factor = text.partition("~")
    telling = _TELLINGS.get(name)
    if telling is None or (wrong and telling is not _next_uses):
        raise InvalidRequest(
            f"--hints: {text[:80]!r} is not one of {', '.join(_TELLINGS)} and next_use~FACTOR"
        )
    return partial(_next_uses, factor=_factor(factor)) if wrong else telling


def labels_of(trace: Trace, telling: Telling) -> Sequence[int]:
    """What the service makes of the hints, for its policies: one label for each request. Raises
    InvalidRequest when the trace does not know what is to be told."""
    counters = Counters()
    return [understood(0, told, counters).label for told in telling(trace)]


def next_uses_s(trace: Trace) -> Seconds:
    """For each request in how many seconds its prefix comes back: inf for never, and NaN for a
    request without a whole chunk, of which there is nothing to say."""
    last = trace.starts[1:] - 1
    last = last - trace.partly[trace.chunks[last]]  # only the end of a prompt is unfilled
    following = trace.following()[last]
    times_s = np.append(trace.times_s, np.inf)
    found: Seconds = times_s[following] - trace.times_s
    found[last < trace.starts[:-1]] = np.nan
    return found


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 1 <= factor <= _MOST_FACTOR:
        raise InvalidRequest(
            f"--hints: next_use~{text[:80]}: a factor is from 1 to {_MOST_FACTOR:g}, as in "
            "next_use~4.5"
        )
    return factor


# ── what is told ──────────────────────────────────────────────────────────────────────────────────


def _nothing(trace: Trace) -> list[Told]:
    return [_told()] * trace.requests


def _returns(trace: Trace) -> list[Told]:
    found_s = next_uses_s(trace)
    is_wrong = _lots().random(trace.requests) < _WRONG
    is_over = np.isinf(found_s) ^ (is_wrong & ~np.isnan(found_s))
    return [_told(session_end=over) for over in is_over.tolist()]


def _next_uses(trace: Trace, factor: float = 1.0) -> list[Told]:
    found_s = next_uses_s(trace)
    found_s *= np.exp(math.log(factor) * _lots().standard_normal(trace.requests))
    return [_told_next_use(next_use_s) for next_use_s in found_s.tolist()]


def _stop_reasons(trace: Trace) -> list[Told]:
    if trace.stops is None or not trace.stops.any():
        raise InvalidRequest(
            f"--hints: stop_reason: {trace.name} does not say why turns end; take an .npz whose "
            "`hint` does, or other hints"
        )
    return [_told(stop_reason=_STOPS[stop]) for stop in trace.stops.tolist()]


def _lies(trace: Trace) -> list[Told]:
    """All scales are told equally often."""
    longest = math.log(LONGEST_NEXT_USE_S)
    drawn_s = np.exp(_lots().uniform(0, longest, trace.requests))
    return [_told_next_use(next_use_s) for next_use_s in drawn_s.tolist()]


def _told_next_use(next_use_s: float) -> Told:
    if math.isnan(next_use_s):
        return _told()
    if math.isinf(next_use_s):
        return _told(session_end=True)
    return _told(next_use_s=max(next_use_s, _SOONEST_S))


def _told(*, next_use_s: float = 0.0, session_end: bool = False, stop_reason: int = 0) -> Told:
    return Told(next_use_s, session_end, stop_reason, priority=0)


def _lots() -> np.random.Generator:
    return np.random.default_rng(_SEED)


_TELLINGS: dict[str, Callable[[Trace], list[Told]]] = {
    NONE: _nothing,
    "return": _returns,
    "next_use": _next_uses,
    "stop_reason": _stop_reasons,
    "lie": _lies,
}
