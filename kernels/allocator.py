"""What this process' allocator does with memory that was freed."""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_HELD_BLOCK_BYTES = 8 << 20  # the largest block that is held
_HELD_BYTES = 16 << 20  # at most, by each of its heaps


def keep_freed_memory() -> None:
    """Have the allocator hold what is freed, to give it out again.

    For a process of our own that allocates a megabyte or so for each message and block. Given back
    to the system each time, its pages come back cleared, one fault each: that took three times as
    long as all else about a message. Does nothing where the C library has no such choice.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _HELD_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _HELD_BYTES)
