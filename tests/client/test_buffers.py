"""Buffers are used again when nobody looks at them, and never before."""

import numpy as np

from kvtier.client.buffers import Buffers, is_idle


def test_a_viewed_buffer_is_not_idle() -> None:
    buffer = Buffers(0).take(100)
    assert len(buffer) == 100
    assert is_idle(buffer)
    view = memoryview(buffer)
    part = view[10:20]
    array = np.frombuffer(view, np.uint8)
    assert not is_idle(buffer)
    del view, array
    assert not is_idle(buffer), "a slice still looks at it"
    part.release()
    assert is_idle(buffer)
    assert len(buffer) == 100


def test_only_idle_buffers_are_kept_and_only_so_many() -> None:
    buffers = Buffers(keep_bytes=250)
    taken = [buffers.take(100) for _ in range(4)]
    looked_at = memoryview(taken[0])
    buffers.give_back(taken)
    again = [buffers.take(100) for _ in range(3)]
    assert [any(one is old for old in taken) for one in again] == [True, True, False]
    assert all(one is not taken[0] for one in again)
    looked_at.release()


def test_another_size_is_not_given() -> None:
    buffers = Buffers(keep_bytes=1000)
    buffers.give_back([buffers.take(100)])
    assert len(buffers.take(50)) == 50
