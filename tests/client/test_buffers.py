"""Buffers are used again when nobody looks at them, and never before."""

from typing import Any

import numpy as np

from kvtier.client.batches import StreamedBatch
from kvtier.client.buffers import Buffers, is_idle
from kvtier.client.session import Session


class NoService:
    """A transport and stream that nobody should use."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


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


def test_a_batch_that_is_closed_twice_gives_its_buffers_back_once() -> None:
    buffers = Buffers(keep_bytes=1000)
    nobody: Any = NoService()
    session = Session(bytes(16), nobody, nobody, 100, 10, 1000, 0, None)
    batch = StreamedBatch(session, buffers, 1)
    batch.add(0, 0)
    batch.open(0)[:] = bytes(100)
    batch.close()
    batch.close()
    assert buffers.take(100) is not buffers.take(100)
