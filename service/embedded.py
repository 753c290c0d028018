"""The service inside the caller's process: the same core and client, without the wire."""

import asyncio
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

from google.protobuf.message import Message

from kvtier.client.client import DEFAULT_DEADLINE_S, Client, connect_through
from kvtier.config import load
from kvtier.errors import KvtierError, ServiceStopping
from kvtier.service.build import Core, build
from kvtier.service.servicer import Servicer
from kvtier.spaces import Space

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 600.0  # a large arena takes its time to populate


class EmbeddedCore:
    """A core on an event loop in a thread of its own. Raises what `build` raises."""

    def __init__(self, overrides: list[str]) -> None:
        self._config = load(None, {}, overrides)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kvtier-core", daemon=True
        )
        self._thread.start()
        self._process = os.getpid()
        self._gate = threading.Lock()
        self._closed = False
        try:
            self._core = self._wait(self._start(), _START_TIMEOUT_S)
        except BaseException:
            self._end_loop()
            raise
        self.servicer = Servicer(self._core.cache, self._core.explainer, self._core.curves)

    async def _start(self) -> Core:
        core = build(self._config, lambda what, done, total: None)
        core.start()
        return core

    def submit(self, work: "Coroutine[Any, Any, Any]") -> "Future[Any]":
        """Run a coroutine on the core's loop. Raises ServiceStopping once the core is closed."""
        with self._gate:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise ServiceStopping("the cache of this process is closed")

    def _wait(self, work: "Coroutine[Any, Any, Any]", timeout_s: float) -> Any:
        return self.submit(work).result(timeout_s)

    def close(self) -> None:
        """Stop the core, writing what RAM still holds to disk, and end its thread."""
        if self._process != os.getpid():
            return  # the thread is the parent's
        self._wait(self._stop(), self._config.server.shutdown_flush_s + _START_TIMEOUT_S)
        self._end_loop()

    async def _stop(self) -> None:
        self._core.cache.announce_stop()
        await self._core.stop()

    def _end_loop(self) -> None:
        with self._gate:
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_all(self) -> None:
        """End what is under way: else whoever waits for it would wait for ever."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


class InProcessTransport:
    """Calls the servicer's methods on the core's loop. KvtierErrors arrive as they were raised; any
    other is a mistake of ours, which must not become the engine's."""

    def __init__(self, core: EmbeddedCore) -> None:
        self._core = core

    def call(self, method: str, request: Message, timeout_s: float) -> Any:
        future = self._core.submit(getattr(self._core.servicer, method)(request, None))
        return _answer(future, timeout_s)

    def post(self, method: str, request: Message, on_failure: Callable[[], None]) -> None:
        future = self._core.submit(getattr(self._core.servicer, method)(request, None))
        future.add_done_callback(
            lambda done: on_failure() if done.cancelled() or done.exception() else None
        )

    def stream(self, method: str, request: Message, timeout_s: float | None) -> "InProcessStream":
        return InProcessStream(self._core, getattr(self._core.servicer, method)(request, None))

    def upload(self, method: str, requests: Iterator[Message]) -> "Future[Any]":
        async def each() -> AsyncIterator[Message]:
            while (request := await asyncio.to_thread(next, requests, None)) is not None:
                yield request

        return self._core.submit(getattr(self._core.servicer, method)(each(), None))

    def close(self) -> None:
        """Nothing to close: the core outlives its transports."""


def _answer(future: "Future[Any]", timeout_s: float) -> Any:
    try:
        return future.result(timeout_s)
    except TimeoutError:
        future.cancel()
        raise
    except CancelledError:
        raise ServiceStopping("the cache of this process was closed") from None
    except Exception as error:
        raise _ours(error) from error


def _ours(error: Exception) -> KvtierError:
    """The error as a client expects it: one that nobody expects is told to the log."""
    if isinstance(error, KvtierError):
        return error
    logger.error("a mistake of kvtier's, seen as a miss", exc_info=error)
    return KvtierError(f"{type(error).__name__}: {error}")


class InProcessStream:
    """A servicer's stream, pulled from another thread."""

    def __init__(self, core: EmbeddedCore, messages: AsyncIterator[Any]) -> None:
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._task = core.submit(self._pump(messages))
        self._task.add_done_callback(lambda done: self._answers.put((None, StopIteration())))

    async def _pump(self, messages: AsyncIterator[Any]) -> None:
        try:
            async for message in messages:
                self._answers.put((message, None))
        except Exception as error:  # noqa: BLE001 - handed to the thread that iterates
            self._answers.put((None, _ours(error)))

    def __iter__(self) -> "InProcessStream":
        return self

    def __next__(self) -> Any:
        message, error = self._answers.get()
        if error is not None:
            self._answers.put((None, StopIteration()))
            raise error
        return message

    def cancel(self) -> None:
        self._task.cancel()


def open_in_process(
    space: Space,
    *,
    cpu: str = "1GiB",
    disk: str = "",
    disk_capacity: str = "8GiB",
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> Client:
    """A client over a cache in this process: for notebooks, tests and engines without a sidecar.

    `cpu` is the size of the RAM tier, `disk` the directory of the disk tier (none by default).
    Closing the client writes what RAM still holds to disk. Raises ConfigError when a tier cannot be
    opened.
    """
    core = EmbeddedCore(
        [f"cpu.capacity={cpu}", f"disk.directory={disk}", f"disk.capacity={disk_capacity}"]
    )
    client = connect_through(
        lambda: InProcessTransport(core), space, deadline_s, on_close=core.close
    )
    client.wait_ready(_START_TIMEOUT_S)
    return client
