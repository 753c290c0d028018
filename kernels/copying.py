"""Large copies that two threads share: a core alone does not use what the memory can do."""

import mmap
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from kvtier.kernels.shared_memory import as_bytes_array

# From here on, offering half of a copy to another thread takes less time than it saves.
SHARED_COPY_BYTES = 4 << 20


class Copier:
    """Copies between buffers without the GIL, with one helping thread of its own.

    The thread starts with the first large copy and ends with `close`. Where it is late, absent (in
    a forked child, say) or there is only one processor, the calling thread copies everything.
    """

    def __init__(self) -> None:
        self._helps = len(os.sched_getaffinity(0)) > 1
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def copy(self, target: memoryview, source: memoryview) -> None:
        """Copy bytes between two contiguous buffers of the same size.

        Nothing is copied any more once this returns or raises. Raises ValueError when the sizes
        differ or the target is read-only.
        """
        into, out_of = as_bytes_array(target), as_bytes_array(source)
        if into.nbytes != out_of.nbytes:  # NumPy would repeat a single byte
            raise ValueError(f"copy: the source has shape {out_of.shape}, the target {into.shape}")
        if into.nbytes < SHARED_COPY_BYTES:
            np.copyto(into, out_of)
            return
        half = into.nbytes // 2 // mmap.PAGESIZE * mmap.PAGESIZE
        self.share(
            lambda: np.copyto(into[:half], out_of[:half]),
            lambda: np.copyto(into[half:], out_of[half:]),
        )

    def share(self, work: Callable[[], None], rest: Callable[[], None]) -> None:
        """Do both halves of some work that holds no GIL, at the same time where that is possible.

        Nothing is done any more once this returns or raises; it raises what they raise.
        """
        if not self._helps:
            work()
            rest()
            return
        task = _Task(rest)
        self._offer(task)
        try:
            work()
        finally:
            task.finish()

    def close(self) -> None:
        """End the helping thread; copies go on without it."""
        self._helps = False
        self._tasks.put(None)

    def _offer(self, task: "_Task") -> None:
        """Offer a task. It may be taken late, or never: whoever offered it finishes it."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_help, args=(self._tasks,), name="kvtier-copy", daemon=True
                )
                with suppress(RuntimeError):  # the interpreter is ending
                    self._thread.start()
        self._tasks.put(task)


class _Task:
    """Work for whichever of two threads takes it first."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._taken = threading.Lock()
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work unless the other thread has taken it."""
        if not self._taken.acquire(blocking=False):
            return
        work, self._work = self._work, None  # it views memory that others may want to unmap
        assert work is not None
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised where the work was offered
            self._error = error
        finally:
            self._done.set()

    def finish(self) -> None:
        """Return once the work is done, whatever interrupts the wait; raises what it raised."""
        self.run()
        while not self._done.is_set():
            try:
                self._done.wait()
            except BaseException as error:  # noqa: BLE001 - a signal's; it must wait, too
                self._error = error
        if self._error is not None:
            raise self._error


def _help(tasks: "queue.SimpleQueue[_Task | None]") -> None:
    while (task := tasks.get()) is not None:
        task.run()
        del task  # what it looks at may be unmapped meanwhile
