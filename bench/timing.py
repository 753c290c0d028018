"""How long things take, and how that compares with a reference that took turns with them."""

import time
from collections.abc import Callable
from statistics import median


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(reference: list[float], subject: list[float]) -> float:
    """How fast the subject is as a share of the reference: the median over rounds, in each of which
    both were timed (in seconds) one after the other."""
    return median(plain / ours for plain, ours in zip(reference, subject, strict=True))
