"""Streams and events of the device without a GPU.

Each stream is a thread. With `Chaos` there are none: work is done as late and in as wrong an order
as events allow, so that a wait that is missing shows as wrong bytes and not as luck.
"""

import os
import queue
import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from kvtier.kernels.device import DeviceError, DeviceFault, Event

_MOST_POLLS = 4  # with Chaos, after how many an event is done


@dataclass(frozen=True, slots=True)
class Chaos:
    """The worst order that events allow, the same for the same seed while one thread calls.

    Work is done when the host waits for it and not before: either only what it waits for, or in a
    random order with whatever else could run.
    """

    seed: int


class HostEvent:
    """Done once its stream has come to it."""

    def __init__(self, stream: "HostStream") -> None:
        self.stream = stream
        self.finished = threading.Event()
        self.error: DeviceFault | None = None
        self.polls = 0

    @property
    def done(self) -> bool:
        if not self.finished.is_set():
            self.polls += 1
            self.stream.order.poll(self)
        return self.finished.is_set()

    def finish(self) -> None:
        self.error = self.stream.failed
        self.finished.set()

    def synchronize(self) -> None:
        if not self.finished.is_set():
            self.stream.order.push(self)
            self.finished.wait()
        if self.error is not None:
            raise DeviceFault(str(self.error)) from self.error


# One step of a stream, and the event that it comes after.
_Work = tuple[Callable[[], None], HostEvent | None]


class HostStream:
    """A queue of work. Once some has failed, what follows on the stream is not done."""

    def __init__(self, handle: int, order: "Order") -> None:
        self.handle = handle
        self.order = order
        self.failed: DeviceFault | None = None

    def record(self) -> Event:
        event = HostEvent(self)
        self.order.add(self, (event.finish, None))
        return event

    def wait(self, event: Event) -> None:
        if not isinstance(event, HostEvent) or event.stream.order is not self.order:
            raise ValueError(f"wait: {event!r} is not an event of this device")
        self.order.add(self, (partial(self._inherit, event), event))

    def synchronize(self) -> None:
        self.record().synchronize()

    def queue(self, run: Callable[[], None]) -> None:
        """Queue work that may fail."""
        self.order.add(self, (partial(self._attempt, run), None))

    def _inherit(self, event: HostEvent) -> None:
        self.failed = self.failed or event.error

    def _attempt(self, run: Callable[[], None]) -> None:
        try:
            if self.failed is None:
                run()
        # Raised where the host waits. Whatever it is: a thread that ended here would leave all that
        # is queued behind it waiting for ever.
        except BaseException as error:  # noqa: BLE001
            # Without its traceback, which would keep memory mapped.
            reason = str(error) or type(error).__name__
            self.failed = DeviceFault(f"work on stream {self.handle} failed: {reason}")


class Order:
    """Says when the work of a device's streams is done."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.closed = False
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a child of the process that made it, without its threads, and
        with its locks as they were."""
        return os.getpid() != self._process

    def check_open(self) -> None:
        """Raises DeviceError when no work can be queued any more."""
        self.check_process()
        if self.closed:
            raise DeviceError("host: the device is closed; open it again")

    def check_process(self) -> None:
        """Raises DeviceError in a forked child."""
        if self.forked:
            of_parent = f"host: the device is of process {self._process}, which forked"
            raise DeviceError(f"{of_parent}; open another one in the child")

    def add(self, stream: HostStream, work: _Work) -> None:
        """Queue work. Raises DeviceError when the device is closed."""
        self.check_open()
        with self.lock:
            self.check_open()  # nothing may come after the last thing that `close` waits for
            self.put(stream, work)

    def put(self, stream: HostStream, work: _Work) -> None:
        """Queue work, under the lock."""
        raise NotImplementedError

    def poll(self, event: HostEvent) -> None:
        """Somebody asks whether the event is done."""
        self.check_process()

    def push(self, event: HostEvent) -> None:
        """Somebody waits for the event."""
        self.check_process()

    def close(self) -> None:
        """Do all that is queued, and take no more."""
        raise NotImplementedError


class Threads(Order):
    """A thread for each stream, so `Urgency` has nothing to decide."""

    def __init__(self) -> None:
        super().__init__()
        self._queues: dict[HostStream, queue.SimpleQueue[_Work | None]] = {}
        self._threads: list[threading.Thread] = []

    def put(self, stream: HostStream, work: _Work) -> None:
        if stream not in self._queues:
            works: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
            name = f"kvtier-stream-{stream.handle}"
            thread = threading.Thread(target=_follow, args=(works,), name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # too many threads, or the interpreter is ending
                raise DeviceError(f"stream {stream.handle}: no thread for it: {error}") from error
            self._queues[stream] = works
            self._threads.append(thread)
        self._queues[stream].put(work)

    def close(self) -> None:
        with self.lock:
            if not self.closed:
                self.closed = True
                for works in self._queues.values():
                    works.put(None)
        for thread in self._threads:
            thread.join()


def _follow(works: "queue.SimpleQueue[_Work | None]") -> None:
    while (work := works.get()) is not None:
        run, after = work
        if after is not None:
            after.finished.wait()
        run()
        del run, work  # what it looks at may be unmapped meanwhile


class Lately(Order):
    """Chaos: who waits does the work, under one lock."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._works: defaultdict[HostStream, deque[_Work]] = defaultdict(deque)

    def put(self, stream: HostStream, work: _Work) -> None:
        self._works[stream].append(work)

    def poll(self, event: HostEvent) -> None:
        self.check_process()
        if event.polls > self._random.randrange(_MOST_POLLS):
            self.push(event)

    def push(self, event: HostEvent) -> None:
        """Do work until the event is done.

        Doing only what it needs shows waits that are missing by what is left undone. Doing anything
        shows those that the order in which the host waits would hide.
        """
        self.check_process()
        with self.lock:
            only_needed = self._random.random() < 0.5
            while not event.finished.is_set():
                self._step([self._needed(event)] if only_needed else self._works)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            while any(self._works.values()):
                self._step(self._works)

    def _needed(self, event: HostEvent) -> HostStream:
        """The stream that must go on now for the event to be done."""
        _, after = self._works[event.stream][0]
        return event.stream if after is None or after.finished.is_set() else self._needed(after)

    def _step(self, among: Iterable[HostStream]) -> None:
        heads = [(works, works[0][1]) for stream in among if (works := self._works[stream])]
        ready = [works for works, after in heads if after is None or after.finished.is_set()]
        self._random.choice(ready).popleft()[0]()
